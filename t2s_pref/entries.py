"""Datasets as LLaMA-Factory finds them: the entries of a `dataset_info.json`, and their rows as it reads them.

Alpaca and sharegpt entries of files, of Hub datasets and of a `dataset_info.json` on the Hub (`REMOTE:user/repo`). Not
covered, and refused by name: tools, images and other media, KTO tags, scripts, cloud storage, ModelScope.

JSON files are read by this package, whose errors name the record. What LLaMA-Factory cannot load is refused: it needs
`datasets` 4.0 or older, which fail on columns of mixed types, where newer ones do not.
"""

import codecs
import os
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from t2s_pref.errors import UserError, one_line
from t2s_pref.lineage import KEY, relied_on
from t2s_pref.prompts import row_of
from t2s_pref.registry import DATASET_INFO, read_info

REMOTE = "REMOTE:"
FILE_TYPES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
OTHER_SOURCES = ("ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
SHAREGPT = {"messages": "conversations"}
TAGS = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt", "system_tag": "system"}
WITHOUT_MARK = "LLaMA-Factory cannot read it; save the file as UTF-8 without one"
KNOWN = (*ALPACA, *SHAREGPT, "system", "history", "chosen", "rejected")


class Trained(NamedTuple):
    """A row as it is trained on: the prompt as an alpaca row, and one answer, or chosen and rejected."""

    row: dict[str, Any]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """One entry: what it is called, what stands there, and the folder that its files are in."""

    name: str
    entry: dict[str, Any]
    folder: Path | None

    @property
    def ranking(self) -> bool:
        """Whether it is preference data."""
        ranking = self.entry.get("ranking", False)
        if not isinstance(ranking, bool):
            raise self._error(f"has the ranking {ranking!r}; it must be true or false.")
        return ranking

    def rows(self, most: int | None = None) -> Iterator[Trained]:
        """The rows, the first `most` of them, each as it is trained on; all, where `num_samples` draws by chance.

        Raises:
            [`UserError`]: where the data are not there, or a row is as LLaMA-Factory would drop it or die on it.
        """
        formatting = self.entry.get("formatting", "alpaca")
        if formatting not in ("alpaca", "sharegpt"):
            raise self._error(f"has the formatting {formatting!r}; it must be alpaca or sharegpt.")
        convert = self._alpaca if formatting == "alpaca" else self._sharegpt
        columns = self._mapping("columns", ALPACA if formatting == "alpaca" else SHAREGPT)
        if other := [role for role in columns if role not in KNOWN]:
            raise self._error(f"has a column for {other[0]!r}, which this package does not read.")
        most = None if self.entry.get("num_samples") else most
        found = 0
        for found, record in enumerate(islice(self._records(), most), 1):
            try:
                trained = convert(record, columns)
            except KeyError as error:
                raise self._error(f"row {found - 1} lacks {error.args[0]!r}, which the entry names.") from error
            except (TypeError, IndexError, AttributeError) as error:
                raise self._error(f"row {found - 1} is not {formatting} data: {one_line(error)}.") from error
            if trained is None or not all(isinstance(answer, str) for answer in trained.answers):
                raise self._error(f"row {found - 1} has no answer, or turns out of order; it would be dropped.")
            if wrong := _wrong(trained.row):
                raise self._error(f"row {found - 1} {wrong}; LLaMA-Factory would die on it or leave it out.")
            yield trained
        if not found:
            raise self._error("has no rows.")

    def _alpaca(self, record: Mapping[str, Any], columns: Mapping[str, str]) -> Trained:
        value = {role: record[column] for role, column in columns.items() if column}
        row = {"instruction": value.get("prompt") or "", "input": value.get("query") or ""}
        row |= {"system": value.get("system") or "", "history": value.get("history") or []}
        return Trained(row, (value["chosen"], value["rejected"]) if self.ranking else (value["response"],))

    def _sharegpt(self, record: Mapping[str, Any], columns: Mapping[str, str]) -> Trained | None:
        tags = self._mapping("tags", TAGS)
        role, content = tags["role_tag"], tags["content_tag"]
        turns = [(turn[role], turn[content]) for turn in record[columns["messages"]]]
        sides = [record[columns[side]] for side in ("chosen", "rejected")] if self.ranking else []
        answers = [(side[role], side[content]) for side in sides] or [turns.pop()]
        if any(speaker != tags["assistant_tag"] for speaker, _ in answers):
            return None
        speakers = {tags[f"{name}_tag"]: name for name in ("user", "assistant", "system") if tags.get(f"{name}_tag")}
        row = row_of([(speakers.get(speaker), text) for speaker, text in turns])
        if row is None:
            return None
        spoken = speakers.get(turns[0][0]) == "system"
        system = row["system"] if spoken or not columns.get("system") else record[columns["system"]]
        return Trained({**row, "system": system or ""}, tuple(text for _, text in answers))

    def _records(self) -> Iterator[Mapping[str, Any]]:
        from datasets import load_dataset

        entry = self.entry
        if "hf_hub_url" in entry:
            source = (entry["hf_hub_url"], entry.get("subset"))
            where = {"data_dir": entry.get("folder"), "split": entry.get("split") or "train"}
        else:
            if other := [source for source in OTHER_SOURCES if source in entry]:
                raise self._error(f"has {other[0]}; only file_name and hf_hub_url can be read here.")
            if not isinstance(entry.get("file_name"), str):
                raise self._error("names no data: it has neither file_name nor hf_hub_url.")
            if self.folder is None:
                raise self._error("names a file, which LLaMA-Factory does not find on the Hub; it needs hf_hub_url.")
            files = self._files(self.folder / entry["file_name"])
            kinds = {FILE_TYPES.get(file.suffix) for file in files}
            if len(kinds) > 1 or None in kinds:
                raise self._error(
                    f"has files {[file.name for file in files]}; one of {', '.join(FILE_TYPES)} it must be."
                )
            if kinds == {"json"}:
                yield from self._json(files)
                return
            source, where = (kinds.pop(),), {"data_files": [str(file) for file in files], "split": "train"}
        try:
            yield from load_dataset(*source, **where)
        except Exception as error:  # three libraries with no exception in common lie below
            raise self._error(f"cannot be loaded: {one_line(error.__cause__ or error)}") from error

    def _json(self, files: list[Path]) -> Iterator[dict[str, Any]]:
        """The records of JSON files; what some of them lack is `None` there."""
        from t2s_pref.records import read_records

        for file in files:
            with file.open("rb") as opened:
                if opened.read(4) == codecs.BOM_UTF8 + b"[":
                    raise self._error(f"has a byte order mark in {file.name}; {WITHOUT_MARK}.")
        records = [record for file in files for record in read_records(file, "expected the rows of a dataset")[0]]
        names = dict.fromkeys(name for record in records for name in record)
        for name in names:
            values = [record.get(name) for record in records]
            if (error := _misfit(values)) is not None:
                number = bisect_left(range(len(values)), True, key=lambda row: _misfit(values[: row + 1]) is not None)
                raise self._error(
                    f"row {number} has {values[number]!r:.80} for {name!r}, and LLaMA-Factory cannot load such a "
                    f"column ({one_line(error)}): mend it, or leave it out."
                )
        for record in records:
            yield {**dict.fromkeys(names), **record}

    def _mapping(self, key: str, default: dict[str, str]) -> dict[str, str | None]:
        value = self.entry.get(key, default)
        if not isinstance(value, dict) or not all(isinstance(each, str | None) for each in value.values()):
            raise self._error(f"has {value!r:.80} for {key}; it must be an object of strings.")
        return value

    def _files(self, path: Path) -> list[Path]:
        if not path.exists():
            raise self._error(f"names {str(path)!r}, which does not exist.")
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        if not files:
            raise self._error(f"names {str(path)!r}, an empty folder.")
        return files

    def _error(self, problem: str) -> UserError:
        return UserError(f"Dataset {self.name!r} {problem}")


def find_entries(dataset_dir: str, names: list[str]) -> list[Entry]:
    """The entries of these names in the `dataset_info.json` of a folder, or of `REMOTE:user/repo` on the Hub.

    Raises:
        [`UserError`]: where there is no such file, it is broken, or a name is not in it or given twice.
    """
    folder = None if dataset_dir.startswith(REMOTE) else Path(os.path.expanduser(dataset_dir))
    path = _download(dataset_dir.removeprefix(REMOTE)) if folder is None else folder / DATASET_INFO
    if not path.is_file():
        raise UserError(
            f"{str(folder)!r} has no {DATASET_INFO}; save_llamafactory and the commands write one beside their data."
        )
    info = read_info(path)
    if path.read_bytes().startswith(codecs.BOM_UTF8):
        raise UserError(f"{path} begins with a byte order mark; {WITHOUT_MARK}.")
    if not names:
        raise UserError(f"No dataset is named; {path} has {', '.join(info)}.")
    for name in names:
        if not isinstance(info.get(name), dict):
            raise UserError(f"Dataset {name!r} is not in {path}; there are {', '.join(info) or 'none'}.")
        if "," in name or name != name.strip():
            raise UserError(
                f"Dataset {name!r} has a comma or a blank at an end; LLaMA-Factory cannot find it: rename it."
            )
        if names.count(name) > 1:
            raise UserError(f"Dataset {name!r} is given twice; LLaMA-Factory would take it once.")
    return [Entry(name, info[name], folder) for name in names]


def noted(entries: Sequence[Entry], *steps: str) -> list[dict[str, Any]]:
    """What the given steps noted with the data of these entries (`t2s_pref.lineage`)."""
    return [record for entry in entries for record in relied_on(entry.entry.get(KEY)) if record["step"] in steps]


def _misfit(values: list[Any]) -> Exception | None:
    """Why Arrow has no column for these values, as they are of several types or no text that can be encoded."""
    import pyarrow as pa

    try:
        pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
        return error
    return None


def _wrong(row: Mapping[str, Any]) -> str | None:
    """What of a row is neither a text nor a history of them."""
    history = row["history"]
    if not (isinstance(history, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in history)):
        return f"has the history {history!r:.80}; it must be a list of [question, answer]"
    texts = [*(text for turn in history for text in turn), row["instruction"], row["input"], row["system"]]
    return next(
        (f"has {text!r:.80} in its prompt, which is no text" for text in texts if not isinstance(text, str)), None
    )


def _download(repo_id: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, DATASET_INFO, repo_type="dataset"))
    except Exception as error:  # the Hub's own errors, and what the HTTP client has for a connection that breaks off
        raise UserError(
            f"{DATASET_INFO} of the dataset {repo_id!r} was not found on the Hub: {one_line(error)}"
        ) from error

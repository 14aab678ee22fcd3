"""Datasets as LLaMA-Factory finds them: the entries of a `dataset_info.json`, and their rows as it reads them.

Alpaca and sharegpt entries of files, of Hub datasets and of a `dataset_info.json` on the Hub (`REMOTE:user/repo`). Not
covered, and refused by name: tools, images and other media, KTO tags, scripts, cloud storage, ModelScope.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from t2s_pref.errors import UserError, one_line
from t2s_pref.lineage import KEY
from t2s_pref.registry import DATASET_INFO, read_info

REMOTE = "REMOTE:"
FILE_TYPES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
OTHER_SOURCES = ("ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
SHAREGPT = {"messages": "conversations"}
TAGS = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt", "system_tag": "system"}
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
        return bool(self.entry.get("ranking"))

    def rows(self, most: int | None = None) -> Iterator[Trained]:
        """The rows, the first `most` of them, each as it is trained on.

        Raises:
            [`UserError`]: where the data are not there, or a row is as LLaMA-Factory would drop it or die on it.
        """
        formatting = self.entry.get("formatting", "alpaca")
        if formatting not in ("alpaca", "sharegpt"):
            raise self._error(f"has the formatting {formatting!r}; it must be alpaca or sharegpt.")
        convert = self._alpaca if formatting == "alpaca" else self._sharegpt
        columns = self.entry.get("columns", ALPACA if formatting == "alpaca" else SHAREGPT)
        if other := [role for role in columns if role not in KNOWN]:
            raise self._error(f"has a column for {other[0]!r}, which this package does not read.")
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
            yield trained
        if not found:
            raise self._error("has no rows.")

    def _alpaca(self, record: Mapping[str, Any], columns: Mapping[str, str]) -> Trained:
        value = {role: record[column] for role, column in columns.items() if column}
        row = {"instruction": value.get("prompt") or "", "input": value.get("query") or ""}
        row |= {"system": value.get("system") or "", "history": value.get("history") or []}
        return Trained(row, (value["chosen"], value["rejected"]) if self.ranking else (value["response"],))

    def _sharegpt(self, record: Mapping[str, Any], columns: Mapping[str, str]) -> Trained | None:
        tags = self.entry.get("tags", TAGS)
        role, content = tags["role_tag"], tags["content_tag"]
        turns = list(record[columns["messages"]])
        system = record[columns["system"]] if columns.get("system") else ""
        if turns and tags.get("system_tag") and turns[0][role] == tags["system_tag"]:
            system = turns.pop(0)[content]
        answers = [record[columns[side]] for side in ("chosen", "rejected")] if self.ranking else [turns.pop()]
        expected = [tags["user_tag"], tags["assistant_tag"]] * len(turns)
        odd = len(turns) % 2 == 1 and [turn[role] for turn in turns] == expected[: len(turns)]
        if not odd or any(answer[role] != tags["assistant_tag"] for answer in answers):
            return None
        said = [turn[content] for turn in turns]
        history = [list(pair) for pair in zip(said[:-1:2], said[1::2], strict=True)]
        row = {"instruction": said[-1], "input": "", "system": system or "", "history": history}
        return Trained(row, tuple(answer[content] for answer in answers))

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
                from t2s_pref.records import read_records

                for file in files:
                    yield from read_records(file, "expected the rows of a dataset")[0]
                return
            source, where = (kinds.pop(),), {"data_files": [str(file) for file in files], "split": "train"}
        try:
            yield from load_dataset(*source, **where)
        except Exception as error:  # three libraries with no exception in common lie below
            raise self._error(f"cannot be loaded: {one_line(error.__cause__ or error)}") from error

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
    folder = None if dataset_dir.startswith(REMOTE) else Path(dataset_dir).expanduser()
    path = _download(dataset_dir.removeprefix(REMOTE)) if folder is None else folder / DATASET_INFO
    if not path.is_file():
        raise UserError(
            f"{str(folder)!r} has no {DATASET_INFO}; save_llamafactory and the commands write one beside their data."
        )
    info = read_info(path)
    if not names:
        raise UserError(f"No dataset is named; {path} has {', '.join(info)}.")
    for name in names:
        if not isinstance(info.get(name), dict):
            raise UserError(f"Dataset {name!r} is not in {path}; there are {', '.join(info) or 'none'}.")
        if names.count(name) > 1:
            raise UserError(f"Dataset {name!r} is given twice; LLaMA-Factory would take it once.")
    return [Entry(name, info[name], folder) for name in names]


def noted(entries: Sequence[Entry], *steps: str) -> list[dict[str, Any]]:
    """What the given steps noted with the data of these entries (`t2s_pref.lineage`)."""
    found = [entry.entry.get(KEY) for entry in entries]
    return [
        record
        for records in found
        if isinstance(records, list)
        for record in records
        if isinstance(record, dict) and record.get("step") in steps
    ]


def _download(repo_id: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id, DATASET_INFO, repo_type="dataset"))
    except Exception as error:  # the Hub's own errors, and what the HTTP client has for a connection that breaks off
        raise UserError(
            f"{DATASET_INFO} of the dataset {repo_id!r} was not found on the Hub: {one_line(error)}"
        ) from error

"""Data files that LLaMA-Factory trains on, registered in its `dataset_info.json`: `save_llamafactory`.

Checked against LLaMA-Factory 0.9.5. It drops or dies on nulls, mixed types, lists and empty files with messages that
name no row, and trains silently on an empty reject or one equal to the chosen answer: so these are refused here. Not
covered: the training YAML, and whether prompt and answers fit its `cutoff_len`.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Value
from filelock import FileLock

from t2s_pref.columns import (
    ADAPTER,
    CHOSEN,
    CHOSEN_FROM,
    DB_ID,
    HISTORY,
    INPUT,
    INSTRUCTION,
    OUTPUT,
    POLICY_HASH,
    REJECTED,
    ROUND,
    SYSTEM,
    check_columns,
    each_split,
)
from t2s_pref.errors import UserError
from t2s_pref.files import atomic_write, check_writable
from t2s_pref.load import check_history
from t2s_pref.records import write_records

logger = logging.getLogger(__name__)

# What goes with the answers, where a dataset has it.
CARRIED = (SYSTEM, HISTORY, DB_ID, ROUND, ADAPTER, POLICY_HASH, CHOSEN_FROM)

# What null is written as, if not as "": LLaMA-Factory wants one type in a column.
NULLS: dict[str, Any] = {HISTORY: [], ROUND: 1}

DATASET_INFO = "dataset_info.json"
BATCH_ROWS = 1000


def save_llamafactory(
    dataset: Dataset | DatasetDict, path: str | os.PathLike[str], name: str | None = None
) -> Path | dict[str, Path]:
    """Write `dataset` as an alpaca file for LLaMA-Factory and register it in the `dataset_info.json` beside it.

    Args:
        dataset (`Dataset` or `DatasetDict`):
            With a column `chosen` or `rejected`: preference pairs, one reject a row, as `explode_rejected` makes them.
            Otherwise with `output`: supervised rows. Each split of a `DatasetDict` is saved for itself, with
            `_<split>` after the file's stem and the name.
        path (`str` or `os.PathLike`):
            `.json` for one indented array, `.jsonl` for one object a line. Missing folders are made. The file appears
            whole or not at all, and rows are streamed into it: memory does not grow with the dataset.
        name (`str`, *optional*, defaults to the file's stem):
            What the training YAML calls it (`dataset: <name>`). No commas or blanks: LLaMA-Factory splits there.

    Columns read: `instruction`, `input` (string; null is written as `""`); `chosen` and `rejected`, or `output`
    (string, neither null nor blank, and `rejected` not equal to `chosen`); and where the dataset has them `system`,
    `db_id`, `adapter`, `policy_hash`, `chosen_from` (null is written as `""`), `round` (int64) and `history` (list of
    [user, assistant] pairs; null is written as `[]`), because LLaMA-Factory wants one type in a column and reads `""`
    and `[]` as absent. Other columns are left out.

    In `dataset_info.json` an entry of the same name is replaced, every other entry stays as it is and where it is.
    Processes that save into one folder at the same time wait for each other there.

    Returns:
        `Path` of the data file; for a `DatasetDict`, the path of each split.

    Raises:
        [`UserError`]: a column is missing or not of strings, a row is as LLaMA-Factory would drop or mislearn it, the
            dataset is empty, the path or name cannot be used, or the existing `dataset_info.json` is broken. Nothing
            is written then.

    Example:

    ```py
    >>> import json, tempfile
    >>> from datasets import Dataset
    >>> from t2s_pref.llamafactory import save_llamafactory
    >>> pair = {"instruction": "How many singers?", "input": "", "chosen": "SELECT count(*) FROM singer"}
    >>> pairs = Dataset.from_list([{**pair, "rejected": "SELECT count(*) FROM song"}])
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = save_llamafactory(pairs, f"{folder.name}/my_dpo.json")
    >>> json.loads(path.read_text())[0]["rejected"]
    'SELECT count(*) FROM song'
    >>> print((path.parent / "dataset_info.json").read_text())
    {
      "my_dpo": {
        "file_name": "my_dpo.json",
        "ranking": true,
        "columns": {
          "prompt": "instruction",
          "query": "input",
          "chosen": "chosen",
          "rejected": "rejected"
        }
      }
    }
    <BLANKLINE>
    >>> folder.cleanup()

    ```
    """
    path, name = check_destination(path, name)
    if isinstance(dataset, DatasetDict):
        return {
            split: save_llamafactory(part, path.with_stem(f"{path.stem}_{split}"), f"{name}_{split}")
            for split, part in dataset.items()
        }
    dataset = each_split(dataset, lambda whole: whole)  # refuses whatever else is not a Dataset
    answers = _answer_columns(dataset)
    columns = [INSTRUCTION, INPUT, *answers, *(n for n in CARRIED if n in dataset.column_names)]
    with atomic_write(path) as file:
        write_records(file, _records(dataset.select_columns(columns), answers), lines=path.suffix == ".jsonl")
    register(path, name, columns)
    return path


def check_destination(path: str | os.PathLike[str], name: str | None = None) -> tuple[Path, str]:
    """Return the file and the dataset name that `save_llamafactory` would use; write nothing.

    For programs that work for hours before they save: whatever is wrong with the destination shows at the start.

    Raises:
        [`UserError`]: the path or name cannot be used, or the existing `dataset_info.json` is broken.
    """
    path = Path(os.path.expanduser(path))
    if path.suffix not in (".json", ".jsonl"):
        raise UserError(f"{str(path)!r} must end in .json (one array) or .jsonl (one object a line).")
    if path.name.lower() == DATASET_INFO:
        raise UserError(f"{str(path)!r} is where LLaMA-Factory registers datasets; give the data another file name.")
    check_writable(path)
    name = path.stem if name is None else name
    if not re.fullmatch(r"[^\s,]+", name):
        raise UserError(
            f"Dataset name {name!r} must have no commas or blanks: LLaMA-Factory splits there; pass name= "
            "(--dataset-name)."
        )
    _read_info(path.parent / DATASET_INFO)
    return path, name


def _answer_columns(dataset: Dataset) -> tuple[str, ...]:
    """Return the columns that hold answers, and refuse a dataset whose columns LLaMA-Factory cannot read."""
    pairs = CHOSEN in dataset.column_names or REJECTED in dataset.column_names
    answers = (CHOSEN, REJECTED) if pairs else (OUTPUT,)
    explode = "call explode_rejected first: it makes one row a reject, with chosen and rejected as strings"
    other = f"{explode}; or remove_columns({REJECTED!r}) to save supervised rows."
    check_columns(dataset, (INSTRUCTION, INPUT, *answers), other if pairs else "load_sft reads them.")
    for name in (INSTRUCTION, INPUT, *answers, SYSTEM, DB_ID, ADAPTER, POLICY_HASH, CHOSEN_FROM):
        feature = dataset.features.get(name, Value("string"))
        nullable = name not in answers and feature == Value("null")
        if feature not in (Value("string"), Value("large_string")) and not nullable:
            hint = f"; {explode}." if name in (CHOSEN, REJECTED) else "; cast_column it to Value('string')."
            raise UserError(f"Column {name!r} is {feature}, expected strings{hint}")
    if not len(dataset):
        raise UserError("The dataset is empty, and LLaMA-Factory fails on an empty file; nothing was written.")
    return answers


def _records(dataset: Dataset, answers: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield the rows as LLaMA-Factory wants them, with the answers checked."""
    row = 0
    names = dataset.column_names
    for batch in dataset.with_format(None).iter(BATCH_ROWS):
        for values in zip(*(batch[name] for name in names), strict=True):
            record = dict(zip(names, values, strict=True))
            _check_answers(record, answers, row)
            if HISTORY in record:
                check_history([record[HISTORY]], lambda problem, _, row=row: UserError(f"Row {row}: {problem}"))
            yield {name: NULLS.get(name, "") if value is None else value for name, value in record.items()}
            row += 1


def _check_answers(record: dict[str, Any], answers: tuple[str, ...], row: int) -> None:
    for name in answers:
        answer = record[name]
        if answer is None or not answer.strip():
            raise UserError(
                f"Row {row}: column {name!r} is {'null' if answer is None else 'blank'}, and LLaMA-Factory would drop "
                "the row or train on nothing. Filter such rows out first: "
                f"dataset.filter(lambda r: (r[{name!r}] or '').strip())"
            )
    if REJECTED in record and record[REJECTED] == record[CHOSEN]:
        raise UserError(
            f"Row {row}: 'rejected' equals 'chosen', and LLaMA-Factory would train on the pair silently. Filter such "
            "rows out first: dataset.filter(lambda r: r['rejected'] != r['chosen'])"
        )


def _entry(file_name: str, columns: list[str]) -> dict[str, Any]:
    """Return the `dataset_info.json` entry: a column not listed counts as absent, one listed must be in the data."""
    roles = {"prompt": INSTRUCTION, "query": INPUT}
    if REJECTED in columns:
        kind: dict[str, Any] = {"ranking": True}
        roles |= {"chosen": CHOSEN, "rejected": REJECTED}
    else:
        kind = {"formatting": "alpaca"}
        roles |= {"response": OUTPUT}
    roles |= {role: role for role in (SYSTEM, HISTORY) if role in columns}
    return {"file_name": file_name, **kind, "columns": roles}


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); left as it is; mend it or move it away.") from error
    if not isinstance(info, dict):
        raise UserError(f"{path}: is a {type(info).__name__}, expected an object of entries by name; left as it is.")
    return info


def register(data: Path, name: str, columns: list[str]) -> None:
    """Enter a data file with these columns into the `dataset_info.json` beside it, in the place of one of its name."""
    entry = _entry(data.name, columns)
    # a link to the real file stays a link, and all that share that file share its lock
    path = (data.parent / DATASET_INFO).resolve()
    with _locked(path):
        info = _read_info(path)  # again: another process may have added its entry meanwhile
        if name in info:
            logger.info("%s: replaced the entry %r", path, name)
        info[name] = entry
        with atomic_write(path) as file:
            # ASCII, because LLaMA-Factory opens this file in the platform's own encoding.
            json.dump(info, file, indent=2, ensure_ascii=True)
            file.write("\n")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold `path` against other processes, and leave no lock file; one that a killed process left blocks nobody."""
    lock = path.with_name(f".{path.name}.lock")
    with FileLock(lock):
        try:
            yield
        finally:
            # While it is held: whoever waits on this file sees that it has no name any more and starts over. Windows
            # cannot delete an open file; there filelock does it on release.
            if sys.platform != "win32":
                lock.unlink(missing_ok=True)

"""Data files that LLaMA-Factory trains on, registered in its `dataset_info.json`: `save_llamafactory`.

Checked against LLaMA-Factory 0.9.5. It drops or dies on nulls, mixed types, lists and empty files with messages that
name no row: so these are refused here. The training file is `t2s_pref.training`'s.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Value

from t2s_pref import lineage
from t2s_pref.columns import (
    ADAPTER,
    CHOSEN_FROM,
    DB_ID,
    HISTORY,
    INPUT,
    INSTRUCTION,
    POLICY_HASH,
    ROUND,
    STRINGS,
    SYSTEM,
    VERDICT,
    each_split,
)
from t2s_pref.errors import UserError
from t2s_pref.files import atomic_write, check_writable
from t2s_pref.layouts import answer_columns, checked_rows, sharegpt
from t2s_pref.records import write_records
from t2s_pref.registry import DATASET_INFO, entry_of, read_info, register
from t2s_pref.settings import LAYOUTS

# What goes with the answers, where a dataset has it.
CARRIED = (SYSTEM, HISTORY, DB_ID, VERDICT, ROUND, ADAPTER, POLICY_HASH, CHOSEN_FROM)

# What null is written as, if not as "": LLaMA-Factory wants one type in a column.
NULLS: dict[str, Any] = {HISTORY: [], ROUND: 1}


def save_llamafactory(
    dataset: Dataset | DatasetDict,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    formatting: str = "alpaca",
) -> Path | dict[str, Path]:
    """Write `dataset` as a file for LLaMA-Factory and register it in the `dataset_info.json` beside it.

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
        formatting (`str`, *optional*, defaults to `"alpaca"`):
            `alpaca`: the columns as strings. `sharegpt`: the prompt as `messages` (system message and history among
            them), each side of a pair as one message; supervised rows end in their answer's.

    Columns read: `instruction`, `input` (string; null is written as `""`); `chosen` and `rejected`, or `output`
    (string, neither null nor blank, and `rejected` not equal to `chosen`); and where the dataset has them `system`,
    `db_id`, `verdict`, `adapter`, `policy_hash`, `chosen_from` (null is written as `""`), `round` (int64) and `history`
    (list of [user, assistant] pairs; null is written as `[]`): LLaMA-Factory wants one type in a column, and reads `""`
    and `[]` as absent. Other columns are left out.

    In `dataset_info.json` an entry of the same name is replaced, every other entry stays as it is and where it is. What
    the steps before noted of the data (models, settings, counts; no paths) goes into the entry too.
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
    if formatting not in LAYOUTS:
        raise UserError(f"formatting is {formatting!r}; it must be one of {', '.join(LAYOUTS)}.")
    path, name = check_destination(path, name)
    if isinstance(dataset, DatasetDict):
        return {
            split: save_llamafactory(
                part, path.with_stem(f"{path.stem}_{split}"), f"{name}_{split}", formatting=formatting
            )
            for split, part in dataset.items()
        }
    dataset = each_split(dataset, lambda whole: whole)  # refuses whatever else is not a Dataset
    answers = answer_columns(dataset)
    carried = [column for column in CARRIED if column in dataset.column_names]
    for column in (DB_ID, VERDICT, ADAPTER, POLICY_HASH, CHOSEN_FROM):
        if dataset.features.get(column, Value("null")) not in (Value("null"), *STRINGS):
            found = dataset.features[column]
            raise UserError(f"Column {column!r} is {found}, expected strings; cast_column it to Value('string').")
    if not len(dataset):
        raise UserError("The dataset is empty, and LLaMA-Factory fails on an empty file; nothing was written.")
    columns = [INSTRUCTION, INPUT, *answers, *carried]
    with atomic_write(path) as file:
        rows = _alpaca(dataset.select_columns(columns), answers)
        written = rows if formatting == "alpaca" else (sharegpt(row, answers) for row in rows)
        write_records(file, written, lines=path.suffix == ".jsonl")
    register(path, name, entry_of(columns, formatting), lineage.records(dataset))
    return path


def _alpaca(dataset: Dataset, answers: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows as LLaMA-Factory wants them, with the answers checked."""
    for row in checked_rows(dataset, answers):
        yield {name: NULLS.get(name, "") if value is None else value for name, value in row.items()}


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
    read_info(path.parent / DATASET_INFO)
    return path, name

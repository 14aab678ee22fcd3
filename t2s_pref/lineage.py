"""What each step did, noted with the dataset and carried wherever it goes: for its card, and for the training file.

The notes are lines of `dataset.info.description`, which `datasets` keeps through `map`, `filter`, `select`,
`train_test_split`, `save_to_disk` and `concatenate_datasets`: one for people, and where a card needs more, one of JSON
before it. In a file they are part of its entry in `dataset_info.json`. None of them holds a path, an address or a key:
a model in a folder is noted by the folder's name and a hash of its content.
"""

import json
from collections.abc import Iterable
from typing import Any

from datasets import Dataset

# The key of a record, in a line of the description and in an entry of `dataset_info.json`.
KEY = "t2s_pref"
_START = f'{{"{KEY}": '

# What a record's `step` may be, in the order of the road.
LOADED = "load_sft"
TAUGHT, EXPLAINED = "generate_cot", "explode_cot"
SAMPLED, PROVEN, PAIRED = "generate_rejected", "verify_rejected", "explode_rejected"


def note(dataset: Dataset, told: str = "", **record: Any) -> None:
    """Add what a step did to a dataset that is the step's own: a record with `step`, and a line for people.

    >>> rows = Dataset.from_list([{"output": "SELECT 1"}])
    >>> note(rows, "load_sft: user/data", step=LOADED, source="user/data")
    >>> told(rows), records(rows)
    (['load_sft: user/data'], [{'step': 'load_sft', 'source': 'user/data'}])
    """
    add(dataset, [*([_line(record)] if record else []), *([told] if told else [])])


def add(dataset: Dataset, lines: Iterable[str]) -> None:
    """Add lines of another dataset's description, each once."""
    before = dataset.info.description.splitlines()
    dataset.info.description = "\n".join(dict.fromkeys(line for line in (*before, *lines) if line))


def forget(dataset: Dataset, *steps: str) -> None:
    """Take out what these steps noted, because they are taken anew."""
    lines = dataset.info.description.splitlines()
    dataset.info.description = "\n".join(
        line
        for line in lines
        if not line.startswith(tuple(f"{step}: " for step in steps)) and (_record(line) or {}).get("step") not in steps
    )


def told(dataset: Dataset) -> list[str]:
    """The lines for people."""
    return [line for line in dataset.info.description.splitlines() if line and not line.startswith(_START)]


def records(dataset: Dataset) -> list[dict[str, Any]]:
    """The records, in the order in which the steps were taken."""
    return [record for line in dataset.info.description.splitlines() if (record := _record(line)) is not None]


def noted_lines(dataset: Dataset) -> list[str]:
    """The records as lines, without what is for people at the time."""
    return lines_of(records(dataset))


def settings_of(noted: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sampling settings of each run that wrote answers."""
    settings = [each.get("settings") for each in noted if each["step"] in (TAUGHT, SAMPLED)]
    return [each for each in settings if isinstance(each, dict)]


def lines_of(noted: Any) -> list[str]:
    """The lines of records that were read from a file, in which anything may stand."""
    return [_line(record) for record in noted if _is_record(record)] if isinstance(noted, list) else []


def _line(record: dict[str, Any]) -> str:
    return f"{_START}{json.dumps(record)}}}"


def _record(line: str) -> dict[str, Any] | None:
    if not line.startswith(_START):
        return None
    try:
        record = json.loads(line)[KEY]
    except (ValueError, KeyError, RecursionError):  # a description is anybody's to write
        return None
    return record if _is_record(record) else None


def _is_record(record: Any) -> bool:
    return isinstance(record, dict) and isinstance(record.get("step"), str)

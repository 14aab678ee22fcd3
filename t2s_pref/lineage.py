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
SAVED = "save_llamafactory"


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


def thinking_mode(noted: Iterable[dict[str, Any]]) -> bool | None:
    """Whether the thinking mode was on where the policy was sampled, or where only a teacher was, whether what was kept
    needs it; `None` where that is not noted, or differs.
    """
    noted = list(noted)
    modes = {bool((each.get("settings") or {}).get("enable_thinking")) for each in noted if each["step"] == SAMPLED}
    modes = modes or {each.get("kept_as") == "think" for each in noted if each["step"] == TAUGHT}
    return modes.pop() if len(modes) == 1 else None


def relied_on(noted: Any) -> list[dict[str, Any]]:
    """The records of what was read from a file, in which anything may stand."""
    return [record for record in noted if _is_record(record)] if isinstance(noted, list) else []


def lines_of(noted: Any) -> list[str]:
    """The lines of records that were read from a file."""
    return [_line(record) for record in relied_on(noted)]


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
    """Whether it may be relied on: a file's entry and a description are anybody's to write."""
    if not (isinstance(record, dict) and isinstance(record.get("step"), str)):
        return False
    return all(record.get(name) is None or _is(record[name], kind) for name, kind in KINDS.items())


def _is(value: Any, kind: Any) -> bool:
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(_is(each, kind[str]) for each in value.values())
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


# What a record holds where it holds it: a type, or of a mapping that of its values.
KINDS: dict[str, Any] = {
    **dict.fromkeys(("source", "revision", "engines", "dtype", "kept_as", "split"), str),
    **dict.fromkeys(("rows", "candidates", "pairs", "kept", "most_candidates", "bytes"), int),
    "model": {str: str},
    "adapter": {str: str},
    "dropped": {str: int},
    "verdicts": {str: int},
    "settings": {str: object},
    "training": {str: object},
    "keep": list,
}

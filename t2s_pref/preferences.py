"""Preference data of any tool, from a file, the Hub or memory, as pairs of strings: `load_pairs`.

Understood are, for the answers, strings (LLaMA-Factory's alpaca, TRL's standard format), a message (LLaMA-Factory's
sharegpt), a list of messages of which the last counts (TRL's conversational format), and both in a list `output`
(LLaMA-Factory's alpaca of 2023); for the prompt, alpaca's columns, `prompt` as text or messages, `messages` or
`conversations`, and the beginning that both answers have in common. What a message is called is OpenAI's way or
ShareGPT's.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, List, Value
from huggingface_hub import hf_hub_download

from t2s_pref import lineage
from t2s_pref.columns import (
    ADAPTER,
    ALTERNATIVES,
    CHOSEN,
    CHOSEN_FROM,
    DB_ID,
    DIALECT,
    DISTANCE,
    HISTORY,
    INPUT,
    INSTRUCTION,
    OUTPUT,
    POLICY_HASH,
    REJECTED,
    REJECTED_INDEX,
    ROUND,
    SOURCE_INDEX,
    SYSTEM,
    VERDICT,
    each_split,
    one_split,
)
from t2s_pref.errors import UserError
from t2s_pref.load import ALPACA, check_history, find_source, from_hub
from t2s_pref.prompts import row_of
from t2s_pref.records import Origin, lone_surrogate, read_records
from t2s_pref.registry import DATASET_INFO, noted_of, read_info

EXPECTED = "expected objects with the gold SQL as chosen and other SQL as rejected"
A_SIDE = "expected a string, a message with 'content' or 'value', or a list of such messages"
A_PROMPT = "expected instruction and input, prompt, messages or conversations, or answers with their prompt before them"

# What a message is called, and who speaks, in OpenAI's words and in ShareGPT's.
TEXTS, ROLES = ("content", "value"), ("role", "from")
SPEAKERS = {"human": "user", "gpt": "assistant"}
OTHERS = ("user", "system", "tool", "function", "observation")  # who does not answer

TEXT = (INSTRUCTION, INPUT, CHOSEN, REJECTED)
NAMES = (SYSTEM, DB_ID, DIALECT, ADAPTER, POLICY_HASH, CHOSEN_FROM, VERDICT)
NUMBERS = {ROUND: int, SOURCE_INDEX: int, REJECTED_INDEX: int, DISTANCE: float}
TYPES: dict[str, Any] = {
    **dict.fromkeys((*TEXT, *NAMES, OUTPUT), Value("string")),
    HISTORY: List(List(Value("string"))),
    ALTERNATIVES: List(Value("string")),
    **{name: Value("int64" if kind is int else "float64") for name, kind in NUMBERS.items()},
}


def load_pairs(
    source: str | os.PathLike[str] | Dataset | DatasetDict, *, split: str | None = None, revision: str | None = None
) -> Dataset | DatasetDict:
    """Load preference pairs, of this package or of any other tool, as `Dataset` with strings on both sides.

    Args:
        source: a JSON array or JSON lines, a dataset on the Hub (`user/name`; of one that `push_to_hub` made, the
            configuration `alpaca`), or a dataset in memory. The layout is seen from each record: alpaca, sharegpt, TRL
            standard or conversational.
        split (`str`, *optional*): Split of a Hub dataset; without it every split is loaded.
        revision (`str`, *optional*): Branch, tag or commit of a Hub dataset.

    Returns:
        `Dataset`, or `DatasetDict` for one and for a Hub dataset without `split`: `instruction`, `input`, `chosen`,
        `rejected` (`str`), and where the source has them `system`, `db_id`, `dialect`, `output`, `adapter`,
        `policy_hash`, `chosen_from`, `verdict` (`str`), `history`, `alternatives` (lists), `round`, `source_index`,
        `rejected_index` (`int64`) and `distance` (`float64`). A prompt of messages becomes `instruction` (its last
        turn), `system` and `history`. `verify_rejected`, `merge_pairs`, `to_trl`, `save_llamafactory` take the result.

    Raises:
        [`UserError`]: where a record is no such pair, with its place.

    >>> chosen, rejected = ([{"role": "assistant", "content": sql}] for sql in ("SELECT 1", "SELECT 2"))
    >>> prompt = [{"role": "system", "content": "You write SQL."}, {"role": "user", "content": "One?"}]
    >>> load_pairs(Dataset.from_list([{"prompt": prompt, "chosen": chosen, "rejected": rejected}]))[0]
    {'instruction': 'One?', 'input': '', 'chosen': 'SELECT 1', 'rejected': 'SELECT 2', 'system': 'You write SQL.'}
    """
    path = find_source(source, split, revision)
    if path is not None:
        return _pairs(*read_records(path, EXPECTED), noted_of(path))
    whole, noted = source, []
    if isinstance(source, str):
        whole, noted = from_hub(source, split, revision), _noted_on_hub(source, revision)
    return each_split(whole, lambda part: _pairs(*records_of(part, source), [*noted, *lineage.noted_lines(part)]))


def _noted_on_hub(repo_id: str, revision: str | None) -> list[str]:
    """What `push_to_hub` noted of a dataset there; nothing of one that it did not push."""
    with suppress(Exception):  # it is told for people only: whatever is wrong with it, the pairs are there
        info = read_info(Path(hf_hub_download(repo_id, DATASET_INFO, repo_type="dataset", revision=revision)))
        ours = [
            entry for entry in info.values() if entry.get("hf_hub_url") == repo_id and entry.get("subset") == ALPACA
        ]
        return list(dict.fromkeys(line for entry in ours for line in lineage.lines_of(entry.get(lineage.KEY))))
    return []


def holds_pairs(path: str | os.PathLike[str]) -> bool:
    """Whether a file holds preference data, and not supervised rows."""
    path = Path(os.path.expanduser(path))
    records, _ = read_records(path, "expected preference pairs or supervised rows")
    return REJECTED in records[0] or isinstance(records[0].get(OUTPUT), list)


def read_preferences(
    source: str | os.PathLike[str] | Dataset, split: str | None = None, revision: str | None = None
) -> tuple[list[dict[str, Any]], Origin, list[str]]:
    """The records of preference data as they are, where they come from, and what is noted of them."""
    path = find_source(source, split, revision)
    if path is not None:
        return *read_records(path, EXPECTED), noted_of(path)
    part = from_hub(source, split, revision) if isinstance(source, str) else source
    if isinstance(part, DatasetDict) and len(part) != 1:
        name = source if isinstance(source, str) else "The dataset"
        raise UserError(f"{name} has the splits {list(part)}; choose one with split= (--split).")
    part = one_split(next(iter(part.values())) if isinstance(part, DatasetDict) else part)
    return *records_of(part, source), lineage.noted_lines(part)


def records_of(dataset: Dataset, source: Any) -> tuple[list[dict[str, Any]], Origin]:
    """The rows of a dataset, and what to call it."""
    name = source if isinstance(source, str) else "dataset"
    origin = Origin(f"{name} (split {dataset.split})" if dataset.split else name, EXPECTED)
    if not len(dataset):
        raise origin.error(f"holds no records; {EXPECTED}.")
    return list(dataset), origin


def _pairs(records: list[dict[str, Any]], origin: Origin, noted: list[str]) -> Dataset:
    rows = [read_pair(record, number, origin) for number, record in enumerate(records)]
    names = [name for name in TYPES if name in TEXT or any(row.get(name) not in (None, []) for row in rows)]
    features = Features({name: TYPES[name] for name in names})
    pairs = Dataset.from_dict({name: [row.get(name) for row in rows] for name in names}, features=features)
    lineage.add(pairs, noted)
    return pairs


def read_pair(record: Mapping[str, Any], number: int, origin: Origin) -> dict[str, Any]:
    """One record of preference data as a row of `load_pairs`."""
    row: dict[str, Any] = {**read_judged(record, number, origin), **_prompt(record, number, origin)}
    for name in (*NAMES, OUTPUT, *NUMBERS):
        value = record.get(name)
        kind: Any = NUMBERS.get(name, str)
        if name == OUTPUT and not isinstance(value, str):
            continue  # both sides, in one of the layouts
        if isinstance(value, bool) or (
            not isinstance(value, float | int if kind is float else kind) and value is not None
        ):
            raise origin.error(f"column {name!r} is {str(value)[:40]!r}; expected {kind.__name__} or null.", number)
        if name == ROUND and value is not None and not 0 < value < 1 << 31:
            raise origin.error(f"column {name!r} is {value}; rounds are counted from 1.", number)
        if value is not None and name != SYSTEM:
            row[name] = value
    return row


def read_judged(record: Mapping[str, Any], number: int, origin: Origin) -> dict[str, Any]:
    """What a record is judged by: `chosen` and `rejected` as strings, `alternatives`, `db_id`, `dialect`."""
    if half := lone_surrogate(json.dumps(record, ensure_ascii=False, default=str)):
        raise origin.error(f"holds {half!a}, half of a surrogate pair, which is not text.", number)
    sides = _sides(record)
    texts = {side: _text(value) for side, value in sides.items()}
    for side, text in texts.items():
        if text is None:
            found = f"is {str(sides[side])[:40]!r}" if side in record else "is missing"
            raise origin.error(f"column {side!r} {found}; {A_SIDE}.", number)
    for column in (DB_ID, DIALECT):
        if not isinstance(record.get(column), str | None):
            raise origin.error(f"{column!r} is {str(record[column])[:40]!r}; expected a string or null.", number)
    others = record.get(ALTERNATIVES) or []
    if not (isinstance(others, list) and all(isinstance(other, str) for other in others)):
        raise origin.error(f"{ALTERNATIVES!r} is {str(others)[:40]!r}; expected a list of strings.", number)
    return {**texts, ALTERNATIVES: others, DB_ID: record.get(DB_ID), DIALECT: record.get(DIALECT)}


def _sides(record: Mapping[str, Any]) -> dict[str, Any]:
    both = record.get(OUTPUT)
    if CHOSEN not in record and isinstance(both, list) and len(both) == 2:
        return dict(zip((CHOSEN, REJECTED), both, strict=True))
    return {side: record.get(side) for side in (CHOSEN, REJECTED)}


def _text(value: Any) -> str | None:
    """The text of an answer, however it is wrapped; `None` where it is not one."""
    if isinstance(value, list):  # a conversation; of several answers as strings, none is the one
        value = value[-1] if value and isinstance(value[-1], dict) else None
    if isinstance(value, dict):
        value = next((value[name] for name in TEXTS if name in value), None) if _speaker(value) not in OTHERS else None
    return value if isinstance(value, str) else None


def _speaker(turn: Mapping[str, Any]) -> Any:
    role = next((turn[name] for name in ROLES if name in turn), None)
    return SPEAKERS.get(role, role) if isinstance(role, str) else role


def _prompt(record: Mapping[str, Any], number: int, origin: Origin) -> dict[str, Any]:
    """Instruction, input, system message and history."""
    sides = list(_sides(record).values())
    turns = next((record[name] for name in ("prompt", "messages", "conversations") if record.get(name)), None)
    before = sides[0][:-1] if all(isinstance(side, list) and side[:-1] == sides[0][:-1] for side in sides) else []
    if isinstance(record.get(INSTRUCTION), str) or (isinstance(record.get(INPUT), str) and turns is None):
        row = {INSTRUCTION: record.get(INSTRUCTION) or "", INPUT: record.get(INPUT) or ""}
        row |= {SYSTEM: record.get(SYSTEM), HISTORY: record.get(HISTORY)}
        for name in (INSTRUCTION, INPUT, SYSTEM):
            if not isinstance(row[name], str | None):
                raise origin.error(f"column {name!r} is {str(row[name])[:40]!r}; expected a string.", number)
        check_history([row[HISTORY]], lambda problem, _: origin.error(problem, number))
    elif before and not (isinstance(turns, list) and len(turns) > len(before)):
        row = _from_messages(before)
    elif isinstance(turns, str):
        row = {INSTRUCTION: turns, INPUT: ""}
    else:
        row = _from_messages(turns)
    if row is None:
        shown = f"has a prompt that is {str(turns)[:40]!r}" if turns is not None else "has no prompt"
        raise origin.error(f"{shown}; {A_PROMPT}, in turns of user and assistant.", number)
    if isinstance(record.get(SYSTEM), str) and not row.get(SYSTEM):
        row[SYSTEM] = record[SYSTEM]
    return {name: value for name, value in row.items() if value or name in TEXT}


def _from_messages(turns: Any) -> dict[str, Any] | None:
    """Messages as columns, `None` where they do not end in a user's turn after pairs of user's and assistant's."""
    if not (isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns)):
        return None
    said = [(_speaker(turn), next((turn[name] for name in TEXTS if name in turn), None)) for turn in turns]
    return row_of(said) if all(isinstance(text, str) for _, text in said) else None

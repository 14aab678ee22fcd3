"""On-policy training goes in rounds: sample, prove, train, sample again with the new adapter. Their pairs merge here.

Each round samples with seeds of its own (`SamplingSettings.round`), and its pairs carry the round, the adapter's name
and the hash of the policy that wrote them. Training itself is another program's.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset, Features, List, Value

from t2s_pref import lineage
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
    STRINGS,
    SYSTEM,
    VERDICT,
    check_columns,
    one_split,
)
from t2s_pref.errors import UserError
from t2s_pref.formats import FORMATS, format_of
from t2s_pref.load import check_history
from t2s_pref.prompts import messages
from t2s_pref.sql import check_dialect, normalize_sql

# What a pair carries from round to round; the first four are in every pair.
TEXT = (INSTRUCTION, INPUT, CHOSEN, REJECTED, OUTPUT, SYSTEM, DB_ID, VERDICT, ADAPTER, POLICY_HASH, CHOSEN_FROM)
CARRIED = {
    **{name: Value("string") for name in TEXT},
    HISTORY: List(List(Value("string"))),
    ROUND: Value("int64"),
}


def merge_pairs(*rounds: Dataset, dialect: str = "sqlite") -> Dataset:
    """The preference pairs of several rounds in one dataset, each once: the first round's, then what the next add.

    Two pairs are the same where prompt, chosen and rejected answer are: their SQL after normalisation, their reasoning
    word for word. Pairs that name no round are taken for the first's.

    Args:
        rounds: preference pairs with `instruction`, `input`, `chosen` and `rejected` (`str`), as `explode_rejected` and
            `load_pairs` make them. Of their other columns, `output`, `system`, `history`, `db_id`, `verdict`, `round`,
            `adapter`, `policy_hash` and `chosen_from` are kept.
        dialect: SQL dialect of the answers, by its sqlglot name.

    Raises:
        [`UserError`]: on missing columns, on answers that are no text, and on rows that are not exploded yet.

    >>> pair = {"instruction": "", "input": "How many?", "chosen": "SELECT 1", "rejected": "SELECT 2"}
    >>> first = Dataset.from_list([pair])
    >>> second = Dataset.from_list([{**pair, "rejected": "select 2"}, {**pair, "rejected": "SELECT 3"}])
    >>> merge_pairs(first, second.add_column("round", [2, 2]))["rejected"][:]
    ['SELECT 2', 'SELECT 3']
    """
    if not rounds:
        raise UserError("merge_pairs got no pairs; it takes those of one round or more.")
    check_dialect(dialect)
    seen: set[str] = set()
    merged: list[dict[str, Any]] = []
    names = {name: None for part in rounds for name in CARRIED if name in one_split(part).column_names}
    for part in rounds:
        for row in _pairs(one_split(part)):
            key = json.dumps([messages(row), *(_same(row[side], dialect) for side in (CHOSEN, REJECTED))])
            if key not in seen:
                seen.add(key)
                merged.append({name: _value(name, row) for name in names})
    features = Features({name: CARRIED[name] for name in CARRIED if name in names})
    result = Dataset.from_list(merged, features=features)
    for part in rounds:
        lineage.add(result, part.info.description.splitlines())
    return result


def _pairs(part: Dataset) -> Iterator[dict[str, Any]]:
    way_out = "explode_rejected makes one row a pair, with both sides as strings"
    check_columns(part, (INSTRUCTION, INPUT, CHOSEN, REJECTED), f"{way_out}.")
    for name in CARRIED:
        feature = part.features.get(name, Value("null"))
        allowed = (Value("int64"), Value("int32")) if name == ROUND else STRINGS
        if name != HISTORY and feature not in (Value("null"), *allowed):
            raise UserError(f"Column {name!r} is {feature}; expected {allowed[0]}: {way_out}.")
    for place, row in enumerate(part.select_columns([name for name in CARRIED if name in part.column_names])):
        check_history([row.get(HISTORY)], lambda problem, _, place=place: UserError(f"Row {place}: {problem}"))
        for side in (CHOSEN, REJECTED):
            if not row[side]:
                raise UserError(f"Row {place}: column {side!r} is empty; {way_out}.")
        yield row


def _same(answer: str, dialect: str) -> list[str]:
    """What two equal answers have in common."""
    parts = FORMATS[format_of(answer)].read(answer)
    return [parts.reasoning, normalize_sql(parts.sql, dialect)] if parts else [normalize_sql(answer, dialect)]


def _value(name: str, row: Mapping[str, Any]) -> Any:
    if name in (HISTORY, ROUND):
        return row.get(name) or ([] if name == HISTORY else 1)
    return row.get(name) or ""

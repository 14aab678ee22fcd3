"""`clean_preferences`: a preference file of any tool, without the pairs whose rejected side is not proven wrong.

Understood are `chosen` and `rejected` as strings (LLaMA-Factory's alpaca, TRL's standard format), as a message
(LLaMA-Factory's sharegpt) or a list of messages (TRL's conversational format, of which the last counts), and `output`
as a list of both (LLaMA-Factory's alpaca of 2023). A kept record is written as it was read.
"""

import json
import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value

from t2s_pref.columns import (
    ALTERNATIVES,
    CHOSEN,
    DB_ID,
    DIALECT,
    GOLD_DETAIL,
    GOLD_VERDICT,
    INSTRUCTION,
    OUTPUT,
    REJECTED,
    VERDICT,
    VERDICT_DETAIL,
)
from t2s_pref.databases import DatabasesLike
from t2s_pref.errors import UserError
from t2s_pref.files import atomic_write
from t2s_pref.llamafactory import check_destination, register
from t2s_pref.pairs import check_verdicts
from t2s_pref.records import Origin, lone_surrogate, read_records, write_records
from t2s_pref.settings import GOLD_TIMEOUT, TIMEOUT
from t2s_pref.verdicts import GOLD_VERDICTS, RIGHT, VERDICTS, WRONG
from t2s_pref.verify import verify_rejected

TEXTS = ("content", "value")  # where a message has its text
EXPECTED = "expected objects with the gold SQL as chosen and other SQL as rejected"
A_SIDE = "expected a string, a message with 'content' or 'value', or a list of such messages"


@dataclass(frozen=True)
class Cleaning:
    """What became of a file's pairs; prints as a table. In `poisoned` pairs the rejected SQL is right."""

    pairs: int
    kept: int
    poisoned: int
    verdicts: dict[str, int]
    golds: dict[str, int]
    dropped: tuple[dict[str, Any], ...]
    engine: str

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return dict(vars(self))

    def __str__(self) -> str:
        table = [("pairs", self.pairs), ("kept: proven wrong, or asked for", self.kept)]
        table += [("poisoned: the rejected SQL is right", self.poisoned)]
        table += [("not proven either way", self.pairs - self.kept - self.poisoned)]
        table += [("verdicts", self.pairs), *((f"  {verdict}", count) for verdict, count in self.verdicts.items())]
        table += [("golds", self.pairs), *((f"  {verdict}", count) for verdict, count in self.golds.items())]
        lines = [f"{label:<38}{count:>8,}{100 * count / self.pairs:>8.1f} %" for label, count in table]
        return "\n".join([self.engine, *lines])


def clean_preferences(
    data: str | os.PathLike[str],
    databases: DatabasesLike,
    output: str | os.PathLike[str],
    *,
    dataset_name: str | None = None,
    keep: Collection[str] = WRONG,
    timeout: float = TIMEOUT,
    gold_timeout: float = GOLD_TIMEOUT,
    database_version: str | None = None,
    workers: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Cleaning:
    """Judge each pair of a preference file by running both sides, and write those whose rejected side is proven wrong.

    Args:
        data: JSON array or JSON lines; each record has `chosen` (taken for the gold) and `rejected`, and where there
            are several databases `db_id`; optional are `alternatives` and `dialect`.
        databases, timeout, gold_timeout, database_version, workers, cache_dir: as for `verify_rejected`.
        output: file of the records that are kept, `.json` or `.jsonl`, not written where there are none. Alpaca pairs
            are entered into the `dataset_info.json` beside it, as `dataset_name` or by the file's stem.
        keep: verdicts whose pairs are kept.

    Returns:
        [`Cleaning`], with every pair that was dropped and why.

    Raises:
        [`UserError`]: on a record without both sides, on an unknown verdict, on what `verify_rejected` refuses.
    """
    keep = check_verdicts(keep)
    path, name = check_destination(output, dataset_name)
    source = Path(os.path.expanduser(data))
    if path.resolve() == source.resolve():
        raise UserError(f"The output {str(output)!r} is the data, which would be overwritten; name another file.")
    records, origin = read_records(source, EXPECTED)
    pairs = Dataset.from_list([_pair(record, number, origin) for number, record in enumerate(records)], FEATURES)
    judged = verify_rejected(
        pairs,
        databases,
        timeout=timeout,
        gold_timeout=gold_timeout,
        database_version=database_version,
        workers=workers,
        cache_dir=cache_dir,
    )
    kept: list[dict[str, Any]] = []
    dropped: list[dict[str, Any]] = []
    for number, (record, row) in enumerate(zip(records, judged, strict=True)):
        if row[VERDICT] in keep:
            kept.append(record)
        else:
            dropped.append({"record": number, **{column: row[column] for column in REPORTED}})
    if kept:
        with atomic_write(path) as file:
            write_records(file, kept, lines=path.suffix == ".jsonl")
        if all(INSTRUCTION in each and isinstance(each.get(REJECTED), str) for each in kept):
            register(path, name, sorted({column for each in kept for column in each}))
    found, golds = Counter(judged[VERDICT]), Counter(judged[GOLD_VERDICT])
    return Cleaning(
        pairs=len(records),
        kept=len(kept),
        poisoned=sum(row["verdict"] in RIGHT for row in dropped),
        verdicts={verdict: found[verdict] for verdict in VERDICTS if found[verdict]},
        golds={verdict: golds[verdict] for verdict in GOLD_VERDICTS if golds[verdict]},
        dropped=tuple(dropped),
        engine=judged.info.description,
    )


FEATURES = Features(
    {
        CHOSEN: Value("string"),
        REJECTED: Value("string"),
        ALTERNATIVES: List(Value("string")),
        DB_ID: Value("string"),
        DIALECT: Value("string"),
    }
)
REPORTED = (DB_ID, VERDICT, VERDICT_DETAIL, GOLD_VERDICT, GOLD_DETAIL, CHOSEN, REJECTED)


def _pair(record: dict[str, Any], number: int, origin: Origin) -> dict[str, Any]:
    if half := lone_surrogate(json.dumps(record, ensure_ascii=False)):
        raise origin.error(f"holds {half!a}, half of a surrogate pair, which is not text.", number)
    both = record.get(OUTPUT)
    if CHOSEN not in record and isinstance(both, list) and len(both) == 2:
        sides = dict(zip((CHOSEN, REJECTED), both, strict=True))
    else:
        sides = {side: record.get(side) for side in (CHOSEN, REJECTED)}
    texts = {side: _text(value) for side, value in sides.items()}
    for side, text in texts.items():
        if text is None:
            found = f"is {str(sides[side])[:40]!r}" if side in record else "is missing"
            raise origin.error(f"{side!r} {found}; {A_SIDE}.", number)
    for column in (DB_ID, DIALECT):
        if not isinstance(record.get(column), str | None):
            raise origin.error(f"{column!r} is {str(record[column])[:40]!r}; expected a string or null.", number)
    others = record.get(ALTERNATIVES) or []
    if not (isinstance(others, list) and all(isinstance(other, str) for other in others)):
        raise origin.error(f"{ALTERNATIVES!r} is {str(others)[:40]!r}; expected a list of strings.", number)
    return {**texts, ALTERNATIVES: others, DB_ID: record.get(DB_ID), DIALECT: record.get(DIALECT)}


def _text(value: Any) -> str | None:
    """The text of an answer, however it is wrapped; `None` where it is not one."""
    if isinstance(value, list):  # a conversation; of several answers as strings, none is the one
        value = value[-1] if value and isinstance(value[-1], dict) else None
    if isinstance(value, dict):
        value = next((value[name] for name in TEXTS if name in value), None)
    return value if isinstance(value, str) else None

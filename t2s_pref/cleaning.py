"""`clean_preferences`: a preference file of any tool, without the pairs whose rejected side is not proven wrong.

Any layout that `t2s_pref.preferences` reads will do. A kept record is written as it was read.
"""

import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, List, Value

from t2s_pref import lineage
from t2s_pref.columns import (
    ALTERNATIVES,
    CHOSEN,
    DB_ID,
    DIALECT,
    GOLD_DETAIL,
    GOLD_VERDICT,
    INSTRUCTION,
    REJECTED,
    VERDICT,
    VERDICT_DETAIL,
)
from t2s_pref.databases import DatabasesLike
from t2s_pref.errors import UserError
from t2s_pref.files import atomic_write
from t2s_pref.llamafactory import check_destination
from t2s_pref.pairs import check_verdicts
from t2s_pref.preferences import read_judged, read_preferences
from t2s_pref.records import write_records
from t2s_pref.registry import entry_of, register
from t2s_pref.settings import GOLD_TIMEOUT, TIMEOUT
from t2s_pref.verdicts import GOLD_VERDICTS, RIGHT, VERDICTS, WRONG
from t2s_pref.verify import verify_rejected


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
    data: str | os.PathLike[str] | Dataset | DatasetDict,
    databases: DatabasesLike,
    output: str | os.PathLike[str],
    *,
    split: str | None = None,
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
        data: JSON array, JSON lines, a dataset on the Hub or in memory; each record has `chosen` (taken for the gold)
            and `rejected`, and where there are several databases `db_id`; optional are `alternatives` and `dialect`.
        split: the split of a dataset on the Hub that has several.
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
    if isinstance(data, str | os.PathLike) and path.resolve() == Path(os.path.expanduser(data)).resolve():
        raise UserError(f"The output {str(output)!r} is the data, which would be overwritten; name another file.")
    records, origin, noted = read_preferences(data, split)
    pairs = Dataset.from_list([read_judged(record, number, origin) for number, record in enumerate(records)], FEATURES)
    lineage.add(pairs, noted)
    lineage.forget(pairs, lineage.PROVEN, lineage.PAIRED)
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
    found, golds = Counter(judged[VERDICT]), Counter(judged[GOLD_VERDICT])
    verdicts = {verdict: found[verdict] for verdict in VERDICTS if found[verdict]}
    lost = {verdict: count for verdict, count in verdicts.items() if verdict not in keep}
    counts = {"rows": len(records), "candidates": len(records), "pairs": len(kept)}
    lineage.note(judged, step=lineage.PAIRED, **counts, dropped=lost, verdicts=verdicts, keep=list(keep))
    if kept:
        columns = sorted({column for each in kept for column in each})
        with atomic_write(path) as file:
            write_records(file, kept, lines=path.suffix == ".jsonl")
        if all(INSTRUCTION in each and isinstance(each.get(REJECTED), str) for each in kept):
            register(path, name, entry_of(columns), lineage.records(judged))
    return Cleaning(
        pairs=len(records),
        kept=len(kept),
        poisoned=sum(row["verdict"] in RIGHT for row in dropped),
        verdicts=verdicts,
        golds={verdict: golds[verdict] for verdict in GOLD_VERDICTS if golds[verdict]},
        dropped=tuple(dropped),
        engine="\n".join(lineage.told(judged)),
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

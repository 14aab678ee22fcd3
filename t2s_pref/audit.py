"""`audit_golds`: which golds fail, take too long, return nothing, or return what the data do not determine."""

import os
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset

from t2s_pref.columns import OUTPUT, SOURCE_INDEX, check_columns, check_strings, one_split
from t2s_pref.databases import DatabasesLike
from t2s_pref.pool import Bounds
from t2s_pref.settings import GOLD_TIMEOUT
from t2s_pref.verdicts import GOLD_OK, GOLD_VERDICTS
from t2s_pref.verify import open_verifier, question

SHOWN_SQL = 100  # characters of a statement in the table


@dataclass(frozen=True)
class Finding:
    """One gold that is not as it should be. `row` is the row's position, `source_index` its place in the source."""

    row: int
    source_index: int
    db_id: str
    verdict: str
    detail: str
    sql: str


@dataclass(frozen=True)
class Audit:
    """What the golds of a dataset are; prints as a table. `suspects` run, but read a misspelt name as a string."""

    rows: int
    verdicts: dict[str, int]
    findings: tuple[Finding, ...]
    suspects: tuple[Finding, ...]
    engine: str

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [self.engine, f"{'rows':<22}{self.rows:>8,}"]
        for verdict, count in self.verdicts.items():
            lines.append(f"  {verdict:<20}{count:>8,}{100 * count / self.rows:>8.1f} %")
        lines += _listed("golds to look at", self.findings) + _listed("golds that may be misspelt", self.suspects)
        return "\n".join(lines)


def _listed(title: str, findings: tuple[Finding, ...]) -> list[str]:
    lines = [f"\n{title}: {len(findings):,}"] if findings else []
    for each in findings:
        sql = " ".join(each.sql.split())
        shown = sql if len(sql) <= SHOWN_SQL else f"{sql[: SHOWN_SQL - 3]}..."
        said = each.detail or "no rows"
        lines.append(f"  row {each.source_index} ({each.db_id or 'no db_id'}): {each.verdict}: {said}\n    {shown}")
    return lines


def audit_golds(
    dataset: Dataset,
    databases: DatabasesLike,
    *,
    gold_timeout: float = GOLD_TIMEOUT,
    database_version: str | None = None,
    workers: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Audit:
    """Run every gold, and say which of them cannot prove anything.

    Args:
        dataset: columns read: `output` (`str`, the gold), and where present `alternatives` (`list[str]`), `db_id`,
            `dialect` (`str`) and `source_index` (`int64`).
        databases, gold_timeout, database_version, workers, cache_dir: as for `verify_rejected`.

    Returns:
        [`Audit`]: counts by verdict (`ok`, `gold_empty`, `gold_error`, `gold_timeout`, `gold_truncated`,
        `gold_nondeterministic`, `no_database`), and every gold that is not `ok` with the engine's message.

    Raises:
        [`UserError`]: on missing columns, and where no database is found at all.

    >>> rows = Dataset.from_dict({"db_id": ["library"] * 2, "output": ["SELECT 1", "SELECT titel FROM book"]})
    >>> from t2s_pref import demo_files
    >>> audit_golds(rows, demo_files().databases).verdicts
    {'ok': 1, 'gold_error': 1}
    """
    rows = one_split(dataset)
    check_columns(rows, (OUTPUT,), "load_sft makes it from alpaca files.")
    check_strings(rows, OUTPUT)
    with open_verifier(
        rows, databases, Bounds(gold_timeout=gold_timeout), database_version, workers, cache_dir
    ) as judge:
        asked = [question(row, OUTPUT, judge.databases) for row in rows]
        judge.judge(((each, ()) for each in asked), desc="Running golds")
        found = [judge.gold(each) for each in asked]
        engine = judge.engines()
    indices = rows[SOURCE_INDEX][:] if SOURCE_INDEX in rows.column_names else range(len(rows))
    listed = [
        Finding(row, index, each.db_id or "", of.verdict, of.detail, ";\n".join(each.golds))
        for row, (index, each, of) in enumerate(zip(indices, asked, found, strict=True))
    ]
    counts = Counter(of.verdict for of in found)
    return Audit(
        rows=len(rows),
        verdicts={verdict: counts[verdict] for verdict in GOLD_VERDICTS if counts[verdict]},
        findings=tuple(each for each in listed if each.verdict != GOLD_OK),
        suspects=tuple(each for each in listed if each.verdict == GOLD_OK and each.detail),
        engine=engine,
    )

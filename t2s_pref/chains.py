"""What is done with a teacher's chains of thought: rows to train on, the chosen side of pairs, and their counts."""

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict, Features, List, Value

from t2s_pref import lineage
from t2s_pref.cache import cached_map
from t2s_pref.columns import (
    ALTERNATIVES,
    COT,
    COT_STATUS,
    DB_ID,
    DIALECT,
    OUTPUT,
    REJECTED,
    REQUIRED,
    VERDICT,
    check_columns,
    check_string_lists,
    each_split,
)
from t2s_pref.cot import COT_VERSION, KEPT, WORDS
from t2s_pref.databases import DatabasesLike
from t2s_pref.errors import UserError
from t2s_pref.formats import FORMATS, Reasoned, check_reasoning, format_of
from t2s_pref.pool import Bounds
from t2s_pref.prompts import asked, messages
from t2s_pref.settings import GOLD_TIMEOUT, TIMEOUT
from t2s_pref.tally import CAUSES
from t2s_pref.verdicts import GOLD_VERDICTS, RIGHT
from t2s_pref.verify import open_verifier, verify_with

logger = logging.getLogger(__name__)


def explode_cot(
    dataset: Dataset | DatasetDict,
    max_per_row: int | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset | DatasetDict:
    """One supervised row for each chain of thought that was kept: `save_llamafactory` writes them.

    Args:
        dataset: what `generate_cot` returned. Chains of thought in the format `fenced` make `input` end in the request
            for it, as in `generate_rejected`.
        max_per_row: how many chains of thought of one row; by default all.

    Returns:
        The source columns of each row, once a chain of thought, which is `output` now.

    Raises:
        [`UserError`]: on missing columns, and on a `max_per_row` below 1.

    >>> from datasets import Dataset
    >>> text = "<think>One.</think>SELECT 1"
    >>> rows = {"instruction": [""], "input": ["How many?"], "output": ["SELECT 1"], "cot": [[text]]}
    >>> explode_cot(Dataset.from_dict(rows))[0]
    {'instruction': '', 'input': 'How many?', 'output': '<think>One.</think>SELECT 1'}
    """
    if max_per_row is not None and (not isinstance(max_per_row, int) or max_per_row < 1):
        raise UserError(f"max_per_row is {max_per_row!r}; it must be 1 or more.")

    def explode(rows: dict[str, list]) -> dict[str, list]:
        each = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        done = [
            {**asked(row, FORMATS[format_of(text)].request), OUTPUT: text}
            for row in each
            for text in (row[COT] or [])[:max_per_row]
        ]
        return {name: [row[name] for row in done] for name in rows if name not in (COT, COT_STATUS)}

    def explode_split(part: Dataset) -> Dataset:
        check_columns(part, (*REQUIRED, COT), "generate_cot adds 'cot'.")
        check_string_lists(part, COT)
        features = {name: feature for name, feature in part.features.items() if name not in (COT, COT_STATUS)}
        rows = cached_map(
            part,
            explode,
            step="cot_rows",
            key={"version": COT_VERSION, "max_per_row": max_per_row},
            features=Features(features),
            remove_columns=[name for name in (COT, COT_STATUS) if name in part.column_names],
            cache_dir=cache_dir,
            map_kwargs={"desc": "One row a chain of thought"},
        )
        if COT_STATUS in part.column_names:
            counts = cot_summary(part)
            found = {"rows": counts.rows, "candidates": counts.samples, "kept": counts.kept, "dropped": counts.drops}
            lineage.note(rows, step=lineage.EXPLAINED, **found, max_per_row=max_per_row)
        return rows

    return each_split(dataset, explode_split)


def attach_cot(
    dataset: Dataset,
    kept: Dataset,
    answer_format: str,
    databases: DatabasesLike,
    *,
    timeout: float = TIMEOUT,
    gold_timeout: float = GOLD_TIMEOUT,
    database_version: str | None = None,
    workers: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Add `cot`: for each row, the chains of thought that `kept` has for its prompt, as far as they are proven right.

    Args:
        dataset: columns read: `instruction`, `input`, `output`, and where present `system`, `history` and what
            `verify_rejected` reads.
        kept: supervised rows with chains of thought in `output`, as `explode_cot` makes them. Their prompts may ask
            for the format or not. Who wrote them for which gold is not known here, so their SQL is run like any other.
        answer_format: the format that they must be in.
        databases, timeout, gold_timeout, database_version, workers, cache_dir: as for `verify_rejected`.

    Raises:
        [`UserError`]: on an answer that is not of this format, and where no prompt is found in both.
    """
    style = check_reasoning(answer_format)
    of: dict[str, dict[Reasoned, None]] = {}
    for place, row in enumerate(kept):
        if (parts := style.read(row[OUTPUT] or "")) is None:
            shown = " ".join((row[OUTPUT] or "").split())[:60]
            raise UserError(f"Chain of thought {place} is not in the format {answer_format!r}: {shown!r}.")
        of.setdefault(_prompt(row), {})[parts] = None
    found = [list(of.get(_prompt(row), ())) for row in dataset]
    if not any(found):
        raise UserError("No chain of thought is for a prompt of these rows; both must come from the same SFT data.")
    texts = List(Value("string"))
    used = [name for name in (OUTPUT, ALTERNATIVES, DB_ID, DIALECT) if name in dataset.column_names]
    asked_for = dataset.select_columns(used).add_column(
        REJECTED, [[each.sql for each in of] for of in found], feature=texts
    )
    with open_verifier(
        dataset, databases, Bounds(timeout, gold_timeout), database_version, workers, cache_dir
    ) as judge:
        verdicts = verify_with(judge, asked_for, cache_dir, {"desc": "Proving chains of thought"})[VERDICT][:]
    right = [
        [style.write(*each) for each, verdict in zip(of, of_row, strict=True) if verdict in RIGHT]
        for of, of_row in zip(found, verdicts, strict=True)
    ]
    if lost := sum(map(len, found)) - sum(map(len, right)):
        logger.warning("%d of %d chains of thought are not proven right and left out.", lost, sum(map(len, found)))
    names = [name for name in dataset.column_names if name != COT]
    result = dataset.select_columns(names).add_column(COT, right, feature=texts)
    lineage.add(result, lineage.noted_lines(kept))
    return result


def _prompt(row: Mapping[str, Any]) -> str:
    return json.dumps(messages(asked(row, "")))


@dataclass(frozen=True)
class CotSummary:
    """What became of a teacher's samples, by cause, and of rows whose gold proves nothing; prints as a table."""

    rows: int
    samples: int
    kept: int
    drops: dict[str, int]
    not_asked: dict[str, int]
    rows_without: int
    characters: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        def share(count: int, of: int) -> str:
            return f"{100 * count / of:.1f} %" if of else ""

        table = [("rows", self.rows, ""), ("samples", self.samples, "")]
        table.append(("kept chains of thought", self.kept, share(self.kept, self.samples)))
        for cause, count in self.drops.items():
            words = WORDS.get(cause) or CAUSES[cause][0]
            table.append((f"dropped: {words}", count, share(count, self.samples)))
        for verdict, count in self.not_asked.items():
            table.append((f"rows not asked for: {CAUSES[verdict][0]}", count, share(count, self.rows)))
        table.append(("rows without any", self.rows_without, share(self.rows_without, self.rows)))
        table.append(("characters of a kept one", round(self.characters / max(1, self.kept)), ""))
        wide = max(len(label) for label, _, _ in table)
        lines = [f"{label:<{wide}}  {count:>10,}  {part:>7}".rstrip() for label, count, part in table]
        return "\n".join([*self.notes, *lines])


def cot_summary(dataset: Dataset | DatasetDict) -> CotSummary:
    """Count what became of the samples of `generate_cot`; columns read: `cot`, `cot_status`."""
    rows: list[tuple[list[str], list[str]]] = []
    notes: dict[str, None] = {}

    def read(part: Dataset) -> Dataset:
        check_columns(part, (COT, COT_STATUS), "generate_cot adds them.")
        rows.extend(zip(part[COT][:], part[COT_STATUS][:], strict=True))
        notes.update(dict.fromkeys(lineage.told(part)))
        return part

    each_split(dataset, read)
    counts = Counter(status for _, statuses in rows for status in statuses)
    not_asked = {verdict: counts.pop(verdict) for verdict in GOLD_VERDICTS if verdict in counts}
    return CotSummary(
        rows=len(rows),
        samples=counts.total(),
        kept=counts.pop(KEPT, 0),
        drops=dict(counts.most_common()),
        not_asked=not_asked,
        rows_without=sum(not kept for kept, _ in rows),
        characters=sum(len(text) for kept, _ in rows for text in kept),
        notes=tuple(notes),
    )

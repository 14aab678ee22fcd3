"""From a list of rejects a row to one preference pair a row, with every drop counted by its cause."""

import os
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from datasets import Dataset, DatasetDict, Features, List, Value

from t2s_pref.cache import cached_map
from t2s_pref.columns import (
    CHOSEN,
    DIALECT,
    OUTPUT,
    RAW,
    RAW_ANSWER,
    REJECTED,
    REJECTED_INDEX,
    SAMPLED,
    SECONDS,
    STATUS,
    TOKENS,
    check_columns,
    each_split,
)
from t2s_pref.errors import UserError
from t2s_pref.settings import DEDUPS
from t2s_pref.sql import check_dialect, normalize_sql

# Raise it when the same rows give other pairs: results of older code are then not served.
PAIRS_VERSION = 1

# Why a reject is not kept; the empty string where it is.
KEPT = ""
EMPTY = "empty"
SAME_AS_GOLD = "same_as_gold"
DUPLICATE = "duplicate"

DROP = "drop_cause"

STRINGS = (Value("string"), Value("large_string"))


def explode_rejected(
    dataset: Dataset | DatasetDict,
    dedup: str = "none",
    dialect: str = "sqlite",
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    **map_kwargs: Any,
) -> Dataset | DatasetDict:
    """One preference pair a row from each row's list of rejects.

    A reject that equals the gold after normalisation, or is empty, is never kept, whatever `dedup`.

    Args:
        dataset: columns read: `output` (`str`, the gold), `rejected` (`list[str]`), and where present `dialect` (`str`,
            the sqlglot name of the row's SQL dialect) and what `generate_rejected` notes a candidate.
        dedup: which rejects of one row count as one: `none`, `exact` (after strip) or `normalized` (by sqlglot: case,
            spacing, comments).
        dialect: SQL dialect of rows without one of their own.
        **map_kwargs: `desc`, `writer_batch_size` and `load_from_cache_file` of `Dataset.map`.

    Returns:
        The source columns of each row, once a kept reject, with `chosen` (`str`, the gold), `rejected` (`str`),
        `rejected_index` (`int64`, its place in the list) and, where kept, `raw_answer` (`str`, the whole answer). What
        sampling noted a candidate (`candidate_status`, `generated_tokens`, `generation_seconds`) is left out.

    Raises:
        [`UserError`]: on an unknown `dedup` or `dialect`, on missing columns, on `num_proc`.

    >>> from datasets import Dataset
    >>> rows = Dataset.from_dict({"output": ["SELECT 1"], "rejected": [["SELECT 2", "select 1;", "SELECT  2"]]})
    >>> explode_rejected(rows, dedup="normalized")[:]
    {'output': ['SELECT 1'], 'rejected': ['SELECT 2'], 'chosen': ['SELECT 1'], 'rejected_index': [0]}
    """

    def explode(part: Dataset) -> Dataset:
        marked = mark_drops(part, dedup, dialect, cache_dir=cache_dir, **map_kwargs)
        features = {name: feature for name, feature in marked.features.items() if name not in (*NOTES, RAW)}
        features |= {CHOSEN: Value("string"), REJECTED: Value("string"), REJECTED_INDEX: Value("int64")}
        if RAW in marked.column_names:
            features |= {RAW_ANSWER: Value("string")}
        return cached_map(
            marked,
            _explode,
            step="pairs",
            key={"version": PAIRS_VERSION},
            features=Features(features),
            remove_columns=[name for name in marked.column_names if name not in features],
            cache_dir=cache_dir,
            map_kwargs=dict(map_kwargs),
        )

    return each_split(dataset, explode)


def mark_drops(
    dataset: Dataset,
    dedup: str,
    dialect: str,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    **map_kwargs: Any,
) -> Dataset:
    """Add `drop_cause` (`list[str]`, one a reject): why it is not kept, or `""` where it is."""
    if dedup not in DEDUPS:
        raise UserError(f"dedup is {dedup!r}; it must be one of {', '.join(DEDUPS)}.")
    check_dialect(dialect)
    check_columns(dataset, (OUTPUT, REJECTED), "generate_rejected adds 'rejected', load_sft makes the others.")
    feature = dataset.features[REJECTED]
    if feature in STRINGS:
        raise UserError("Column 'rejected' holds one reject a row: these are pairs already; explode comes before.")
    inner = getattr(feature, "feature", feature)  # of a List or a LargeList
    if inner not in (Value("null"), *STRINGS):  # null is what lists that are all empty, or absent, are taken for
        raise UserError(f"Column 'rejected' is {feature}; expected a list of strings, as generate_rejected makes it.")
    if dataset.features[OUTPUT] not in STRINGS:
        raise UserError(f"Column 'output' is {dataset.features[OUTPUT]}; expected strings, the gold SQL.")
    if DIALECT in dataset.column_names:
        for named in set(dataset.unique(DIALECT)) - {None, ""}:
            check_dialect(named)

    def mark(rows: dict[str, list]) -> dict[str, list]:
        dialects = rows.get(DIALECT) or [None] * len(rows[OUTPUT])
        return {
            DROP: [
                drop_causes(gold or "", rejects or [], dedup, own or dialect)
                for gold, rejects, own in zip(rows[OUTPUT], rows[REJECTED], dialects, strict=True)
            ]
        }

    return cached_map(
        dataset,
        mark,
        step="marked",
        key={"version": PAIRS_VERSION, "dedup": dedup, "dialect": dialect},
        features=Features({**dataset.features, REJECTED: List(Value("string")), DROP: List(Value("string"))}),
        cache_dir=cache_dir,
        map_kwargs={"desc": "Comparing with the gold", **map_kwargs},
    )


def drop_causes(gold: str, rejects: Sequence[str], dedup: str, dialect: str) -> list[str]:
    """Why each reject of one row is not kept, `""` where it is.

    >>> drop_causes("SELECT 1", ["SELECT 2", " select 1 ;", "", "SELECT 2"], "exact", "sqlite")
    ['', 'same_as_gold', 'empty', 'duplicate']
    """
    causes = []
    seen: set[str] = set()
    for reject in rejects:
        text = (reject or "").strip()
        same = {"none": None, "exact": text, "normalized": normalize_sql(text, dialect)}[dedup]
        if not text.rstrip("; \n\t"):
            causes.append(EMPTY)
        elif text == gold.strip() or normalize_sql(text, dialect) == normalize_sql(gold, dialect):
            causes.append(SAME_AS_GOLD)
        elif same in seen:
            causes.append(DUPLICATE)
        else:
            causes.append(KEPT)
            if same is not None:
                seen.add(same)
    return causes


# What belongs to a candidate or a run and not to a pair.
NOTES = (STATUS, TOKENS, SECONDS, DROP)


def _explode(rows: dict[str, list]) -> dict[str, list]:
    count = len(rows[OUTPUT])
    kept = [(row, place) for row in range(count) for place, cause in enumerate(rows[DROP][row]) if cause == KEPT]
    pairs = {name: [values[row] for row, _ in kept] for name, values in rows.items() if name not in (*NOTES, RAW)}
    pairs[CHOSEN] = [rows[OUTPUT][row] for row, _ in kept]
    pairs[REJECTED] = [rows[REJECTED][row][place] for row, place in kept]
    pairs[REJECTED_INDEX] = [place for _, place in kept]
    if RAW in rows:
        statuses = rows.get(STATUS) or [[SAMPLED] * len(answers) for answers in rows[RAW]]
        usable = [
            [answer for answer, status in zip_longest(answers, of_row) if status == SAMPLED]
            for answers, of_row in zip(rows[RAW], statuses, strict=True)
        ]
        if [len(answers) for answers in usable] != [len(rejects or ()) for rejects in rows[REJECTED]]:
            raise UserError(f"Column {RAW!r} does not match {REJECTED!r} one by one; remove_columns({RAW!r}) first.")
        pairs[RAW_ANSWER] = [usable[row][place] for row, place in kept]
    return pairs

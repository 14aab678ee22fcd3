"""Chains of thought from a teacher, which sees the gold SQL and writes how one gets there: asked for, judged, kept.

In DPO for SQL, pairs that carry reasoning work where bare SQL often does not (arXiv 2502.11656, 2503.19988); the model
is first fine-tuned on chains of thought such as these.

Not judged: whether the reasoning is sound. It must end in SQL that is right, and must not betray that it was given.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets

from t2s_pref import lineage, ranks
from t2s_pref.betrayal import betrayal
from t2s_pref.cache import cached_map, check_map_kwargs, without_rows
from t2s_pref.columns import (
    ALTERNATIVES,
    ANSWERS,
    COT,
    COT_STATUS,
    DB_ID,
    DIALECT,
    GOLD_VERDICT,
    HISTORY,
    INPUT,
    INSTRUCTION,
    OUTPUT,
    REJECTED,
    REQUIRED,
    SAMPLED,
    SOURCE_INDEX,
    STATUS,
    SYSTEM,
    VERDICT,
    check_columns,
    each_split,
)
from t2s_pref.databases import DatabasesLike
from t2s_pref.engines import TransformersEngine
from t2s_pref.errors import UserError
from t2s_pref.formats import FORMATS, check_reasoning
from t2s_pref.generate import Search, sample_rows
from t2s_pref.pairs import DUPLICATE
from t2s_pref.pool import Bounds
from t2s_pref.prompts import PROMPT_COLUMNS, teacher_row
from t2s_pref.protocol import Engine
from t2s_pref.settings import GOLD_TIMEOUT, TIMEOUT, SamplingSettings
from t2s_pref.sql import check_dialect, normalize_sql
from t2s_pref.verdicts import GOLD_OK, GOLD_USABLE, RIGHT
from t2s_pref.verifier import statement_of
from t2s_pref.verify import open_verifier, verify_with

# Raise it when the same answers of a teacher give other chains of thought.
COT_VERSION = 1

DEFAULTS = SamplingSettings(answer_format="fenced")

# What became of a sample beside how its sampling or its verdict ended.
KEPT = "kept"
BETRAYS = "betrays"
DIFFERS = "differs"
WORDS = {
    BETRAYS: "speaks of a query or an answer that was given",
    DIFFERS: "its SQL is another text than the gold",
}


def generate_cot(
    dataset: Dataset | DatasetDict,
    teacher: Engine | str,
    settings: SamplingSettings = DEFAULTS,
    *,
    databases: DatabasesLike | None = None,
    dialect: str = "sqlite",
    timeout: float = TIMEOUT,
    gold_timeout: float = GOLD_TIMEOUT,
    database_version: str | None = None,
    workers: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **map_kwargs: Any,
) -> Dataset | DatasetDict:
    """Have a teacher write, for each row, the reasoning that leads from the question to its gold SQL.

    The teacher sees schema, question and gold, and is asked for reasoning that does not say so. A sample is kept where
    its format is right, the SQL that it ends in is the gold's equal, and its words betray nothing. Cached and resumed
    like `generate_rejected`.

    Args:
        dataset: columns read: as for `generate_rejected`, and with `databases` as for `verify_rejected`.
        teacher: an engine; a `str` is a folder or Hub id.
        settings: `num_rejects` samples a row, and in `answer_format` what is kept: `fenced` or `think`. The teacher
            itself always writes plain text with a block, and what it thinks before is no part of it.
        databases: where the SQL is run and compared with the gold's result; without, its normalised text is compared.
        dialect: SQL dialect of rows without one of their own, by its sqlglot name; where nothing is run.
        timeout, gold_timeout, database_version, workers: as for `verify_rejected`.
        cache_dir: folder of results and samples, by default `t2s_pref` under `HF_HOME`.
        **map_kwargs: `desc`, `writer_batch_size` and `load_from_cache_file` of `Dataset.map`.

    Returns:
        The dataset with these columns added, in the same order, `explode_cot` makes rows to train on of it:

        - `cot` (`list[str]`): the samples that were kept, reasoning and SQL, each once;
        - `cot_status` (`list[str]`, one a sample): `kept`, or why not: how the sampling ended, the verdict on its SQL,
          `differs` (where nothing is run), `betrays` or `duplicate`; of a row whose gold proves nothing, which costs no
          sample, the one verdict on its gold.

    Raises:
        [`UserError`]: on missing columns, an `answer_format` without reasoning, and on what `generate_rejected` and
            `verify_rejected` refuse.

    >>> from t2s_pref import demo_files, load_sft
    >>> rows = load_sft(demo_files().train).select(range(2))
    >>> rows = generate_cot(rows, demo_files().reasoner, databases=demo_files().databases)
    >>> set(map(len, rows["cot_status"]))
    {3}
    """
    check_reasoning(settings.answer_format)
    check_map_kwargs(map_kwargs)
    check_dialect(dialect)
    engine = TransformersEngine(teacher) if isinstance(teacher, str | os.PathLike) else teacher
    bounds = Bounds(timeout, gold_timeout)

    def generate(part: Dataset) -> Dataset:
        check_columns(part, REQUIRED, "load_sft makes them from alpaca files.")
        written = replace(settings, answer_format="fenced", enable_thinking=False)
        if databases is None:
            sampled = sample_rows(_taught(part, cache_dir), engine, written, False, cache_dir, dict(map_kwargs))
            return _kept(part, sampled, settings, dialect, cache_dir)
        # opened before anything is sampled: what is wrong with the databases shows at once
        with open_verifier(part, databases, bounds, database_version, workers, cache_dir) as verifier:
            if verifier.key() is None and ranks.world_size() > 1:
                raise UserError("Several processes share results by their key: a server needs database_version.")
            # one turn: the samples of all rows but those whose gold proves nothing
            once = Search(verifier, written.candidates, "gold")
            sampled = sample_rows(_taught(part, cache_dir), engine, written, False, cache_dir, dict(map_kwargs), once)
            verifier.refresh()  # rank 0 has judged for all
            judged = verify_with(verifier, sampled, cache_dir, {})
        return _kept(part, judged, settings, dialect, cache_dir)

    return each_split(dataset, generate)


def _taught(dataset: Dataset, cache_dir: str | os.PathLike[str] | None) -> Dataset:
    """The rows as a teacher sees them, with what their golds are judged by and nothing else."""
    used = (*REQUIRED, SYSTEM, HISTORY, ALTERNATIVES, DB_ID, DIALECT, SOURCE_INDEX)
    narrow = dataset.select_columns([name for name in used if name in dataset.column_names])

    def teach(rows: dict[str, list]) -> dict[str, list]:
        names = [name for name in (*PROMPT_COLUMNS, OUTPUT) if name in rows]
        each = (dict(zip(names, values, strict=True)) for values in zip(*(rows[name] for name in names), strict=True))
        done = [teacher_row(row, statement_of(row[OUTPUT] or "")) for row in each]
        return {name: [row[name] for row in done] for name in (INSTRUCTION, INPUT)}

    return cached_map(
        narrow,
        teach,
        step="taught",
        key={"version": COT_VERSION, "prompt": teacher_row({}, "")[INPUT]},
        features=Features({**narrow.features, INSTRUCTION: Value("string"), INPUT: Value("string")}),
        cache_dir=cache_dir,
        map_kwargs={"desc": "Writing to the teacher"},
    )


def _kept(
    dataset: Dataset,
    sampled: Dataset,
    settings: SamplingSettings,
    dialect: str,
    cache_dir: str | os.PathLike[str] | None,
) -> Dataset:
    """The rows with the chains of thought that are kept of the samples, and what became of each sample."""
    answer_format = settings.answer_format

    def keep(rows: dict[str, list]) -> dict[str, list]:
        columns: dict[str, list] = {COT: [], COT_STATUS: []}
        for values in zip(*rows.values(), strict=True):
            kept, statuses = _judged(dict(zip(rows, values, strict=True)), answer_format, dialect)
            columns[COT].append(kept)
            columns[COT_STATUS].append(statuses)
        return columns

    added = {COT: List(Value("string")), COT_STATUS: List(Value("string"))}
    judged = cached_map(
        sampled,
        keep,
        step="cot",
        key={"version": COT_VERSION, "answer_format": answer_format, "dialect": dialect},
        features=Features(added),
        remove_columns=[name for name in sampled.column_names if name not in added],
        cache_dir=cache_dir,
        map_kwargs={"desc": "Keeping chains of thought"},
    )
    if not len(dataset):  # concatenating leaves out what has no rows, its columns too
        return without_rows(dataset, Features({**dataset.features, **added}))
    before = dataset.select_columns([name for name in dataset.column_names if name not in added])
    result = concatenate_datasets([before, judged], axis=1)
    result.info.description = dataset.info.description
    lineage.forget(result, lineage.TAUGHT, lineage.EXPLAINED)
    told = [line.replace(f"{lineage.SAMPLED}: ", f"{lineage.TAUGHT}: ") for line in lineage.told(sampled)]
    by_teacher = {"step": lineage.TAUGHT, "kept_as": settings.answer_format, "training": None}
    noted = [{**each, **by_teacher} if each["step"] == lineage.SAMPLED else each for each in lineage.records(sampled)]
    lineage.add(result, [*lineage.lines_of(noted), *told])
    return result


def _judged(row: Mapping[str, Any], answer_format: str, dialect: str) -> tuple[list[str], list[str]]:
    """The chains of thought of one row that are kept, and what became of each sample."""
    usable = iter(zip(row[ANSWERS], row[REJECTED], row.get(VERDICT) or [None] * len(row[REJECTED]), strict=True))
    dialect = row.get(DIALECT) or dialect
    golds = [statement_of(text) for text in (row[OUTPUT], *(row.get(ALTERNATIVES) or ())) if text]
    same = {normalize_sql(gold, dialect) for gold in golds}
    kept: dict[str, None] = {}
    statuses = []
    for status in row[STATUS]:
        if status == SAMPLED:
            answer, sql, verdict = next(usable)
            reasoning = FORMATS["fenced"].read(answer).reasoning  # which the sampler has found there
            text = FORMATS[answer_format].write(reasoning, sql)
            if verdict is None and normalize_sql(statement_of(sql), dialect) not in same:
                status = DIFFERS
            elif verdict is not None and verdict not in RIGHT:
                status = verdict
            elif betrayal(reasoning):
                status = BETRAYS
            elif text in kept:
                status = DUPLICATE
            else:
                status = KEPT
                kept[text] = None
        statuses.append(status)
    gold = row.get(GOLD_VERDICT) or GOLD_OK
    return list(kept), statuses if gold in GOLD_USABLE else [gold]

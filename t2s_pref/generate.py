"""Rejected SQL, sampled from the policy model: a mapped, hashable callable over a store of samples."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, List, Value
from datasets.utils import tqdm

from t2s_pref import ranks
from t2s_pref.cache import cache_folder, check_map_kwargs, draft_folder, find, keep, may_reuse, without_rows
from t2s_pref.columns import (
    NO_SQL,
    OUTPUT,
    PROMPT_TOO_LONG,
    RAW,
    REJECTED,
    REQUIRED,
    SAMPLED,
    SECONDS,
    SOURCE_INDEX,
    STATUS,
    TOKENS,
    TRUNCATED,
    check_columns,
    each_split,
)
from t2s_pref.engines import DEFAULT_MODEL, TransformersEngine
from t2s_pref.errors import UserError
from t2s_pref.files import atomic_write
from t2s_pref.plan import PAGE, cut_batches, plan_order
from t2s_pref.prompts import PROMPT_COLUMNS, messages
from t2s_pref.settings import SAMPLING_VERSION, SamplingSettings
from t2s_pref.sql import extract_sql
from t2s_pref.store import SampleStore, record_key
from t2s_pref.weights import hash_parts

logger = logging.getLogger(__name__)

# Columns that sampling works with, gone from its result. A seed may exceed 64 bits, so it is text.
_IDS, _LENGTH, _ANSWER, _SEED = "_prompt_ids", "_prompt_tokens", "_answer_tokens", "_row_seed"
WORKING = {_IDS: List(Value("int32")), _LENGTH: Value("int64"), _ANSWER: Value("int64"), _SEED: Value("string")}


def generate_rejected(
    dataset: Dataset | DatasetDict,
    engine: TransformersEngine | str | None = None,
    settings: SamplingSettings | None = None,
    *,
    keep_raw: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    **map_kwargs: Any,
) -> Dataset | DatasetDict:
    """Sample `settings.num_rejects` SQL candidates a row from the policy model.

    Cached twice: the result as an Arrow file, found again in milliseconds by any process, and below it each sample, so
    that a run that was killed goes on where it was and a higher `num_rejects` samples only what is new.

    Args:
        dataset: columns read: `instruction`, `input`, `output` (`str`), and where present `system` (`str`), `history`
            (`list[list[str]]`), `source_index` (`int64`, decides the row's seed; without it, the row's position does).
        engine: what to sample from; a `str` is a folder or Hub id, `None` the default model.
        settings: how; by default `SamplingSettings()`.
        keep_raw: also keep the answers as the model wrote them.
        cache_dir: folder of results and samples, by default `t2s_pref` under `HF_HOME`.
        **map_kwargs: `desc`, `writer_batch_size` and `load_from_cache_file` of `Dataset.map`.

    Returns:
        The dataset with these columns added, all others as they were, in the same order:

        - `rejected` (`list[str]`): the SQL of the candidates that ended and contain one;
        - `candidate_status` (`list[str]`, one a candidate): `sampled`, `truncated` (reached the length cap), `no_sql`
          (nothing in the answer looks like SQL), or `prompt_too_long` (the row was not sampled);
        - `generated_tokens` (`list[int64]`, one a candidate);
        - `generation_seconds` (`float64`): the row's share of the time of its batches, the one column that another
          fresh run does not reproduce;
        - `raw_answers` (`list[str]`, one a candidate), with `keep_raw`.

    Raises:
        [`UserError`]: on missing columns, on `num_proc` (use `accelerate launch`), on an `IterableDataset`, and where
            model or adapter cannot be loaded.

    >>> from t2s_pref import demo_files, load_sft
    >>> rows = load_sft(demo_files().train).select(range(2))
    >>> rows = generate_rejected(rows, demo_files().model, SamplingSettings(num_rejects=3, max_new_tokens=64))
    >>> rows["candidate_status"][:]
    [['sampled', 'sampled', 'sampled'], ['sampled', 'sampled', 'sampled']]
    """
    if engine is None or isinstance(engine, str | Path):
        engine = TransformersEngine(engine or DEFAULT_MODEL)
    settings = settings or SamplingSettings()
    check_map_kwargs(map_kwargs)
    if settings.candidates < settings.num_rejects:
        logger.warning("temperature 0 is greedy: every row has one candidate, not %d.", settings.num_rejects)
    return each_split(dataset, lambda part: _generate(part, engine, settings, keep_raw, cache_dir, map_kwargs))


def _generate(
    dataset: Dataset,
    engine: TransformersEngine,
    settings: SamplingSettings,
    keep_raw: bool,
    cache_dir: str | os.PathLike[str] | None,
    map_kwargs: dict[str, Any],
) -> Dataset:
    check_columns(dataset, REQUIRED, "load_sft makes them from alpaca files.")
    if SOURCE_INDEX not in dataset.column_names:
        logger.warning("No column %r: each row's seed comes from its position; load_sft adds it.", SOURCE_INDEX)
    passed = {"desc": "Sampling rejects", **map_kwargs}
    reuse = may_reuse(passed)
    home = cache_folder(cache_dir)
    memo = home / "weights.json"
    sampler = RejectSampler(engine, engine.identity(memo), settings, keep_raw)
    samples = home / "samples" / sampler.store_name()

    def look_up() -> Dataset | None:
        found = find(dataset, "rejected", sampler.key(), cache_dir)
        if found is not None and not _same_rows(found, dataset):
            logger.warning("The cached result has other rows than the dataset; sampling again.")
            return None
        return found

    def build(folder: Path, fingerprint: str) -> Dataset:
        with sampler.using(samples):
            return _sample(dataset, sampler, folder, fingerprint, passed)

    result = look_up() if reuse and len(dataset) else None
    if not len(dataset):
        result = without_rows(dataset, Features({**dataset.features, **sampler.features()}))
    elif ranks.world_size() > 1:  # all sample, the main rank alone writes, the others then read
        if result is None:
            with sampler.using(samples), draft_folder(home / "rejected") as folder:
                _sample_share(dataset, sampler, folder)
        ranks.wait_for_everyone(engine.device == "cpu")
        if result is None and ranks.rank() == 0:
            result = keep(dataset, "rejected", sampler.key(), cache_dir, build)
        ranks.wait_for_everyone(engine.device == "cpu")
        result = look_up() if result is None else result
        if result is None:
            raise UserError(f"Rank {ranks.rank()} sees no result of rank 0 in {home}; all ranks must share it.")
    elif result is None:
        result = keep(dataset, "rejected", sampler.key(), cache_dir, build)
    told = f"generate_rejected: {engine.describe()}"
    result.info.description = "\n".join(line for line in (dataset.info.description, told) if line)
    return result


def _same_rows(found: Dataset, dataset: Dataset) -> bool:
    if len(found) != len(dataset):
        return False
    return SOURCE_INDEX not in dataset.column_names or found[SOURCE_INDEX][:] == dataset[SOURCE_INDEX][:]


def _sample(
    dataset: Dataset, sampler: RejectSampler, folder: Path, fingerprint: str, map_kwargs: dict[str, Any]
) -> Dataset:
    """Map over the rows in plan order, then put them back into their own."""
    planned, order = _plan(dataset, sampler, folder)
    sampled = planned.map(
        sampler,
        batched=True,
        batch_size=PAGE,
        remove_columns=list(WORKING),
        features=Features({**dataset.features, **sampler.features()}),
        cache_file_name=str(folder / "sampled.arrow"),
        new_fingerprint="sampled",
        load_from_cache_file=False,
        **map_kwargs,
    )
    back = sorted(range(len(order)), key=order.__getitem__)
    return sampled.select(back).map(
        batched=True,
        cache_file_name=str(folder / "result.arrow"),
        new_fingerprint=fingerprint,
        load_from_cache_file=False,
        desc="Restoring the order",
    )


def _sample_share(dataset: Dataset, sampler: RejectSampler, folder: Path) -> None:
    """Sample every n-th page of the plan into the store, n ranks together all of them."""
    planned, _ = _plan(dataset, sampler, folder)
    mine = [row for row in range(len(planned)) if row // PAGE % ranks.world_size() == ranks.rank()]
    with tqdm(total=len(mine), desc="Sampling rejects", unit=" rows", disable=ranks.rank() > 0 or None) as bar:
        for page in planned.select(mine).iter(PAGE):
            sampler(page)
            bar.update(len(page[_IDS]))


def _plan(dataset: Dataset, sampler: RejectSampler, folder: Path) -> tuple[Dataset, list[int]]:
    """The rows with their prompts' token ids, in the order in which they are sampled, and that order."""
    tokenized = dataset.map(
        sampler.tokenize,
        batched=True,
        with_indices=True,
        features=Features({**dataset.features, **WORKING}),
        cache_file_name=str(folder / "tokenized.arrow"),
        new_fingerprint="tokenized",
        load_from_cache_file=False,
        desc="Tokenizing",
    )
    lengths = tokenized[_LENGTH][:]
    order = plan_order(lengths, tokenized[_ANSWER][:])
    sampler.notice_context(lengths)
    return tokenized.select(order), order


class RejectSampler:
    """Batch of rows in, batch of rows with their candidates out: what `Dataset.map` calls.

    Its state, for hashing, is everything that decides the candidates and nothing else: no model, no store, no budget.
    """

    def __init__(
        self, engine: TransformersEngine, identity: dict[str, Any], settings: SamplingSettings, keep_raw: bool
    ) -> None:
        self.engine, self.identity, self.settings, self.keep_raw = engine, identity, settings, keep_raw
        self.store: SampleStore | None = None
        self.budget = 0

    def key(self) -> dict[str, Any]:
        """What decides the result beside the dataset."""
        return {
            "version": SAMPLING_VERSION,
            "identity": self.identity,
            "settings": asdict(self.settings),
            "keep_raw": self.keep_raw,
        }

    def __getstate__(self) -> dict[str, Any]:
        return self.key()

    def store_name(self) -> str:
        """The samples of one model under one way of drawing lie together: one folder of the store."""
        drawing = {"version": SAMPLING_VERSION, "identity": self.identity, "drawing": self.settings.drawing()}
        return hash_parts([json.dumps(drawing, sort_keys=True).encode()])

    def features(self) -> dict[str, Any]:
        """Types of the columns that sampling adds."""
        added = {REJECTED: List(Value("string")), STATUS: List(Value("string")), TOKENS: List(Value("int64"))}
        added[SECONDS] = Value("float64")
        return {**added, RAW: List(Value("string"))} if self.keep_raw else added

    @contextmanager
    def using(self, folder: Path) -> Iterator[None]:
        """Sample into the store in `folder`, with the budget that its first run measured there."""
        with SampleStore(folder) as self.store:
            self.budget = _recorded(folder / "budget.json", self.engine.token_budget)
            yield
        self.store = None

    def tokenize(self, rows: dict[str, list], positions: list[int]) -> dict[str, list]:
        """The working columns of a batch of rows."""
        names = [name for name in PROMPT_COLUMNS if name in rows]
        chats = [messages(dict(zip(names, values, strict=True))) for values in zip(*map(rows.get, names), strict=True)]
        ids = self.engine.encode_chats(chats, self.settings.enable_thinking)
        return {
            _IDS: ids,
            _LENGTH: [len(prompt) for prompt in ids],
            _ANSWER: self.engine.count_tokens([gold or "" for gold in rows[OUTPUT]]),
            _SEED: [str(self.settings.row_seed(index)) for index in rows.get(SOURCE_INDEX, positions)],
        }

    def notice_context(self, lengths: list[int]) -> None:
        """Say once what the model's context length does to this run."""
        context, cap = self.engine.context_length, self.settings.max_new_tokens
        if context is None:
            return
        if clamped := sum(context - cap < length < context for length in lengths):
            logger.warning(
                "max_new_tokens %d is clamped for %d of %d rows: prompt and answer share a context of %d tokens.",
                *(cap, clamped, len(lengths), context),
            )

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        """Sample what the store lacks of a page's candidates; the columns of all of them."""
        context = self.engine.context_length or math.inf
        fits = [row for row, length in enumerate(rows[_LENGTH]) if length < context]
        keys = {
            (row, candidate): record_key(rows[_SEED][row], str(candidate), prompt)
            for row in fits
            for prompt in [array("q", rows[_IDS][row]).tobytes()]
            for candidate in range(self.settings.candidates)
        }
        records = {of: record for of, key in keys.items() if (record := self.store.get(key)) is not None}
        # Batches are cut before what is known is left out, so that a resumed run decodes what was together together.
        for batch in cut_batches(
            [rows[_LENGTH][row] for row in fits],
            [rows[_ANSWER][row] for row in fits],
            self.settings.candidates,
            self.budget,
        ):
            parts = [(fits[part.row], part.candidates) for part in batch]
            wanted = {row: [c for c in candidates if (row, c) not in records] for row, candidates in parts}
            if wanted := {row: missing for row, missing in wanted.items() if missing}:
                fresh = self._sample(rows, wanted, context)
                self.store.append((keys[of], record) for of, record in fresh.items())
                records.update(fresh)
        every = range(self.settings.candidates)
        return self._columns([[records.get((row, c)) for c in every] for row in range(len(rows[_IDS]))])

    def _sample(
        self, rows: dict[str, list], wanted: dict[int, list[int]], context: float
    ) -> dict[tuple[int, int], dict[str, Any]]:
        from t2s_pref.decoding import Request

        cap = self.settings.max_new_tokens
        requests = [
            Request(rows[_IDS][row], int(rows[_SEED][row]), candidates, int(min(cap, context - rows[_LENGTH][row])))
            for row, candidates in wanted.items()
        ]
        start = time.perf_counter()
        answers = self.engine.sample(requests, self.settings)
        share = (time.perf_counter() - start) / sum(map(len, answers))
        return {
            (row, candidate): {**answer._asdict(), "seconds": share}
            for (row, candidates), drawn in zip(wanted.items(), answers, strict=True)
            for candidate, answer in zip(candidates, drawn, strict=True)
        }

    def _columns(self, sampled: list[list[dict[str, Any] | None]]) -> dict[str, list]:
        columns: dict[str, list] = {name: [] for name in self.features()}
        for records in sampled:
            found = [(PROMPT_TOO_LONG, "") if record is None else _sql_of(record) for record in records]
            columns[REJECTED].append([sql for status, sql in found if status == SAMPLED])
            columns[STATUS].append([status for status, _ in found])
            columns[TOKENS].append([record["tokens"] if record else 0 for record in records])
            columns[SECONDS].append(sum(record["seconds"] for record in records if record))
            if self.keep_raw:
                columns[RAW].append([record["text"] if record else "" for record in records])
        return columns


def _sql_of(record: dict[str, Any]) -> tuple[str, str]:
    if not record["ended"]:
        return TRUNCATED, ""
    sql = extract_sql(record["text"])
    return (SAMPLED, sql) if sql else (NO_SQL, "")


def _recorded(path: Path, measure: Callable[[], int]) -> int:
    """The token budget in `path`, measured and written by whichever process comes first.

    Batches follow from it, so a resumed run and all ranks must use the same.
    """
    with suppress(FileNotFoundError):
        return json.loads(path.read_text(encoding="utf-8"))["token_budget"]
    mine = path.with_suffix(f".{socket.gethostname()}-{os.getpid()}")
    with atomic_write(mine) as file:
        json.dump({"token_budget": measure()}, file)
    try:
        os.link(mine, path)  # unlike a rename, it never replaces what another process wrote first
    except OSError:
        if not path.exists():  # a file system without hard links
            os.replace(mine, path)
    mine.unlink(missing_ok=True)
    return json.loads(path.read_text(encoding="utf-8"))["token_budget"]

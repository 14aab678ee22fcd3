"""The mapped callable: rows in, the same rows with their candidates out, from the store or fresh from the model."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import List, Value

from t2s_pref.columns import (
    ADAPTER,
    ANSWERS,
    FAILED,
    NO_SQL,
    OFF_FORMAT,
    OUTPUT,
    POLICY_HASH,
    PROMPT_TOO_LONG,
    RAW,
    REJECTED,
    ROUND,
    SAMPLED,
    SECONDS,
    SOURCE_INDEX,
    STATUS,
    TOKENS,
    TRUNCATED,
)
from t2s_pref.errors import UserError
from t2s_pref.files import atomic_write, own_prefix
from t2s_pref.formats import FORMATS, AnswerFormat
from t2s_pref.keeping import Keeper, failure_of
from t2s_pref.plan import cut_batches
from t2s_pref.progress import Progress
from t2s_pref.prompts import PROMPT_COLUMNS, messages
from t2s_pref.protocol import Engine, Request
from t2s_pref.settings import SAMPLING_VERSION, SamplingSettings
from t2s_pref.sql import extract_sql
from t2s_pref.store import SampleStore, record_key
from t2s_pref.weights import hash_parts

logger = logging.getLogger(__name__)

# Columns that sampling works with, gone from its result. A seed may exceed 64 bits, so it is text.
PROMPT_IDS, PROMPT_TOKENS, ANSWER_TOKENS, ROW_SEED = "_prompt_ids", "_prompt_tokens", "_answer_tokens", "_row_seed"
POSITION = "_position"
WORKING = {
    POSITION: Value("int64"),
    PROMPT_IDS: List(Value("int32")),
    PROMPT_TOKENS: Value("int64"),
    ANSWER_TOKENS: Value("int64"),
    ROW_SEED: Value("string"),
}


# The file beside the samples that says how they were drawn: a resumed run must cut the same batches.
RUN = "run.json"

# How many tokens more than its SQL an answer with reasoning is planned to have.
REASONING_TOKENS = 400

# How many rows show which template of LLaMA-Factory gives the prompts; a training file is written after all of them.
TRIED_ROWS = 16

# What is known of a candidate that there is not.
NO_RECORD: dict[str, Any] = {"text": "", "tokens": 0, "seconds": 0.0}


class RejectSampler:
    """Batch of rows in, batch of rows with their candidates out: what `Dataset.map` calls.

    Its state, for hashing, is everything that decides the candidates and nothing else: no model, no store, no budget.
    """

    def __init__(self, engine: Engine, identity: dict[str, Any], settings: SamplingSettings, keep_raw: bool) -> None:
        self.engine, self.identity, self.settings, self.keep_raw = engine, identity, settings, keep_raw
        self.format = FORMATS[settings.answer_format]
        self.store: SampleStore | None = None
        self.budget = 0
        self._run: dict[str, Any] = {}
        # Told of each candidate that is found or drawn.
        self.progress: Progress | None = None
        # Which candidates each row gets, by its position; the same for all where nothing says otherwise.
        self.wanted: list[range] | None = None
        # Candidates that the engine could not give: asked for once in a run, and again in the next.
        self.failed: set[bytes] = set()
        # All have been asked for, on all ranks: what failed is not asked for once more.
        self.collecting = False
        self._gave_up = False

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
        if self.format.reasons:
            added[ANSWERS] = List(Value("string"))
        if self.settings.round is not None:
            added |= {ROUND: Value("int64"), ADAPTER: Value("string"), POLICY_HASH: Value("string")}
        return {**added, RAW: List(Value("string"))} if self.keep_raw else added

    @contextmanager
    def using(self, folder: Path) -> Iterator[None]:
        """Sample into the store in `folder`, with the budget that its first run measured there."""
        with SampleStore(folder) as self.store:
            run = _recorded(
                folder / RUN, lambda: {"token_budget": self.engine.token_budget(), "decoding": self.engine.method()}
            )
            self._run, self.budget = run, run["token_budget"]
            try:
                yield
            finally:
                self.engine.rest()
        self.store = None

    def run(self, folder: Path) -> dict[str, Any]:
        """What is known of how the samples in `folder` were drawn: `decoding`, in words, and the keys for `training` on
        prompts like theirs.
        """
        with suppress(FileNotFoundError):
            return json.loads((folder / RUN).read_text(encoding="utf-8"))
        return {}

    def tokenize(self, rows: dict[str, list], positions: list[int]) -> dict[str, list]:
        """The working columns of a batch of rows."""
        names = [name for name in PROMPT_COLUMNS if name in rows]
        each = [dict(zip(names, values, strict=True)) for values in zip(*map(rows.get, names), strict=True)]
        ids = self.engine.encode_chats([messages(row) for row in each], self.settings.enable_thinking)
        if "training" not in self._run:
            self._note(training=self.engine.training_keys(each[:TRIED_ROWS], self.settings.enable_thinking))
        return {
            POSITION: positions,
            PROMPT_IDS: ids,
            PROMPT_TOKENS: [len(prompt) for prompt in ids],
            ANSWER_TOKENS: self.engine.count_tokens([gold or "" for gold in rows[OUTPUT]]),
            ROW_SEED: [str(self.settings.row_seed(index)) for index in rows.get(SOURCE_INDEX, positions)],
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
        fits = [row for row, length in enumerate(rows[PROMPT_TOKENS]) if length < context]
        every = range(self.settings.candidates)
        asked = [every if self.wanted is None else self.wanted[position] for position in rows[POSITION]]
        keys = {
            (row, candidate): record_key(rows[ROW_SEED][row], str(candidate), prompt)
            for row in fits
            for prompt in [array("q", rows[PROMPT_IDS][row]).tobytes()]
            for candidate in asked[row]
        }
        records = {of: record for of, key in keys.items() if (record := self.store.get(key)) is not None}
        lacking = {of: key for of, key in keys.items() if of not in records and key not in self.failed}
        if self.progress:
            whole = [all((row, c) in records or (row, c) not in keys for c in asked[row]) for row in range(len(asked))]
            self.progress.found(sum(whole), len(records))
        if lacking:
            before = {key for key in lacking.values() if self.store.get(failure_of(key)) is not None}
            if self.collecting or self._gave_up:
                self.failed |= before
                lacking = {of: key for of, key in lacking.items() if key not in before}
            self._sample(rows, fits, asked, {of: key for of, key in lacking.items() if key not in before}, records)
            again = {of: key for of, key in lacking.items() if key in before}
            try:  # after all else; where it fails for good, the run does without it
                self._sample(rows, fits, asked, again, records)
            except UserError as error:
                logger.warning("%s What failed before is left out for now.", error)
                self._gave_up = True
                self.failed |= {key for of, key in again.items() if of not in records}
        why_not = [PROMPT_TOO_LONG] * len(asked)
        for row in fits:
            why_not[row] = FAILED
        return self._columns([[records.get((row, c), why_not[row]) for c in asked[row]] for row in range(len(asked))])

    def _sample(
        self,
        rows: dict[str, list],
        fits: list[int],
        asked: list[range],
        keys: dict[tuple[int, int], bytes],
        records: dict[tuple[int, int], dict[str, Any]],
    ) -> None:
        """Add what `keys` has to `records` and to the store, batch by batch."""
        if not keys:
            return
        context = self.engine.context_length or math.inf
        prompts = {row: tuple(rows[PROMPT_IDS][row]) for row in fits}
        caps = {row: int(min(self.settings.max_new_tokens, context - len(prompts[row]))) for row in fits}
        more = REASONING_TOKENS if self.format.reasons else 0
        expected = {row: min(caps[row], _likely(rows[ANSWER_TOKENS][row]) + more) for row in fits}
        # Batches are cut before what is known is left out, so that a resumed run decodes what was together together.
        for batch in cut_batches(
            list(prompts.values()),
            list(expected.values()),
            [asked[row] for row in fits],
            self.budget,
            self.engine.holds_once(),
        ):
            wanted = [
                (row, Request(prompts[row], int(rows[ROW_SEED][row]), missing, caps[row], part.shared, expected[row]))
                for part in batch
                for row in [fits[part.row]]
                if (missing := [c for c in part.candidates if (row, c) in keys])
            ]
            if wanted:
                self._draw(wanted, keys, records)

    def _draw(
        self,
        wanted: list[tuple[int, Request]],
        keys: dict[tuple[int, int], bytes],
        records: dict[tuple[int, int], dict[str, Any]],
    ) -> None:
        left = [len(request.candidates) for _, request in wanted]
        # What another batch would round otherwise is kept whole or not at all: a resumed run repeats the batch.
        with Keeper(self.store, soon=not self.engine.whole_batches) as keeper:

            def lose(key: bytes) -> None:
                self.failed.add(key)
                keeper.add(failure_of(key), {"failed": True})

            last = time.perf_counter()
            answers = self.engine.sample([request for _, request in wanted], self.settings, self.budget)
            try:
                for place, candidate, answer in answers:
                    of = wanted[place][0], candidate
                    now = time.perf_counter()
                    if answer is None:  # noted at once: the run may be about to end
                        lose(keys[of])
                    else:
                        records[of] = {**answer._asdict(), "seconds": now - last}
                        keeper.add(keys[of], records[of])
                    last = now
                    left[place] -= 1
                    if self.progress:
                        self.progress.drawn(left[place] == 0)
            finally:
                answers.close()
                if self.engine.ceiling < self.budget:
                    self._note(token_budget=int(self.engine.ceiling))
            for row, request in wanted:
                for of in ((row, candidate) for candidate in request.candidates):
                    if of not in records and keys[of] not in self.failed:  # an engine that says nothing of it
                        lose(keys[of])
        self._note(decoding=self.engine.method())

    def _note(self, **changed: Any) -> None:
        """Record what has changed about the run: its budget, where memory has ended, or what decodes."""
        run = {**self._run, **changed}
        if run != self._run:
            self._run, self.budget = run, run["token_budget"]
            _record(self.store.folder / RUN, run)

    def _columns(self, sampled: list[list[dict[str, Any] | str]]) -> dict[str, list]:
        """The columns of each row's candidates, which are records, or why there is none."""
        columns: dict[str, list] = {name: [] for name in self.features()}
        for candidates in sampled:
            records = [NO_RECORD if isinstance(each, str) else each for each in candidates]
            found = [(each, "", "") if isinstance(each, str) else _read(self.format, each) for each in candidates]
            columns[REJECTED].append([sql for status, sql, _ in found if status == SAMPLED])
            columns[STATUS].append([status for status, _, _ in found])
            columns[TOKENS].append([record["tokens"] for record in records])
            columns[SECONDS].append(sum(record["seconds"] for record in records))
            if self.format.reasons:
                columns[ANSWERS].append([answer for status, _, answer in found if status == SAMPLED])
            if self.keep_raw:
                columns[RAW].append([record["text"] for record in records])
        if self.settings.round is not None:
            hashed = hash_parts([json.dumps(self.identity, sort_keys=True).encode()])
            carried = {ROUND: self.settings.round, ADAPTER: self.engine.adapter_name, POLICY_HASH: hashed}
            columns |= {name: [value] * len(sampled) for name, value in carried.items()}
        return columns


def _read(answer_format: AnswerFormat, record: dict[str, Any]) -> tuple[str, str, str]:
    """The status of a candidate, its SQL, and its answer as the format has it."""
    if not record["ended"]:
        return TRUNCATED, "", ""
    if parts := answer_format.read(record["text"]):
        return SAMPLED, parts.sql, answer_format.write(*parts)
    return (OFF_FORMAT if extract_sql(record["text"]) else NO_SQL), "", ""


def _likely(gold: int) -> int:
    """How many tokens an answer probably has, where the gold has `gold`: rarely half as many more."""
    return gold + gold // 2 + 8


def _recorded(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is in `path`, measured and written by whichever process comes first.

    Batches follow from it, so a resumed run and all ranks must use the same.
    """
    with suppress(FileNotFoundError):
        return json.loads(path.read_text(encoding="utf-8"))
    mine = path.with_name(own_prefix(path.parent, f".{path.name}-"))
    _record(mine, measure())
    try:
        os.link(mine, path)  # unlike a rename, it never replaces what another process wrote first
    except OSError:
        if not path.exists():  # a file system without hard links
            os.replace(mine, path)
    mine.unlink(missing_ok=True)
    return json.loads(path.read_text(encoding="utf-8"))


def _record(path: Path, found: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        json.dump(found, file)

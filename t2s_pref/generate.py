"""Rejected SQL, sampled from the policy model: planned, mapped in plan order, put back, cached."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, Features, Value

from t2s_pref import lineage, ranks
from t2s_pref.adaptive import Proof, sample_share, sample_until_proven
from t2s_pref.cache import cache_folder, cached_map, check_map_kwargs, draft_folder, find, keep, may_reuse, without_rows
from t2s_pref.columns import (
    INPUT,
    INSTRUCTION,
    NOTED,
    OUTPUT,
    REQUIRED,
    ROUNDS,
    SOURCE_INDEX,
    STRINGS,
    SYSTEM,
    check_columns,
    each_split,
)
from t2s_pref.databases import DatabasesLike
from t2s_pref.engines import TransformersEngine
from t2s_pref.errors import UserError
from t2s_pref.formats import FORMATS
from t2s_pref.pairing import check_chosen, proven_right
from t2s_pref.plan import PAGE, plan_order
from t2s_pref.pool import Bounds
from t2s_pref.prompts import asked, asks
from t2s_pref.protocol import Engine
from t2s_pref.sampler import ANSWER_TOKENS, PROMPT_IDS, PROMPT_TOKENS, WORKING, RejectSampler
from t2s_pref.settings import DEFAULT_MODEL, GOLD_TIMEOUT, TIMEOUT, SamplingSettings
from t2s_pref.verifier import Verifier
from t2s_pref.verify import open_verifier, question, verify_with

logger = logging.getLogger(__name__)


def generate_rejected(
    dataset: Dataset | DatasetDict,
    engine: Engine | str | None = None,
    settings: SamplingSettings | None = None,
    *,
    keep_raw: bool = False,
    databases: DatabasesLike | None = None,
    max_candidates: int | None = None,
    chosen: str = "gold",
    timeout: float = TIMEOUT,
    gold_timeout: float = GOLD_TIMEOUT,
    database_version: str | None = None,
    workers: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **map_kwargs: Any,
) -> Dataset | DatasetDict:
    """Sample `settings.num_rejects` SQL candidates a row from the policy model.

    With `databases`, it samples until `num_rejects` distinct candidates of a row are proven wrong by execution, or the
    row has cost `max_candidates`: first as many as are wanted, then as many as are still lacking, round by round. A row
    whose gold proves nothing is not sampled at all. The result has the columns of `verify_rejected` too.

    With an `answer_format` that has reasoning, the candidates are chains of thought with the SQL that they end in, and
    the SQL is what is judged. Where the prompt has to ask for the format, `input` ends in that request from then on.
    Columns of an earlier call, on what was sampled then and what was proven of it, are replaced or gone.

    Cached twice: the result as an Arrow file, found again in milliseconds by any process, and below it each sample, so
    that a run that was killed goes on where it was and a higher `num_rejects` samples only what is new.

    Args:
        dataset: columns read: `instruction`, `input`, `output` (`str`), and where present `system` (`str`), `history`
            (`list[list[str]]`), `source_index` (`int64`, decides the row's seed; without it, the row's position does);
            with `databases` also `alternatives`, `db_id` and `dialect`, as in `verify_rejected`.
        engine: what to sample from; a `str` is a folder or Hub id, `None` the default model.
        settings: how; by default `SamplingSettings()`.
        keep_raw: also keep the answers as the model wrote them.
        databases: where to run golds and candidates, as for `verify_rejected`; without, nothing is run.
        max_candidates: the most candidates a row, by default four times `num_rejects`; only with `databases`.
        chosen: the `chosen` of `explode_rejected`; where that is the model's own, each row is sampled until it also
            has a candidate that is proven right.
        timeout, gold_timeout, database_version, workers: as for `verify_rejected`.
        cache_dir: folder of results and samples, by default `t2s_pref` under `HF_HOME`.
        **map_kwargs: `desc`, `writer_batch_size` and `load_from_cache_file` of `Dataset.map`.

    Returns:
        The dataset with these columns added, all others as they were, in the same order:

        - `rejected` (`list[str]`): the SQL of the candidates that ended and contain one;
        - `candidate_status` (`list[str]`, one a candidate): `sampled`, `truncated` (reached the length cap), `no_sql`
          (nothing in the answer looks like SQL), `off_format` (reasoning or SQL is not where the format has it),
          `failed` (the server gave no answer; the next run asks again) or `prompt_too_long` (the row was not sampled);
        - `generated_tokens` (`list[int64]`, one a candidate);
        - `generation_seconds` (`float64`): the row's share of the time of its batches, the one column that another
          fresh run does not reproduce;
        - `answers` (`list[str]`, one for each of `rejected`), with reasoning: the whole answer in its format;
        - `round` (`int64`), `adapter` (`str`, its name) and `policy_hash` (`str`, of all that the policy is), with
          `round` in the settings;
        - `raw_answers` (`list[str]`, one a candidate), with `keep_raw`.

    Raises:
        [`UserError`]: on missing columns, on `num_proc` (use `accelerate launch`), on an `IterableDataset`, where no
            database is found or one cannot be reached, and where model or adapter cannot be loaded.

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
    check_chosen(chosen)
    if settings.candidates < settings.num_rejects:
        logger.warning("temperature 0 is greedy: every row has one candidate, not %d.", settings.num_rejects)
    if databases is None:
        if max_candidates is not None:
            raise UserError("max_candidates bounds the search for proven rejects; it needs databases.")
        if chosen != "gold":
            raise UserError(f"chosen={chosen!r} needs candidates that are proven right, and that needs databases.")
        return each_split(
            dataset,
            lambda part: sample_rows(
                _asking(part, settings, cache_dir), engine, settings, keep_raw, cache_dir, dict(map_kwargs)
            ),
        )
    most = 4 * settings.num_rejects if max_candidates is None else max_candidates
    if most < settings.candidates:
        raise UserError(f"max_candidates is {most}; it must be num_rejects ({settings.num_rejects}) or more.")
    most = most if settings.temperature else settings.candidates
    bounds = Bounds(timeout, gold_timeout)

    def prove(part: Dataset) -> Dataset:
        check_columns(part, REQUIRED, "load_sft makes them from alpaca files.")
        with open_verifier(part, databases, bounds, database_version, workers, cache_dir) as verifier:
            if verifier.key() is None and ranks.world_size() > 1:
                raise UserError("Several processes share results by their key: a server needs database_version.")
            search = Search(verifier, most, chosen)
            rows = _asking(part, settings, cache_dir)
            sampled = sample_rows(rows, engine, settings, keep_raw, cache_dir, dict(map_kwargs), search)
            verifier.refresh()  # rank 0 has judged for all
            return verify_with(verifier, sampled, cache_dir, dict(map_kwargs))

    return each_split(dataset, prove)


class Search(NamedTuple):
    """What sampling until enough is proven goes by: the judge, the most candidates a row, and what is chosen."""

    verifier: Verifier
    most: int
    chosen: str


def _asking(dataset: Dataset, settings: SamplingSettings, cache_dir: str | os.PathLike[str] | None) -> Dataset:
    """The rows whose prompts ask for the answer format, where its models would not know otherwise, and for no other."""
    request = FORMATS[settings.answer_format].request
    check_columns(dataset, REQUIRED, "load_sft makes them from alpaca files.")
    _check_texts(dataset)
    columns = zip(dataset[INSTRUCTION][:], dataset[INPUT][:], strict=True)
    if not request and not any(asks({INSTRUCTION: one, INPUT: other}) for one, other in columns):
        return dataset

    def ask(rows: dict[str, list]) -> dict[str, list]:
        parts = zip(rows[INSTRUCTION], rows[INPUT], strict=True)
        done = [asked({INSTRUCTION: instruction, INPUT: text}, request) for instruction, text in parts]
        return {name: [row[name] for row in done] for name in (INSTRUCTION, INPUT)}

    text = Value("string")

    return cached_map(
        dataset,
        ask,
        step="asking",
        key={"request": request},
        features=Features({**dataset.features, INSTRUCTION: text, INPUT: text}),
        cache_dir=cache_dir,
        map_kwargs={"desc": "Asking for the format"},
    )


def _check_texts(dataset: Dataset) -> None:
    for name in (INSTRUCTION, INPUT, SYSTEM):
        if (feature := dataset.features.get(name, Value("null"))) not in (Value("null"), *STRINGS):
            way_out = f"dataset.cast_column({name!r}, Value('string'))"
            raise UserError(f"Column {name!r} is {feature}; expected strings: {way_out}.")


def sample_rows(
    dataset: Dataset,
    engine: Engine,
    settings: SamplingSettings,
    keep_raw: bool,
    cache_dir: str | os.PathLike[str] | None,
    map_kwargs: dict[str, Any],
    search: Search | None = None,
) -> Dataset:
    """Sample each row's candidates from the prompts as they are, and add the columns of `generate_rejected`."""
    check_columns(dataset, REQUIRED, "load_sft makes them from alpaca files.")
    _check_texts(dataset)
    # what an earlier call noted of other candidates must not stand beside these
    noted = (*NOTED, *(ROUNDS if set(ROUNDS) <= set(dataset.column_names) else ()))  # "round" alone is a user's own
    dataset = dataset.remove_columns([name for name in noted if name in dataset.column_names])
    if SOURCE_INDEX not in dataset.column_names:
        logger.warning("No column %r: each row's seed comes from its position; load_sft adds it.", SOURCE_INDEX)
    passed = {"desc": "Sampling rejects", **map_kwargs}
    reuse = may_reuse(passed)
    home = cache_folder(cache_dir)
    cpu = engine.device == "cpu"
    sampler = RejectSampler(engine, engine.identity(home / "weights.json"), settings, keep_raw)
    samples = home / "samples" / sampler.store_name()
    key: dict[str, Any] | None = sampler.key()
    if search:
        proof = search.verifier.key()
        key = proof and {**key, "proof": proof, "max_candidates": search.most, "own": search.chosen != "gold"}

    def look_up(partial: bool = False) -> Dataset | None:
        found = find(dataset, "rejected", key, cache_dir, partial) if key else None
        if found is not None and not _same_rows(found, dataset):
            logger.warning("The cached result has other rows than the dataset; sampling again.")
            return None
        return found

    def decide(planned: Dataset) -> None:
        questions = [question(row, OUTPUT, search.verifier.databases) for row in dataset]
        right = proven_right(settings.answer_format) if search.chosen != "gold" else ()
        proof = Proof(search.verifier, questions, search.most, right)
        sampler.wanted = sample_until_proven(planned, sampler, proof, cpu)

    def build(folder: Path, fingerprint: str) -> bool:
        with sampler.using(samples):
            planned, order = _plan(dataset, sampler, folder)
            if search and sampler.wanted is None:
                decide(planned)
            elif not search:
                sample_share(planned, sampler, passed["desc"])
            _collect(dataset, planned, order, sampler, folder, fingerprint, passed)
        return not sampler.failed

    result = look_up() if reuse and len(dataset) else None
    if not len(dataset):
        result = without_rows(dataset, Features({**dataset.features, **sampler.features()}))
    elif ranks.world_size() > 1:  # all sample, the main rank alone writes, the others then read
        if result is None:
            with sampler.using(samples), draft_folder(home / "rejected") as folder:
                planned, _ = _plan(dataset, sampler, folder)
                decide(planned) if search else sample_share(planned, sampler, passed["desc"])
        ranks.wait_for_everyone(cpu)
        if result is None and ranks.rank() == 0:
            result = keep(dataset, "rejected", key, cache_dir, build)
        ranks.wait_for_everyone(cpu)
        result = look_up(partial=True) if result is None else result
        if result is None:
            raise UserError(f"Rank {ranks.rank()} sees no result of rank 0 in {home}; all ranks must share it.")
    elif result is None:
        result = keep(dataset, "rejected", key, cache_dir, build)
    told = f"generate_rejected: {engine.describe()}"
    run = sampler.run(samples)
    if method := run.get("decoding"):
        told += f"; {method}"
    if search and search.most > settings.candidates:
        told += f"; until {settings.num_rejects} are proven wrong"
        told += f"{' and one right' if search.chosen != 'gold' else ''}, at most {search.most} candidates a row"
    drawn = {**engine.origin(), "settings": asdict(settings), "training": run.get("training") or None}
    drawn |= {"most_candidates": search.most} if search else {}
    lineage.forget(result, lineage.SAMPLED, lineage.PROVEN, lineage.PAIRED)
    lineage.note(result, told, step=lineage.SAMPLED, **drawn)
    return result


def _same_rows(found: Dataset, dataset: Dataset) -> bool:
    if len(found) != len(dataset):
        return False
    return SOURCE_INDEX not in dataset.column_names or found[SOURCE_INDEX][:] == dataset[SOURCE_INDEX][:]


def _collect(
    dataset: Dataset,
    planned: Dataset,
    order: list[int],
    sampler: RejectSampler,
    folder: Path,
    fingerprint: str,
    map_kwargs: dict[str, Any],
) -> None:
    """Map over the rows in plan order, reading what was sampled, then put them back into their own: `result.arrow`."""
    sampler.collecting = True
    sampled = planned.map(
        sampler,
        batched=True,
        batch_size=PAGE,
        remove_columns=list(WORKING),
        features=Features({**dataset.features, **sampler.features()}),
        cache_file_name=str(folder / "sampled.arrow"),
        new_fingerprint="sampled",
        load_from_cache_file=False,
        **{**map_kwargs, "desc": "Collecting candidates"},
    )
    back = sorted(range(len(order)), key=order.__getitem__)
    sampled.select(back).map(
        batched=True,
        cache_file_name=str(folder / "result.arrow"),
        new_fingerprint=fingerprint,
        load_from_cache_file=False,
        desc="Restoring the order",
    )


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
    sampler.notice_context(tokenized[PROMPT_TOKENS][:])
    # A text with a character for each token: it compares like the list, in a tenth of its memory.
    prompts = [
        "".join(map(chr, ids)) for page in tokenized.select_columns([PROMPT_IDS]).iter(PAGE) for ids in page[PROMPT_IDS]
    ]
    order = plan_order(prompts, tokenized[ANSWER_TOKENS][:], [sampler.settings.candidates] * len(prompts))
    return tokenized.select(order), order

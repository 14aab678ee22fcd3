"""From a list of rejects a row to one preference pair a row, with every drop counted by its cause."""

import os
from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

from datasets import Dataset, DatasetDict, Features, List, Value

from t2s_pref import lineage
from t2s_pref.betrayal import betrayal
from t2s_pref.cache import cached_map
from t2s_pref.columns import (
    ALTERNATIVES,
    ANSWERS,
    CHOSEN,
    CHOSEN_FROM,
    COT,
    COT_STATUS,
    DIALECT,
    DISTANCE,
    GOLD_DETAIL,
    GOLD_VERDICT,
    OUTPUT,
    RAW,
    RAW_ANSWER,
    REJECTED,
    REJECTED_INDEX,
    RESULT_DIGEST,
    SAMPLED,
    SECONDS,
    STATUS,
    STRINGS,
    TOKENS,
    VERDICT,
    VERDICT_DETAIL,
    check_columns,
    check_dialects,
    check_string_lists,
    check_strings,
    each_split,
)
from t2s_pref.errors import UserError
from t2s_pref.formats import format_of
from t2s_pref.pairing import GOLD, OWN, Answer, Reject, check_chosen, chosen_answers, pair_up, proven_right
from t2s_pref.settings import DEDUPS, SAMPLING_DEFAULTS, SELECTS
from t2s_pref.sql import check_dialect, normalize_sql
from t2s_pref.verdicts import RIGHT, VERDICTS, WRONG

# Raise it when the same rows give other pairs: results of older code are then not served.
PAIRS_VERSION = 3

# Why a reject is not kept, if not for its verdict; the empty string where it is.
KEPT = ""
EMPTY = "empty"
SAME_AS_GOLD = "same_as_gold"
DUPLICATE = "duplicate"
NOT_SELECTED = "not_selected"
NO_CHOSEN = "no_chosen"

DROP = "drop_cause"
MATE = "chosen_place"


def explode_rejected(
    dataset: Dataset | DatasetDict,
    dedup: str = "none",
    dialect: str = "sqlite",
    *,
    keep: Collection[str] | None = None,
    chosen: str = "gold",
    select: str = "first",
    max_per_row: int | None = None,
    seed: int = SAMPLING_DEFAULTS["seed"],
    cache_dir: str | os.PathLike[str] | None = None,
    **map_kwargs: Any,
) -> Dataset | DatasetDict:
    """One preference pair a row from each row's list of rejects.

    A reject that equals a gold after normalisation, or is empty, is never kept, whatever the arguments. Where the
    candidates have reasoning (`answers`), both sides of a pair do: a right candidate's, or a chain of thought of the
    gold (`cot`).

    Args:
        dataset: columns read: `output` (`str`, the gold), `rejected` (`list[str]`), and where present `alternatives`
            (`list[str]`, further accepted golds), `dialect` (`str`, the sqlglot name of the row's SQL dialect), what
            `generate_rejected` notes a candidate, what `verify_rejected` found, and the `cot` (`list[str]`) of
            `generate_cot`.
        dedup: which rejects of one row count as one: `none`, `exact` (after strip) or `normalized` (by sqlglot: case,
            spacing, comments).
        dialect: SQL dialect of rows without one of their own.
        keep: the verdicts whose rejects are kept; by default `WRONG`, those proven wrong. Rejects that were not
            verified have no verdict, and are kept whatever they are.
        chosen: `gold`; `own`, a candidate of the model that is proven right, is another text than the gold and does not
            speak of a given answer; or `own_or_gold`, the gold where the model has none. Of several, each is chosen as
            often as the others.
        select: which pairs come first where a row has more than `max_per_row`, and which right answer a reject is
            paired with: `first` as sampled, `hardest` the two whose syntax trees differ least, `diverse` rejects of
            other verdicts and other results, `closest_length` the least difference in characters, `random` by `seed`.
        max_per_row: how many pairs of one row are kept; by default one for each reject.
        seed: of `random`.
        cache_dir: folder of results, by default `t2s_pref` under `HF_HOME`.
        **map_kwargs: `desc`, `writer_batch_size` and `load_from_cache_file` of `Dataset.map`.

    Returns:
        The source columns of each row, once a kept reject, with `chosen` (`str`, the gold), `rejected` (`str`),
        `rejected_index` (`int64`, its place in the list); where kept `raw_answer` (`str`, the whole answer), and where
        verified `verdict`, `verdict_detail` (`str`) and `distance` (`float64`). With reasoning, or another `chosen`
        than the gold, also `chosen_from` (`str`, `gold` or `own`). What else was noted a candidate
        (`candidate_status`, `generated_tokens`, `generation_seconds`, `result_digest`) or a gold is left out.

    Raises:
        [`UserError`]: on an unknown `dedup`, `dialect`, `chosen`, `select` or verdict, on missing columns, on
            `num_proc`.

    >>> from datasets import Dataset
    >>> rows = Dataset.from_dict({"output": ["SELECT 1"], "rejected": [["SELECT 2", "select 1;", "SELECT  2"]]})
    >>> explode_rejected(rows, dedup="normalized")[:]
    {'output': ['SELECT 1'], 'rejected': ['SELECT 2'], 'chosen': ['SELECT 1'], 'rejected_index': [0]}
    """

    def explode(part: Dataset) -> Dataset:
        marked = mark_drops(
            part,
            dedup,
            dialect,
            keep=keep,
            chosen=chosen,
            select=select,
            max_per_row=max_per_row,
            seed=seed,
            cache_dir=cache_dir,
            **map_kwargs,
        )
        features = {name: feature for name, feature in marked.features.items() if name not in (*NOTES, RAW)}
        features |= {CHOSEN: Value("string"), REJECTED: Value("string"), REJECTED_INDEX: Value("int64")}
        features |= {name: feature for name, feature in EXPLODED.items() if name in marked.column_names}
        if chosen != GOLD or ANSWERS in marked.column_names:
            features |= {CHOSEN_FROM: Value("string")}
        if RAW in marked.column_names:
            features |= {RAW_ANSWER: Value("string")}
        pairs = cached_map(
            marked,
            partial(_explode, say_from=CHOSEN_FROM in features),
            step="pairs",
            key={"version": PAIRS_VERSION, "chosen": chosen},
            features=Features(features),
            remove_columns=[name for name in marked.column_names if name not in features],
            cache_dir=cache_dir,
            map_kwargs=dict(map_kwargs),
        )
        options = {"dedup": dedup, "chosen": chosen, "select": select, "max_per_row": max_per_row}
        options |= {"split": str(part.split)} if part.split else {}
        options |= {"keep": list(check_verdicts(keep))} if keep is not None else {}
        lineage.note(pairs, step=lineage.PAIRED, **_counts(marked), **options)
        return pairs

    return each_split(dataset, explode)


def _counts(marked: Dataset) -> dict[str, Any]:
    """What became of the candidates, for the card of a dataset."""
    sampled = [status for of_row in marked[STATUS][:] for status in of_row] if STATUS in marked.column_names else []
    unusable = Counter(status for status in sampled if status != SAMPLED)
    causes = Counter(cause for of_row in marked[DROP][:] for cause in of_row)
    kept = causes.pop(KEPT, 0)
    counts = {"rows": len(marked), "candidates": kept + causes.total() + unusable.total(), "pairs": kept}
    verdicts = Counter(v for of_row in marked[VERDICT][:] for v in of_row) if VERDICT in marked.column_names else {}
    return {**counts, "dropped": dict((causes + unusable).most_common()), "verdicts": dict(verdicts)}


def mark_drops(
    dataset: Dataset,
    dedup: str,
    dialect: str,
    *,
    keep: Collection[str] | None = None,
    chosen: str = GOLD,
    select: str = "first",
    max_per_row: int | None = None,
    seed: int = SAMPLING_DEFAULTS["seed"],
    cache_dir: str | os.PathLike[str] | None = None,
    **map_kwargs: Any,
) -> Dataset:
    """Add `drop_cause` (`list[str]`, one a reject): why it is not kept, or `""` where it is; and `chosen_place`
    (`list[int64]`): where the answer is that is chosen against it, among the candidates or, from -1 down, the gold's.
    """
    if dedup not in DEDUPS:
        raise UserError(f"dedup is {dedup!r}; it must be one of {', '.join(DEDUPS)}.")
    check_dialect(dialect)
    _check_rejects(dataset)
    kept = _check_keep(dataset, keep)
    _check_chosen(dataset, chosen, kept)
    _check_select(dataset, chosen, select, max_per_row)

    def mark(rows: dict[str, list]) -> dict[str, list]:
        marks: dict[str, list] = {DROP: [], MATE: []}
        for values in zip(*rows.values(), strict=True):
            row = dict(zip(rows, values, strict=True))
            rejects, found = row[REJECTED] or [], row.get(VERDICT)
            if VERDICT in row and len(found or ()) != len(rejects):
                # concatenate_datasets fills a column that one part lacks with null
                count = len(found or ())
                raise UserError(f"A row has {len(rejects)} rejects and {count} verdicts; verify_rejected judges all.")
            golds = [gold for gold in (row[OUTPUT], *(row.get(ALTERNATIVES) or ())) if gold]
            own = row.get(DIALECT) or dialect
            causes = drop_causes(golds, rejects, dedup, own, found, kept)
            answers, sides = _sides(row, causes, chosen)
            pairs = pair_up(answers, sides, select, max_per_row, dialect=own, seed=seed)
            lost = NOT_SELECTED if answers else NO_CHOSEN
            marks[DROP].append([
                lost if cause == KEPT and place not in pairs else cause for place, cause in enumerate(causes)
            ])  # fmt: skip
            marks[MATE].append([pairs.get(place, 0) for place in range(len(rejects))])
        return marks

    texts = List(Value("string"))
    options = {"keep": sorted(kept), "chosen": chosen, "select": select, "max_per_row": max_per_row, "seed": seed}
    return cached_map(
        dataset,
        mark,
        step="marked",
        key={"version": PAIRS_VERSION, "dedup": dedup, "dialect": dialect, **options},
        features=Features({**dataset.features, REJECTED: texts, DROP: texts, MATE: List(Value("int64"))}),
        cache_dir=cache_dir,
        map_kwargs={"desc": "Comparing with the gold", **map_kwargs},
    )


def _sides(row: dict[str, Any], causes: list[str], chosen: str) -> tuple[list[Answer], list[Reject]]:
    """What of a row may be chosen, and the rejects that are kept so far."""
    sqls = row[REJECTED] or []
    reasons = ANSWERS in row
    texts = row[ANSWERS] or [] if reasons else sqls
    if len(texts) != len(sqls):
        raise UserError(f"A row has {len(sqls)} rejects and {len(texts)} {ANSWERS}; each reject has its answer there.")
    found = row.get(VERDICT) or [""] * len(sqls)
    digests = row.get(RESULT_DIGEST) or [""] * len(sqls)
    distances = row.get(DISTANCE) or [0.0] * len(sqls)
    rejects = [
        Reject(place, texts[place], sqls[place], found[place], digests[place], distances[place])
        for place, cause in enumerate(causes)
        if cause == KEPT
    ]
    right = proven_right("fenced" if reasons else "sql")
    own = [
        Answer(place, texts[place], sqls[place])
        for place, verdict in enumerate(found)
        if verdict in right
        and not (reasons and betrayal(texts[place]))  # learnt from its teacher, and not to be praised
    ]
    of_gold = (row.get(COT) or []) if reasons else [row[OUTPUT]]
    expected = format_of(rejects[0].text) if reasons and rejects else "sql"
    if chosen != OWN and rejects and (other := {format_of(text) for text in of_gold} - {expected}):
        raise UserError(
            f"A row's gold is in the format {other.pop()!r} and its candidates in {expected!r}; both sides of a pair "
            "must be in one: sample with the answer_format (--cot) of the golds or chains of thought."
        )
    golds = [Answer(-1 - number, text, row[OUTPUT]) for number, text in enumerate(of_gold)]
    return chosen_answers(chosen, own, golds), rejects


def _check_chosen(dataset: Dataset, chosen: str, kept: Collection[str]) -> None:
    check_chosen(chosen)
    if chosen != GOLD and (right := sorted(set(kept) & set(RIGHT))):
        raise UserError(f"keep has {right[0]!r}, and chosen={chosen!r} chooses what is right: one of them.")
    if chosen != GOLD:
        check_columns(dataset, (VERDICT,), f"chosen={chosen!r} needs what verify_rejected adds.")
    elif ANSWERS in dataset.column_names:
        way_out = "the candidates have reasoning, so the gold needs it too: generate_cot adds it, or chosen='own'."
        check_columns(dataset, (COT,), way_out)


def _check_rejects(dataset: Dataset) -> None:
    check_columns(dataset, (OUTPUT, REJECTED), "generate_rejected adds 'rejected', load_sft makes the others.")
    feature = dataset.features[REJECTED]
    if feature in STRINGS:
        raise UserError("Column 'rejected' holds one reject a row: these are pairs already; explode comes before.")
    check_string_lists(dataset, REJECTED)
    for name in (ALTERNATIVES, ANSWERS, COT):
        check_string_lists(dataset, name)
    check_strings(dataset, OUTPUT)
    check_dialects(dataset)


def _check_keep(dataset: Dataset, keep: Collection[str] | None) -> Collection[str]:
    if keep is None:
        return WRONG
    kept = check_verdicts(keep)
    check_columns(dataset, (VERDICT,), "keep= chooses by verdict; verify_rejected adds them.")
    return kept


def check_verdicts(keep: Collection[str]) -> tuple[str, ...]:
    """The verdicts to keep, one as a string too, or [`UserError`] where one is none."""
    kept = (keep,) if isinstance(keep, str) else tuple(keep)
    if unknown := sorted(set(kept) - set(VERDICTS)):
        raise UserError(f"keep has {unknown[0]!r}, which is no verdict; verdicts are {', '.join(VERDICTS)}.")
    return kept


def _check_select(dataset: Dataset, chosen: str, select: str, max_per_row: int | None) -> None:
    if select not in SELECTS:
        raise UserError(f"select is {select!r}; it must be one of {', '.join(SELECTS)}.")
    if max_per_row is None:
        if select != "first" and chosen == GOLD and COT not in dataset.column_names:
            raise UserError(f"select={select!r} chooses among more rejects than max_per_row, which is not given.")
    elif not isinstance(max_per_row, int) or max_per_row < 1:
        raise UserError(f"max_per_row is {max_per_row!r}; it must be 1 or more.")
    needed = {"hardest": (DISTANCE,), "diverse": (VERDICT, RESULT_DIGEST)}.get(select, ())
    check_columns(dataset, needed, f"select={select!r} needs what verify_rejected adds.")


def drop_causes(
    golds: Sequence[str],
    rejects: Sequence[str],
    dedup: str,
    dialect: str,
    verdicts: Sequence[str] | None = None,
    keep: Collection[str] = WRONG,
) -> list[str]:
    """Why each reject of one row is not kept, `""` where it is; its verdict where that is why.

    >>> drop_causes(["SELECT 1"], ["SELECT 2", " select 1 ;", "", "SELECT 2"], "exact", "sqlite")
    ['', 'same_as_gold', 'empty', 'duplicate']
    """
    causes = []
    seen: set[str] = set()
    same_texts = {form for gold in golds for form in (gold.strip(), normalize_sql(gold, dialect))}
    for place, reject in enumerate(rejects):
        text = (reject or "").strip()
        same = {"none": None, "exact": text, "normalized": normalize_sql(text, dialect)}[dedup]
        if not text.rstrip("; \n\t"):
            causes.append(EMPTY)
        elif text in same_texts or normalize_sql(text, dialect) in same_texts:
            causes.append(SAME_AS_GOLD)
        elif verdicts is not None and verdicts[place] not in keep:
            causes.append(verdicts[place])
        elif same in seen:
            causes.append(DUPLICATE)
        else:
            causes.append(KEPT)
            if same is not None:
                seen.add(same)
    return causes


# What belongs to a candidate, a gold or a run, and not to a pair.
NOTES = (STATUS, TOKENS, SECONDS, RESULT_DIGEST, GOLD_VERDICT, GOLD_DETAIL, DROP, MATE, ANSWERS, COT, COT_STATUS)
# What a pair takes from the lists of its row.
EXPLODED = {VERDICT: Value("string"), VERDICT_DETAIL: Value("string"), DISTANCE: Value("float64")}


def _explode(rows: dict[str, list], say_from: bool) -> dict[str, list]:
    count = len(rows[OUTPUT])
    kept = [(row, place) for row in range(count) for place, cause in enumerate(rows[DROP][row]) if cause == KEPT]
    pairs = {name: [values[row] for row, _ in kept] for name, values in rows.items() if name not in (*NOTES, RAW)}
    texts = rows.get(ANSWERS, rows[REJECTED])
    golds = rows.get(COT) if ANSWERS in rows else [[gold] for gold in rows[OUTPUT]]
    mates = [rows[MATE][row][place] for row, place in kept]
    pairs[CHOSEN] = [
        texts[row][mate] if mate >= 0 else golds[row][-1 - mate] for (row, _), mate in zip(kept, mates, strict=True)
    ]
    pairs[REJECTED] = [texts[row][place] for row, place in kept]
    pairs[REJECTED_INDEX] = [place for _, place in kept]
    if say_from:
        pairs[CHOSEN_FROM] = ["own" if mate >= 0 else "gold" for mate in mates]
    for name in EXPLODED:
        if name in rows:
            pairs[name] = [rows[name][row][place] for row, place in kept]
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

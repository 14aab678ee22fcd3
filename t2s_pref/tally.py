"""The numbers of a run, counted from its columns, so that a cached run prints the same."""

import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from html import escape
from typing import Any

from datasets import Dataset, DatasetDict

from t2s_pref import lineage, verdicts
from t2s_pref.columns import (
    ANSWERS,
    COT,
    FAILED,
    GOLD_VERDICT,
    NO_SQL,
    OFF_FORMAT,
    OUTPUT,
    PROMPT_TOO_LONG,
    REJECTED,
    SAMPLED,
    SECONDS,
    STATUS,
    TOKENS,
    TRUNCATED,
    VERDICT,
    each_split,
)
from t2s_pref.pairs import DROP, DUPLICATE, EMPTY, KEPT, MATE, NO_CHOSEN, NOT_SELECTED, SAME_AS_GOLD, mark_drops
from t2s_pref.settings import SAMPLING_DEFAULTS

_GOLD = "look at the golds (t2s-pref audit)"
_LIMIT = "raise --timeout"
_POLICY = "only single queries are run"

# Each cause in plain words, and the setting that changes it. A verdict that is kept is none.
CAUSES = {
    TRUNCATED: ("reached the length cap", "raise --max-new-tokens"),
    PROMPT_TOO_LONG: ("prompt longer than the context", "shorten the schemas or use a model with a longer context"),
    NO_SQL: ("no SQL in the answer", "look at the answers (keep_raw); is this an instruct or fine-tuned model?"),
    OFF_FORMAT: (
        "reasoning or SQL out of place",
        "look at the answers (keep_raw); was it trained on the format?",
    ),
    FAILED: ("the server failed", "run the same command again: only these are asked for anew"),
    EMPTY: ("empty", "look at the answers (keep_raw)"),
    SAME_AS_GOLD: ("the gold again", "raise --temperature, or sample more candidates"),
    verdicts.SAME_TEXT: ("right by its text", "raise --temperature"),
    verdicts.SAME_AST: ("right by its text", "raise --temperature"),
    verdicts.EQUIVALENT: ("right by its result", "raise --temperature"),
    verdicts.AMBIGUOUS: ("perhaps right", "see verdict_detail"),
    verdicts.WEAK: ("too little in the result to tell", "add data, or instances of the databases"),
    verdicts.NOT_SQL: ("no SQL", "look at the answers (keep_raw)"),
    verdicts.BLOCKED: ("writes, or asks for what is not allowed", _POLICY),
    verdicts.MULTI_STATEMENT: ("several statements", _POLICY),
    verdicts.TIMEOUT: ("took too long", _LIMIT),
    verdicts.RESOURCE: ("took too much memory or too many rows", "see verdict_detail"),
    verdicts.WORKER_DIED: ("its process died", "see verdict_detail"),
    verdicts.UNVERIFIED: ("gold proves nothing", _GOLD),
    verdicts.WRONG_RESULT: ("proven wrong by its result", "add wrong_result to keep"),
    verdicts.SYNTAX_ERROR: ("proven wrong: syntax error", "add syntax_error to keep"),
    verdicts.MISSING_TABLE: ("proven wrong: no such table", "add missing_table to keep"),
    verdicts.MISSING_COLUMN: ("proven wrong: no such column", "add missing_column to keep"),
    verdicts.MISSING_FUNCTION: ("proven wrong: no such function", "add missing_function to keep"),
    verdicts.OTHER_ERROR: ("proven wrong: another error", "add other_error to keep"),
    DUPLICATE: ("duplicate in its row", "raise --temperature or --top-p"),
    NO_CHOSEN: ("proven wrong, but no candidate is right", "sample more candidates, or --chosen own_or_gold"),
    NOT_SELECTED: ("more than --max-per-row", "raise --max-per-row"),
    verdicts.GOLD_ERROR: ("gold fails", _GOLD),
    verdicts.GOLD_TIMEOUT: ("gold takes too long", "raise --gold-timeout"),
    verdicts.GOLD_TRUNCATED: ("gold returns too much", _GOLD),
    verdicts.GOLD_NONDETERMINISTIC: ("gold is not determined by the data", _GOLD),
    verdicts.NO_DATABASE: ("no database", "see --databases"),
}

# Of rows without a pair: every candidate is right, whatever shows it.
MASTERED = "mastered"
CAUSES[MASTERED] = ("mastered: every candidate is right", "there is nothing to learn from them at this temperature")

UNPROVEN = "A reject differs from the gold as text; none of them was executed or proven wrong."

COUNTS = ("rows", "candidates", "pairs", "mastered", "all_wrong", "proven", "longer", "gap")

# From this share of the candidates on, a cause is worth a setting.
WORTH_A_HINT = 0.1

# From this share on, a difference of the lengths is a signal that training may follow; of a few pairs it is chance.
UNEVEN = 0.25
ENOUGH_PAIRS = 20


@dataclass(frozen=True)
class Summary:
    """Counts of one run; prints as a table, and as HTML in Jupyter.

    `rows` and `candidates` were asked for, `pairs` kept; `drops` counts the other candidates by cause, so that
    `pairs + sum(drops.values()) == candidates`. `rows_without_pair` counts rows by the causes that left them without.
    Where the rejects were verified, `verdicts` counts them by verdict, `golds` the rows by that of their gold,
    `mastered` the rows all of whose candidates are right, `all_wrong` those of which all are proven wrong, and `proven`
    the pairs that are proven wrong. `tokens` were generated in `seconds` of decoding, by one process each. `lengths`
    are the characters of all chosen and of all rejected answers, `longer` the pairs whose chosen answer is the longer,
    and `gap` is the sum of the differences, each as a positive number.
    """

    rows: int
    candidates: int
    pairs: int
    drops: dict[str, int]
    rows_without_pair: dict[tuple[str, ...], int]
    verdicts: dict[str, int] = field(default_factory=dict)
    golds: dict[str, int] = field(default_factory=dict)
    mastered: int = 0
    all_wrong: int = 0
    proven: int = 0
    longer: int = 0
    gap: int = 0
    lengths: tuple[int, int] = (0, 0)
    tokens: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def lines(self) -> list[tuple[str, str, str]]:
        """Label, value and share of every number, in reading order."""
        without = sum(self.rows_without_pair.values())
        table = [
            ("rows", f"{self.rows:,}", ""),
            ("candidates", f"{self.candidates:,}", ""),
            ("kept as pairs", f"{self.pairs:,}", _share(self.pairs, self.candidates)),
        ]
        for cause, (words, _) in CAUSES.items():
            if count := self.drops.get(cause, 0):
                table.append((f"dropped: {words}", f"{count:,}", _share(count, self.candidates)))
        table.append(("rows without a pair", f"{without:,}", _share(without, self.rows)))
        for causes, count in sorted(self.rows_without_pair.items(), key=lambda item: (-item[1], item[0])):
            words = " + ".join(CAUSES[cause][0] for cause in causes) or "no candidates"
            table.append((f"  by cause: {words}", f"{count:,}", _share(count, self.rows)))
        if self.pairs:
            mean = [total / self.pairs for total in self.lengths]
            table.append(("characters of a chosen answer", f"{mean[0]:,.0f}", ""))
            table.append(("characters of a rejected answer", f"{mean[1]:,.0f}", ""))
            table.append(("characters between a pair's sides", f"{self.gap / self.pairs:,.0f}", ""))
            table.append(("pairs whose chosen answer is longer", f"{self.longer:,}", _share(self.longer, self.pairs)))
        if self.verdicts:
            table.append(("rows all right", f"{self.mastered:,}", _share(self.mastered, self.rows)))
            table.append(("rows all wrong", f"{self.all_wrong:,}", _share(self.all_wrong, self.rows)))
        if self.golds:
            proof = sum(self.golds.get(verdict, 0) for verdict in verdicts.GOLD_USABLE)
            table.append(("rows whose gold can prove something", f"{proof:,}", _share(proof, self.rows)))
            table += [
                (f"  not: {CAUSES[verdict][0]}", f"{count:,}", _share(count, self.rows))
                for verdict, count in self.golds.items()
                if verdict not in verdicts.GOLD_USABLE
            ]
        if self.verdicts:
            table.append(("verdicts", f"{sum(self.verdicts.values()):,}", ""))
            table += [
                (f"  {verdict}", f"{count:,}", _share(count, sum(self.verdicts.values())))
                for verdict, count in self.verdicts.items()
            ]
        if self.tokens:
            table.append(("tokens generated", f"{self.tokens:,}", ""))
        if self.tokens and self.verdicts:
            table.append(("proven pairs for 1,000 tokens", f"{1000 * self.proven / self.tokens:,.1f}", ""))
        if self.seconds:
            table.append(("tokens a second, a process", f"{self.tokens / self.seconds:,.0f}", ""))
        return table

    def hints(self) -> list[str]:
        """Which setting to turn, for each cause that cost a tenth of the candidates or more, and for uneven lengths."""
        gap = self.lengths[0] - self.lengths[1]
        uneven = []
        if self.pairs >= ENOUGH_PAIRS and abs(gap) > UNEVEN * max(self.lengths):
            which = "longer" if gap > 0 else "shorter"
            uneven.append(
                f"chosen answers are {which} by {abs(gap) / self.pairs:,.0f} characters, which is then what is learnt; "
                "--select closest_length with --max-per-row"
            )
        return uneven + [
            f"{_share(count, self.candidates)} of the candidates: {words}; {way_out}"
            for cause, (words, way_out) in CAUSES.items()
            if (count := self.drops.get(cause, 0)) and count >= WORTH_A_HINT * self.candidates
        ]

    def __str__(self) -> str:
        table = self.lines()
        wide = max(len(label) for label, _, _ in table)
        lines = [f"{label:<{wide}}  {value:>10}  {share:>7}".rstrip() for label, value, share in table]
        return "\n".join([*self.notes, *lines, *(f"hint: {hint}" for hint in self.hints())])

    def _repr_html_(self) -> str:
        notes = "".join(f"<div>{escape(note)}</div>" for note in self.notes)
        rows = "".join(
            f"<tr><td style='text-align:left;white-space:pre'>{escape(label)}</td>"
            f"<td style='text-align:right'>{value}</td><td style='text-align:right'>{share}</td></tr>"
            for label, value, share in self.lines()
        )
        hints = "".join(f"<li>{escape(hint)}</li>" for hint in self.hints())
        return f"{notes}<table>{rows}</table>{f'<ul>{hints}</ul>' if hints else ''}"


def summary(
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
) -> Summary:
    """Count what became of every candidate of a run.

    Args:
        dataset: what `generate_rejected` or `verify_rejected` returned; columns read: `output`, `rejected`, and where
            present `alternatives`, `candidate_status`, `generated_tokens`, `generation_seconds`, `verdict` and
            `gold_verdict`.
        dedup, dialect, keep, chosen, select, max_per_row, seed: as given to `explode_rejected`, whose drops are
            counted.
    """
    parts: list[Summary] = []
    options = {"keep": keep, "chosen": chosen, "select": select, "max_per_row": max_per_row, "seed": seed}

    def count(part: Dataset) -> Dataset:
        parts.append(_count(mark_drops(part, dedup, dialect, **options, cache_dir=cache_dir)))
        return part

    each_split(dataset, count)
    added = {
        name: dict(sum((Counter(getattr(part, name)) for part in parts), Counter()))
        for name in ("drops", "rows_without_pair", "verdicts", "golds")
    }
    return Summary(
        **{name: sum(getattr(part, name) for part in parts) for name in COUNTS},
        **{name: _in_order(counts) if name in ("verdicts", "golds") else counts for name, counts in added.items()},
        lengths=tuple(map(sum, zip(*(part.lengths for part in parts), strict=True))) or (0, 0),
        tokens=sum(part.tokens for part in parts),
        seconds=sum(part.seconds for part in parts),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def _in_order(counts: dict[str, int]) -> dict[str, int]:
    order = (*verdicts.VERDICTS, *verdicts.GOLD_VERDICTS)
    return {verdict: counts[verdict] for verdict in order if verdict in counts}


def _count(marked: Dataset) -> Summary:
    noted = STATUS in marked.column_names
    drops: Counter[str] = Counter()
    without: Counter[tuple[str, ...]] = Counter()
    found: Counter[str] = Counter()
    golds: Counter[str] = Counter()
    pairs = candidates = tokens = mastered = all_wrong = proven = longer = gap = 0
    lengths = [0, 0]
    seconds = 0.0
    wanted = (STATUS, TOKENS, SECONDS, VERDICT, GOLD_VERDICT, ANSWERS, COT)
    columns = [OUTPUT, REJECTED, DROP, MATE, *(name for name in wanted if name in marked.column_names)]
    for row in marked.select_columns(columns):
        lost = [status for status in row[STATUS] if status != SAMPLED] if noted else []
        of_row = row.get(VERDICT) or []
        is_mastered = bool(of_row) and not lost and set(of_row) <= set(verdicts.RIGHT)
        mastered += is_mastered
        all_wrong += bool(of_row) and not lost and set(of_row) <= set(verdicts.WRONG)
        for ours, theirs in _lengths(row):
            lengths = [lengths[0] + ours, lengths[1] + theirs]
            longer += ours > theirs
            gap += abs(ours - theirs)
        lost += [cause for cause in row[DROP] if cause != KEPT]
        kept = row[DROP].count(KEPT)
        causes = zip(row[DROP], of_row, strict=False)
        proven += sum(cause == KEPT and verdict in verdicts.WRONG for cause, verdict in causes)
        pairs, candidates = pairs + kept, candidates + kept + len(lost)
        drops.update(lost)
        found.update(of_row)
        if gold := row.get(GOLD_VERDICT):
            golds[gold] += 1
            if gold not in verdicts.GOLD_USABLE:
                lost = [gold]
        if not kept:
            without[(MASTERED,) if is_mastered else tuple(sorted(set(lost)))] += 1
        tokens += sum(row.get(TOKENS) or ())
        seconds += row.get(SECONDS) or 0.0
    verified = VERDICT in marked.column_names
    notes = (*lineage.told(marked), *(() if verified else (UNPROVEN,)))
    return Summary(
        rows=len(marked),
        candidates=candidates,
        pairs=pairs,
        drops=dict(drops),
        rows_without_pair=dict(without),
        verdicts=dict(found),
        golds=dict(golds),
        mastered=mastered,
        all_wrong=all_wrong,
        proven=proven,
        longer=longer,
        gap=gap,
        lengths=tuple(lengths),
        tokens=tokens,
        seconds=seconds,
        notes=notes,
    )


def _lengths(row: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """The characters of both sides of each pair of a row."""
    texts = row.get(ANSWERS, row[REJECTED]) or []
    golds = row.get(COT) or [] if ANSWERS in row else [row[OUTPUT]]
    for place, (cause, mate) in enumerate(zip(row[DROP], row[MATE], strict=True)):
        if cause == KEPT:
            yield len(texts[mate] if mate >= 0 else golds[-1 - mate]), len(texts[place])


def _share(count: int, of: int) -> str:
    return f"{100 * count / of:.1f} %" if of else ""

"""The numbers of a run, counted from its columns, so that a cached run prints the same."""

import os
from collections import Counter
from dataclasses import dataclass
from html import escape

from datasets import Dataset, DatasetDict

from t2s_pref.columns import (
    NO_SQL,
    PROMPT_TOO_LONG,
    SAMPLED,
    SECONDS,
    STATUS,
    TOKENS,
    TRUNCATED,
    each_split,
)
from t2s_pref.pairs import DROP, DUPLICATE, EMPTY, KEPT, SAME_AS_GOLD, mark_drops

# Each cause in plain words, and the setting that changes it.
CAUSES = {
    TRUNCATED: ("reached the length cap", "raise --max-new-tokens"),
    PROMPT_TOO_LONG: ("prompt longer than the context", "shorten the schemas or use a model with a longer context"),
    NO_SQL: ("no SQL in the answer", "look at the answers (keep_raw); is this an instruct or fine-tuned model?"),
    EMPTY: ("empty", "look at the answers (keep_raw)"),
    SAME_AS_GOLD: ("the gold again", "raise --temperature or --num-rejects"),
    DUPLICATE: ("duplicate in its row", "raise --temperature or --top-p"),
}

UNPROVEN = "A reject differs from the gold as text; none of them was executed or proven wrong."

# From this share of the candidates on, a cause is worth a setting.
WORTH_A_HINT = 0.1


@dataclass(frozen=True)
class Summary:
    """Counts of one run; prints as a table, and as HTML in Jupyter.

    `rows` and `candidates` were asked for, `pairs` kept; `drops` counts the other candidates by cause, so that
    `pairs + sum(drops.values()) == candidates`. `rows_without_pair` counts rows by the causes that left them without.
    `tokens` were generated in `seconds` of decoding, by one process each.
    """

    rows: int
    candidates: int
    pairs: int
    drops: dict[str, int]
    rows_without_pair: dict[tuple[str, ...], int]
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
        if self.tokens:
            table.append(("tokens generated", f"{self.tokens:,}", ""))
        if self.seconds:
            table.append(("tokens a second, a process", f"{self.tokens / self.seconds:,.0f}", ""))
        return table

    def hints(self) -> list[str]:
        """Which setting to turn, for each cause that cost a tenth of the candidates or more."""
        return [
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
    cache_dir: str | os.PathLike[str] | None = None,
) -> Summary:
    """Count what became of every candidate of a run.

    Args:
        dataset: what `generate_rejected` returned; columns read: `output`, `rejected`, and where present
            `candidate_status`, `generated_tokens` and `generation_seconds`.
        dedup, dialect: as given to `explode_rejected`, whose drops are counted.
    """
    parts: list[Summary] = []

    def count(part: Dataset) -> Dataset:
        parts.append(_count(mark_drops(part, dedup, dialect, cache_dir=cache_dir)))
        return part

    each_split(dataset, count)
    return Summary(
        rows=sum(part.rows for part in parts),
        candidates=sum(part.candidates for part in parts),
        pairs=sum(part.pairs for part in parts),
        drops=dict(sum((Counter(part.drops) for part in parts), Counter())),
        rows_without_pair=dict(sum((Counter(part.rows_without_pair) for part in parts), Counter())),
        tokens=sum(part.tokens for part in parts),
        seconds=sum(part.seconds for part in parts),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def _count(marked: Dataset) -> Summary:
    noted = STATUS in marked.column_names
    drops: Counter[str] = Counter()
    without: Counter[tuple[str, ...]] = Counter()
    pairs = candidates = tokens = 0
    seconds = 0.0
    columns = [DROP, *(name for name in (STATUS, TOKENS, SECONDS) if name in marked.column_names)]
    for row in marked.select_columns(columns):
        lost = [status for status in row[STATUS] if status != SAMPLED] if noted else []
        lost += [cause for cause in row[DROP] if cause != KEPT]
        kept = row[DROP].count(KEPT)
        pairs, candidates = pairs + kept, candidates + kept + len(lost)
        drops.update(lost)
        if not kept:
            without[tuple(sorted(set(lost)))] += 1
        tokens += sum(row.get(TOKENS) or ())
        seconds += row.get(SECONDS) or 0.0
    notes = (*marked.info.description.splitlines(), UNPROVEN)
    return Summary(len(marked), candidates, pairs, dict(drops), dict(without), tokens, seconds, notes)


def _share(count: int, of: int) -> str:
    return f"{100 * count / of:.1f} %" if of else ""

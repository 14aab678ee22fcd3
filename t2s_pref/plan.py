"""Which candidates are decoded together: a pure function of lengths, settings and budget."""

from collections.abc import Sequence
from dataclasses import dataclass

# Rows that `Dataset.map` hands over at a time. A batch never crosses a page, so this bounds a batch's rows, how often
# the progress bar moves, and nothing else: what is sampled is safe in the store batch by batch.
PAGE = 64


@dataclass(frozen=True)
class Part:
    """Some candidates of one row, decoded in one batch."""

    row: int
    candidates: range


def plan_order(prompt_tokens: Sequence[int], answer_tokens: Sequence[int]) -> list[int]:
    """Positions of all rows, like beside like, longest first.

    Prompts of equal length need no padding, answers of equal length end together. The longest come first so that a
    budget that is too large shows in the first minute of a run, not in its last.

    >>> plan_order([10, 500, 10], [7, 20, 9])
    [1, 2, 0]
    """
    return sorted(range(len(prompt_tokens)), key=lambda row: (-prompt_tokens[row], -answer_tokens[row], row))


def cut_batches(
    prompt_tokens: Sequence[int], answer_tokens: Sequence[int], candidates: Sequence[range], budget: int
) -> list[list[Part]]:
    """Cut the rows of one page, in their order, into batches of at most `budget` tokens of cache.

    A batch costs its sequences times the longest prompt plus the longest expected answer, padding included. Rows are
    kept whole where one fits; the candidates of a row too large for that are divided, down to single ones, which are
    decoded whatever they cost. A row that wants no candidates is in no batch.

    >>> batches = cut_batches([10, 10, 90], [0, 0, 0], [range(3)] * 3, 100)
    >>> [[(part.row, len(part.candidates)) for part in batch] for batch in batches]
    [[(0, 3), (1, 3)], [(2, 1)], [(2, 1)], [(2, 1)]]
    """
    batches: list[list[Part]] = []
    parts: list[Part] = []
    sequences = longest_prompt = longest_answer = 0
    for row, (prompt, answer, wanted) in enumerate(zip(prompt_tokens, answer_tokens, candidates, strict=True)):
        if not wanted:
            continue
        together = max(prompt, longest_prompt) + max(answer, longest_answer)
        if parts and (sequences + len(wanted)) * together > budget:
            batches.append(parts)
            parts, sequences, longest_prompt, longest_answer = [], 0, 0, 0
        if len(wanted) * (prompt + answer) > budget:
            at_once = max(1, budget // max(1, prompt + answer))
            batches += [[Part(row, wanted[start : start + at_once])] for start in range(0, len(wanted), at_once)]
            continue
        parts.append(Part(row, wanted))
        sequences += len(wanted)
        longest_prompt, longest_answer = max(prompt, longest_prompt), max(answer, longest_answer)
    if parts:
        batches.append(parts)
    return batches

"""Which candidates are decoded together, around which shared beginning: a function of prompts, lengths and budget."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

# Rows that are planned and sampled at a time. A batch never crosses a page, so this bounds a batch's rows, what several
# ranks share out among each other, and nothing else.
PAGE = 128

# A shared beginning shorter than this is not worth keys and values, and a matrix product, of its own.
LEVEL = 64


@dataclass(frozen=True)
class Group:
    """Rows whose prompts have their first `shared` tokens in common, which are read once for all of them."""

    rows: tuple[int, ...]
    shared: int


@dataclass(frozen=True)
class Part:
    """Candidates of one row, and how many tokens of its prompt are read once for all of its group."""

    row: int
    candidates: range
    shared: int


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two prompts have in common from their beginning.

    >>> common([1, 2, 3], [1, 2, 9, 9])
    2
    """
    least, most = 0, min(len(one), len(other))
    while least < most:  # slices compare at the speed of C, so halving beats looking token by token
        middle = (least + most + 1) // 2
        if one[least:middle] == other[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least


def group_rows(prompts: Sequence[Sequence[int]], sequences: Sequence[int]) -> list[Group]:
    """Rows by the beginnings of their prompts, over as many levels (system prompt, schema) as pay.

    All rows begin as one group. A set of rows below it whose prompts agree further becomes a group of its own where the
    copies of that further part, one a sequence, hold more than the beginning that the new group has to repeat. At least
    one token of each prompt stays outside of what is shared: its logits are needed.

    Args:
        prompts: token ids.
        sequences: how many candidates each row is sampled for.

    Returns:
        Groups in the order of their prompts' token ids, each with its rows in that order.

    >>> schema, other = list(range(100)), list(range(200, 400))
    >>> group_rows([schema + [1], other + [7, 7], schema + [2], other + [8]], [3, 3, 3, 3])
    [Group(rows=(0, 2), shared=100), Group(rows=(1, 3), shared=200)]
    """
    order = sorted(range(len(prompts)), key=lambda row: (prompts[row], row))
    # how far each row agrees with the one before it
    agree = [0, *(common(prompts[a], prompts[b]) for a, b in pairwise(order))]
    groups: list[Group] = []

    def depth(start: int, stop: int) -> int:
        shortest = min(len(prompts[order[place]]) for place in range(start, stop)) - 1
        return max(0, min([shortest, *agree[start + 1 : stop]]))

    def children(start: int, stop: int, shared: int) -> list[tuple[int, int]]:
        cuts = [start, *(place for place in range(start + 1, stop) if agree[place] <= shared), stop]
        return list(pairwise(cuts))

    # An explicit stack: prompts that nest deeply would exhaust Python's own.
    pending = [(0, len(order), depth(0, len(order)))] if order else []
    while pending:
        start, stop, shared = pending.pop()
        mine: list[int] = []
        below = children(start, stop, shared)[::-1]
        while below:
            first, last = below.pop()
            deeper = depth(first, last)
            further = deeper - shared
            copies = sum(sequences[order[place]] for place in range(first, last)) - 1
            # a lone sequence saves nothing, but its neighbours no longer wait for its longer prompt
            if further >= LEVEL and further * max(1, copies) >= shared:
                pending.append((first, last, deeper))
            elif len(parts := children(first, last, deeper)) > 1:
                below += parts[::-1]
            else:
                mine += range(first, last)
        if mine:
            groups.append(Group(tuple(order[place] for place in mine), shared))
    return sorted(groups, key=lambda group: prompts[group.rows[0]])


def plan_order(prompts: Sequence[Sequence[int]], answer_tokens: Sequence[int], sequences: Sequence[int]) -> list[int]:
    """Positions of all rows, like beside like: group by group, and in a group the longest answers first.

    Answers of equal length end together. The groups with the longest prompts come first, so that a budget that is too
    large shows in the first minute of a run, not in its last.

    >>> plan_order([[1, 5], [1, 6], [1, 7]], [7, 20, 9], [3, 3, 3])
    [1, 2, 0]
    """
    groups = group_rows(prompts, sequences)
    groups.sort(key=lambda group: (-max(len(prompts[row]) for row in group.rows), min(group.rows)))
    return [row for group in groups for row in sorted(group.rows, key=lambda row: (-answer_tokens[row], row))]


def slots_within(budget: int, beginnings: int, sequences: int, room: int) -> int:
    """How many sequences of `room` tokens of their own are decoded at a time; one, where not even that fits.

    >>> slots_within(1000, 400, 50, 60)
    10
    """
    return max(1, min(sequences, (budget - beginnings) // max(1, room)))


def cut_batches(
    prompts: Sequence[Sequence[int]],
    answer_tokens: Sequence[int],
    candidates: Sequence[range],
    budget: int,
    held_once: bool = True,
) -> list[list[Part]]:
    """Cut the rows of one page into batches that hold at most `budget` tokens of keys and values.

    A batch holds the beginning of each of its groups once, and for each sequence that is decoded at a time the rest of
    the longest prompt and the longest expected answer. A group whose candidates do not all fit at once is still one
    batch: as candidates end, others take their places. Further groups join while everything fits at once. A row that
    wants no candidates is in no batch. Nothing but a single sequence is ever over the budget.

    Args:
        prompts, answer_tokens: token ids, and how many tokens each answer is expected to have.
        candidates: the numbers of the candidates of each row.
        held_once: `False` where a model cannot share keys and values between sequences: each then holds a copy.

    >>> schema, budget = list(range(100)), 230
    >>> batches = cut_batches([schema + [1], schema + [2], [5] * 90], [9, 9, 0], [range(3)] * 3, budget)
    >>> [[(part.row, len(part.candidates), part.shared) for part in batch] for batch in batches]
    [[(0, 3, 100), (1, 3, 100)], [(2, 3, 89)]]
    """
    wanted = [row for row in range(len(prompts)) if candidates[row]]
    found = group_rows([prompts[row] for row in wanted], [len(candidates[row]) for row in wanted])
    groups = [Group(tuple(sorted(wanted[row] for row in group.rows)), group.shared) for group in found]
    groups.sort(key=lambda group: group.rows[0])  # the page's own order
    batches: list[list[Part]] = []
    batch: list[Part] = []
    beginnings = sequences = room = 0
    for group in groups:
        shared = group.shared if held_once else 0
        copied = group.shared - shared
        needed = [copied + len(prompts[row]) + answer_tokens[row] for row in group.rows]
        for piece in _fitting(group.rows, needed, budget):
            own = max(len(prompts[row]) - shared + answer_tokens[row] for row in piece)
            count = sum(len(candidates[row]) for row in piece)
            if batch and beginnings + group.shared + (sequences + count) * max(room, own) > budget:
                batches.append(batch)
                batch, beginnings, sequences, room = [], 0, 0, 0
            batch += [Part(row, candidates[row], group.shared) for row in piece]
            beginnings, sequences, room = beginnings + group.shared, sequences + count, max(room, own)
    return [*batches, batch] if batch else batches


def _fitting(rows: Sequence[int], needed: Sequence[int], budget: int) -> Iterator[list[int]]:
    """A group's rows, in pieces: one of which a single sequence is over the budget goes alone."""
    piece: list[int] = []
    for row, tokens in zip(rows, needed, strict=True):
        if tokens > budget:
            if piece:
                yield piece
            yield [row]
            piece = []
        else:
            piece.append(row)
    if piece:
        yield piece

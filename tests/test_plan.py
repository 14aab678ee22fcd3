"""What the plan promises: every candidate once, batches within the budget, and the same plan for the same lengths."""

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from t2s_pref.plan import cut_batches, plan_order

LENGTHS = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 60)), max_size=40)
CANDIDATES = st.integers(1, 8)
BUDGET = st.integers(1, 3000)


def cut(lengths, candidates, budget):
    return cut_batches([p for p, _ in lengths], [a for _, a in lengths], [range(candidates)] * len(lengths), budget)


def cost(batch, lengths):
    """Sequences times the longest prompt plus the longest answer: what padding makes of a batch."""
    sequences = sum(len(part.candidates) for part in batch)
    return sequences * (max(lengths[part.row][0] for part in batch) + max(lengths[part.row][1] for part in batch))


@given(LENGTHS, CANDIDATES, BUDGET)
@example([(0, 0)], 3, 1)
def test_every_candidate_of_every_row_is_in_exactly_one_batch_and_in_order(lengths, candidates, budget):
    planned = [(part.row, c) for batch in cut(lengths, candidates, budget) for part in batch for c in part.candidates]
    assert planned == [(row, c) for row in range(len(lengths)) for c in range(candidates)]


@given(LENGTHS, CANDIDATES, BUDGET)
def test_no_batch_is_over_the_budget_but_a_single_candidate_that_is_so_alone(lengths, candidates, budget):
    for batch in cut(lengths, candidates, budget):
        alone = len(batch) == 1 and len(batch[0].candidates) == 1
        assert alone or cost(batch, lengths) <= budget


@given(LENGTHS, CANDIDATES, BUDGET)
def test_a_row_that_fits_the_budget_is_never_divided(lengths, candidates, budget):
    for batch in cut(lengths, candidates, budget):
        for part in batch:
            if candidates * sum(lengths[part.row]) <= budget:
                assert part.candidates == range(candidates)


@given(LENGTHS, CANDIDATES, BUDGET)
def test_a_row_too_large_for_the_budget_shares_no_batch_and_is_cut_as_little_as_can_be(lengths, candidates, budget):
    for batch in cut(lengths, candidates, budget):
        for part in batch:
            if candidates * sum(lengths[part.row]) > budget:
                assert len(batch) == 1
                last = part.candidates.stop == candidates
                assert last or (len(part.candidates) + 1) * sum(lengths[part.row]) > budget


@given(LENGTHS, CANDIDATES, BUDGET)
def test_neighbouring_batches_of_whole_rows_could_not_have_been_one(lengths, candidates, budget):
    for left, right in pairwise(cut(lengths, candidates, budget)):
        assert cost([*left, right[0]], lengths) > budget


def test_without_rows_there_are_no_batches():
    assert cut_batches([], [], [], 100) == []
    assert plan_order([], []) == []


@given(LENGTHS)
def test_the_order_has_every_row_once_longest_prompts_first_then_longest_answers(lengths):
    order = plan_order([p for p, _ in lengths], [a for _, a in lengths])
    assert sorted(order) == list(range(len(lengths)))
    planned = [lengths[row] for row in order]
    assert planned == sorted(lengths, reverse=True)


@given(LENGTHS)
def test_the_same_lengths_give_the_same_order_and_rows_of_equal_length_keep_theirs(lengths):
    prompts, answers = [p for p, _ in lengths], [a for _, a in lengths]
    order = plan_order(prompts, answers)
    assert order == plan_order(list(prompts), list(answers))
    for left, right in pairwise(order):
        assert left < right or lengths[left] != lengths[right]

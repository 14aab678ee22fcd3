"""What the plan promises: every candidate once, batches within the budget, groups that pay, and the same plan again."""

import random

from hypothesis import example, given
from hypothesis import strategies as st

from t2s_pref.plan import LEVEL, common, cut_batches, group_rows, plan_order, slots_within


@st.composite
def datasets(draw):
    """Prompts that agree in many ways: system prompts, schemas and questions of a few words, or nothing."""
    systems = [[1] * draw(st.integers(0, 90)) for _ in range(draw(st.integers(1, 2)))]
    schemas = [
        [*draw(st.sampled_from(systems)), *[10 + number] * draw(st.integers(0, 150))]
        for number in range(draw(st.integers(1, 4)))
    ]
    question = st.lists(st.integers(50, 52), min_size=1, max_size=100)
    prompts = draw(st.lists(st.builds(lambda a, b: [*a, *b], st.sampled_from(schemas), question), max_size=25))
    answers = draw(st.lists(st.integers(0, 60), min_size=len(prompts), max_size=len(prompts)))
    candidates = [range(draw(st.integers(0, 2)), draw(st.integers(2, 8))) for _ in prompts]
    return prompts, answers, candidates


BUDGET = st.integers(1, 3000)
ONCE = st.booleans()


def sequences(dataset):
    return [len(wanted) for wanted in dataset[2]]


def cost(batch, dataset, once):
    """Tokens of keys and values: each beginning once, and, for one sequence, the longest rest and answer."""
    prompts, answers, _ = dataset
    beginnings = {tuple(prompts[part.row][: part.shared]) for part in batch}
    own = max(len(prompts[part.row]) - (part.shared if once else 0) + answers[part.row] for part in batch)
    return sum(map(len, beginnings)), own, sum(len(part.candidates) for part in batch)


@given(datasets(), BUDGET, ONCE)
@example(([[5]], [0], [range(3)]), 1, True)
def test_every_candidate_of_every_row_is_in_exactly_one_batch(dataset, budget, once):
    batches = cut_batches(*dataset, budget, once)
    planned = sorted((part.row, candidate) for batch in batches for part in batch for candidate in part.candidates)
    assert planned == [(row, candidate) for row, wanted in enumerate(dataset[2]) for candidate in wanted]
    assert all(batch for batch in batches)


@given(datasets(), BUDGET, ONCE)
def test_no_batch_is_over_the_budget_but_a_single_sequence_that_is_so_alone(dataset, budget, once):
    for batch in cut_batches(*dataset, budget, once):
        beginnings, own, count = cost(batch, dataset, once)
        at_once = slots_within(budget, beginnings, count, own)
        assert beginnings + at_once * own <= budget or (at_once == 1 and len(batch) == 1)


@given(datasets(), BUDGET, ONCE)
def test_several_groups_are_together_only_where_all_of_their_sequences_fit_at_once(dataset, budget, once):
    for batch in cut_batches(*dataset, budget, once):
        if len({tuple(dataset[0][part.row][: part.shared]) for part in batch}) > 1:
            beginnings, own, count = cost(batch, dataset, once)
            assert beginnings + count * own <= budget


@given(datasets(), ONCE)
def test_the_plan_is_a_function_of_what_it_is_given_and_prompts_may_be_lists_tuples_or_texts(dataset, once):
    prompts, answers, candidates = dataset
    tuples = list(map(tuple, prompts))
    texts = ["".join(map(chr, prompt)) for prompt in prompts]
    for budget in (10, 500, 5000):
        plan = cut_batches(*dataset, budget, once)
        assert plan == cut_batches(tuples, answers, candidates, budget, once)
        assert plan == cut_batches(texts, answers, candidates, budget, once)
    assert plan_order(prompts, answers, sequences(dataset)) == plan_order(texts, answers, sequences(dataset))


@given(datasets())
def test_the_rows_of_a_group_share_what_they_are_said_to_and_each_keeps_a_token_of_its_own(dataset):
    prompts = dataset[0]
    groups = group_rows(prompts, sequences(dataset))
    assert sorted(row for group in groups for row in group.rows) == list(range(len(prompts)))
    for group in groups:
        assert len({tuple(prompts[row][: group.shared]) for row in group.rows}) == 1
        assert all(group.shared < len(prompts[row]) for row in group.rows)


@given(datasets(), st.integers(1, 9))
def test_groups_hold_no_more_than_one_group_of_all_rows_would(dataset, candidates):
    prompts = dataset[0]
    counts = [candidates] * len(prompts)
    if not prompts:
        return

    def held(shared, rows):
        return shared + sum(counts[row] * (len(prompts[row]) - shared) for row in rows)

    agreed = min(min(common(prompts[0], prompt) for prompt in prompts), min(map(len, prompts)) - 1)
    together = sum(held(group.shared, group.rows) for group in group_rows(prompts, counts))
    # a row that is sampled once may repeat a beginning that is shorter than the rest of its prompt
    assert together <= held(agreed, range(len(prompts))) * (2 if candidates == 1 else 1)


def test_schemas_below_one_system_prompt_are_groups_and_questions_that_begin_alike_are_not():
    system, schemas = [1] * 50, ([2] * 2000, [3] * 1500)
    questions = [[7, 8, 9, number] for number in range(8)]
    prompts = [[*system, *schema, *question] for question in questions for schema in schemas]
    groups = group_rows(prompts, [3] * 16)
    assert [(len(group.rows), group.shared) for group in groups] == [(8, 2053), (8, 1553)]


def test_a_group_of_its_own_has_to_pay_for_repeating_what_is_before_it():
    schema = [1] * 2000
    evidence = [[*schema, *[10 + row] * 100, row] for row in range(4)]
    assert [group.shared for group in group_rows(evidence, [8] * 4)] == [2000]
    assert [group.shared for group in group_rows(evidence, [25] * 4)] == [2100] * 4


def test_rows_that_share_nothing_are_groups_of_one():
    prompts = [[row] * (LEVEL + row + 2) for row in range(5)]
    groups = group_rows(prompts, [1] * 5)
    assert [(len(group.rows), group.shared) for group in groups] == [(1, LEVEL + row + 1) for row in range(5)]


def test_a_group_that_does_not_fit_at_once_is_one_batch_whose_sequences_take_turns():
    prompts = [[*[1] * 100, row] for row in range(50)]
    (batch,) = cut_batches(prompts, [10] * 50, [range(8)] * 50, 300)
    assert sum(len(part.candidates) for part in batch) == 400


def test_without_rows_there_are_no_batches():
    assert cut_batches([], [], [], 100) == []
    assert plan_order([], [], []) == []
    assert group_rows([], []) == []


@given(datasets())
def test_the_order_has_every_row_once_group_by_group_and_the_longest_answers_of_a_group_first(dataset):
    prompts, answers, _ = dataset
    order = plan_order(prompts, answers, sequences(dataset))
    assert sorted(order) == list(range(len(prompts)))
    place = {row: number for number, row in enumerate(order)}
    groups = group_rows(prompts, sequences(dataset))
    for group in groups:
        places = sorted(place[row] for row in group.rows)
        assert places == list(range(places[0], places[0] + len(places)))
        ranked = sorted(group.rows, key=place.__getitem__)
        assert [answers[row] for row in ranked] == sorted((answers[row] for row in group.rows), reverse=True)
    if groups:
        longest = max(map(len, prompts))
        first = next(group for group in groups if order[0] in group.rows)
        assert longest == max(len(prompts[row]) for row in first.rows)


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40))
def test_the_common_beginning_is_what_a_look_at_each_token_finds(one, other):
    expected = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    assert common(one, other) == expected


def test_prompts_that_nest_a_thousand_deep_are_planned():
    prompts = [[1] * length for length in range(2, 1500)]
    random.Random(0).shuffle(prompts)
    assert sorted(row for group in group_rows(prompts, [1] * len(prompts)) for row in group.rows) == list(
        range(len(prompts))
    )

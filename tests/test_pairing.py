"""Which right answer meets which wrong one: properties over every choice, and what each way of selecting means."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2s_pref.pairing import Answer, Reject, chosen_answers, pair_up, proven_right
from t2s_pref.settings import CHOSENS, SELECTS
from t2s_pref.trees import distance
from t2s_pref.verdicts import RIGHT, WRONG

QUERIES = ["SELECT a FROM t", "SELECT a, b FROM t", "SELECT b FROM u WHERE c = 1", "SELECT count(*) FROM t GROUP BY a"]
ANSWERS = st.lists(st.sampled_from(QUERIES), max_size=4).map(
    lambda sqls: [Answer(100 + place, f"because {place}\n{sql}", sql) for place, sql in enumerate(sqls)]
)
REJECTS = st.lists(st.tuples(st.sampled_from(QUERIES), st.sampled_from(WRONG), st.sampled_from("ab")), max_size=6).map(
    lambda each: [
        Reject(place, f"so: {sql}", sql, verdict, digest, place / 10)
        for place, (sql, verdict, digest) in enumerate(each)
    ]
)


@given(ANSWERS, REJECTS, st.sampled_from(SELECTS), st.none() | st.integers(1, 4), st.integers())
def test_each_reject_is_in_one_pair_at_most_and_chosen_answers_take_turns(answers, rejects, select, most, seed):
    pairs = pair_up(answers, rejects, select, most, seed=seed)
    assert len(pairs) == (min(len(rejects), len(rejects) if most is None else most) if answers else 0)
    assert set(pairs) <= {each.place for each in rejects}
    assert set(pairs.values()) <= {each.place for each in answers}
    if pairs:
        uses = Counter({each.place: 0 for each in answers}) + Counter()
        uses.update(pairs.values())
        counts = [uses[each.place] for each in answers]
        assert max(counts) - min(counts) <= 1
    assert pairs == pair_up(answers, rejects, select, most, seed=seed)


@given(ANSWERS.filter(bool), REJECTS.filter(bool))
def test_the_hardest_pair_is_the_one_whose_trees_differ_least(answers, rejects):
    ((reject, answer),) = pair_up(answers, rejects, "hardest", 1).items()
    sqls = {each.place: each.sql for each in (*answers, *rejects)}
    least = min(distance(one.sql, other.sql, "sqlite") for one in answers for other in rejects)
    assert distance(sqls[answer], sqls[reject], "sqlite") == least


@given(ANSWERS.filter(bool), REJECTS.filter(bool))
def test_the_closest_length_is_that_of_the_two_texts(answers, rejects):
    ((reject, answer),) = pair_up(answers, rejects, "closest_length", 1).items()
    texts = {each.place: each.text for each in (*answers, *rejects)}
    least = min(abs(len(one.text) - len(other.text)) for one in answers for other in rejects)
    assert abs(len(texts[answer]) - len(texts[reject])) == least


def test_random_pairs_follow_from_seed_and_texts_alone():
    answers = [Answer(place, f"yes {place}", "") for place in range(3)]
    rejects = [Reject(10 + place, f"no {place}", "") for place in range(8)]

    def texts(of, seed):
        pairs = pair_up(answers, of, "random", 3, seed=seed)
        named = {each.place: each.text for each in (*answers, *of)}
        return {(named[answer], named[reject]) for reject, answer in pairs.items()}

    moved = [each._replace(place=50 - each.place) for each in reversed(rejects)]
    assert texts(rejects, 1) == texts(moved, 1)
    assert len({frozenset(texts(rejects, seed)) for seed in range(20)}) > 10


def test_against_the_gold_the_hardest_is_what_verification_found_nearest():
    rejects = [Reject(0, "a", "SELECT 1", distance=0.5), Reject(1, "b", "SELECT 2", distance=0.1)]
    assert pair_up([Answer(-1, "gold", "SELECT 3")], rejects, "hardest", 1) == {1: -1}


@pytest.mark.parametrize("chosen", CHOSENS)
@given(ANSWERS, ANSWERS)
def test_own_is_never_the_golds_and_own_or_gold_falls_back_on_it_only_without_any(chosen, own, gold):
    gold = [each._replace(place=-1 - number) for number, each in enumerate(gold)]
    found = chosen_answers(chosen, own, gold)
    source = {"gold": gold, "own": own, "own_or_gold": own or gold}[chosen]
    assert {each.text for each in found} == {each.text for each in source}
    assert len({each.text for each in found}) == len(found)
    assert set(found) <= set(source)


def test_a_bare_query_that_is_the_golds_text_is_not_the_models_own_but_reasoning_is():
    assert "same_text" not in proven_right("sql")
    assert set(proven_right("fenced")) == set(proven_right("think")) == set(RIGHT)

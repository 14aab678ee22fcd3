"""What users of evaluate can rely on: each measure counts what its source counts, and no bad gold is in a share."""

import itertools
import json
import sqlite3
from contextlib import closing

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from t2s_pref import (
    SamplingSettings,
    TransformersEngine,
    UserError,
    demo_files,
    evaluate,
    generate_rejected,
    load_sft,
    verify_rejected,
)
from t2s_pref.accuracy import MEASURES, pass_at, score
from t2s_pref.pool import Bounds
from t2s_pref.verify import open_verifier, question

SCHEMA = """
CREATE TABLE singer (id INTEGER, name TEXT, age INTEGER, country TEXT, score REAL);
INSERT INTO singer VALUES (1, 'Ana', 30, 'FR', 0.1), (2, 'Bo', 40, 'FR', 0.2), (3, 'Cy', 40, 'DE', 0.3),
    (4, 'Cy', 25, 'DE', NULL);
"""


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    path = tmp_path_factory.mktemp("accuracy") / "music.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(SCHEMA)
    return path


def measured(databases, cache_dir, gold, *answers, alternatives=(), seconds=5.0):
    """The verdict on the gold, and for each answer which measures take it for right."""
    rows = Dataset.from_dict({"output": [gold], "alternatives": [list(alternatives)]})
    bounds = Bounds(timeout=seconds)
    with open_verifier(rows, databases, bounds, None, 1, cache_dir) as judge:
        asked = [question(row, "output", judge.databases) for row in rows]
        ((verdict, scores),) = score(judge, asked, [list(answers)])
    return verdict, [{name for name in MEASURES if scores[answer][name]} for answer in answers]


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("SELECT name FROM singer", "SELECT name FROM singer ORDER BY id DESC", {"strict", "bird", "spider"}),
        # duplicates: BIRD's sets do not see them, and Spider's command takes DISTINCT out of both
        ("SELECT name FROM singer", "SELECT DISTINCT name FROM singer", {"bird", "spider"}),
        ("SELECT name FROM singer", "SELECT name FROM singer UNION SELECT name FROM singer", {"bird"}),
        # the order that the gold asks for: only BIRD does not look
        ("SELECT id FROM singer ORDER BY id", "SELECT id FROM singer ORDER BY id DESC", {"bird"}),
        # the order of the columns: only Spider does not look
        ("SELECT name, age FROM singer", "SELECT age, name FROM singer", {"spider"}),
        # a column more is wrong for all
        ("SELECT name FROM singer", "SELECT name, age FROM singer", set()),
        # nothing in common
        ("SELECT name FROM singer", "SELECT country FROM singer", set()),
        ("SELECT name FROM singer", "SELECT nme FROM singer", set()),
        ("SELECT name FROM singer", "DELETE FROM singer", set()),
        ("SELECT name FROM singer", "", set()),
        # numbers: 1 and 1.0 are one for all, the last digits of a sum for none
        ("SELECT 1", "SELECT 1.0", {"strict", "bird", "spider"}),
        ("SELECT 0.3", "SELECT 0.1 + 0.2", set()),
        ("SELECT '1'", "SELECT 1", set()),
        # both empty
        ("SELECT id FROM singer WHERE id > 9", "SELECT id FROM singer WHERE id < 0", {"strict", "bird", "spider"}),
    ],
)
def test_each_measure_takes_for_right_what_its_source_does(music, cache_dir, gold, answer, right):
    assert measured(music, cache_dir, gold, answer) == ("gold_empty" if "> 9" in gold else "ok", [right])


def test_an_answer_that_takes_too_long_is_not_right_and_the_others_are_scored(music, cache_dir):
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
    gold = "SELECT name FROM singer"
    _, right = measured(music, cache_dir, gold, endless, f"{gold};", seconds=1)
    assert right == [set(), set(MEASURES)]


def test_any_accepted_gold_makes_an_answer_right(music, cache_dir):
    found = measured(
        music, cache_dir, "SELECT name FROM singer", "SELECT id FROM singer", alternatives=["SELECT id FROM singer"]
    )
    assert found == ("ok", [set(MEASURES)])


@pytest.mark.parametrize(
    ("gold", "verdict"),
    [("SELECT nme FROM singer", "gold_error"), ("SELECT name FROM singer LIMIT 1", "gold_nondeterministic")],
)
def test_a_gold_that_tells_nothing_makes_nothing_right(music, cache_dir, gold, verdict):
    assert measured(music, cache_dir, gold, gold) == (verdict, [set()])


def test_right_means_right_on_every_instance(tmp_path, cache_dir):
    for name, rows in (("a", "(1, 2)"), ("b", "(1, 2), (2, 2)")):
        path = tmp_path / "databases" / "d" / f"{name}.sqlite"
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript(f"CREATE TABLE t (x INTEGER, y INTEGER); INSERT INTO t VALUES {rows}")
    rows = Dataset.from_dict({"db_id": ["d"], "output": ["SELECT count(*) FROM t"]})
    with open_verifier(rows, tmp_path / "databases", Bounds(), None, 1, cache_dir) as judge:
        asked = [question(rows[0], "output", judge.databases)]
        answers = ["SELECT 1", "SELECT count(x) FROM t"]
        ((_, scores),) = score(judge, asked, [answers])
    assert [[scores[answer][name] for name in MEASURES] for answer in answers] == [[False] * 3, [True] * 3]


# -- pass@k ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_all_choices_of_k_with_a_right_one(drawn, data):
    k = data.draw(st.integers(1, len(drawn)))
    chosen = list(itertools.combinations(drawn, k))
    assert pass_at(len(drawn), sum(drawn), k) == pytest.approx(sum(map(any, chosen)) / len(chosen))


# -- with a model ----------------------------------------------------------------------------------------------------

SETTINGS = SamplingSettings(num_rejects=3, max_new_tokens=64)
BROKEN = 3  # the row whose gold is made to fail


@pytest.fixture(scope="module")
def rows():
    """Sixteen bundled rows of three databases, one with a gold that fails."""
    held_out = load_sft(demo_files().heldout)
    chosen = held_out.shuffle(seed=0).select(range(16))
    golds = chosen["output"][:]
    golds[BROKEN] = "SELECT nothing FROM nowhere"
    return chosen.remove_columns("output").add_column("output", golds)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluations")


@pytest.fixture(scope="module")
def found(rows, cache):
    return evaluate(rows, TransformersEngine(demo_files().model), demo_files().databases, SETTINGS, cache_dir=cache)


def test_rows_with_a_bad_gold_are_in_no_share_and_are_shown(found, rows):
    assert found.rows[""] == 15
    assert found.golds["gold_error"] == 1
    assert sum(found.golds.values()) == len(rows)
    assert "rows left out" in str(found)
    assert sum(found.verdicts["greedy"][""].values()) == 15


def test_the_databases_together_make_up_the_whole(found):
    databases = [name for name in found.rows if name]
    assert len(databases) == 3
    assert sum(found.rows[name] for name in databases) == found.rows[""]
    for shares in found.accuracy.values():
        for measure in MEASURES:
            mean = sum(found.rows[name] * shares[name][measure] for name in databases) / found.rows[""]
            assert shares[""][measure] == pytest.approx(mean)


def test_more_tries_are_never_worse_and_the_model_gets_some_right(found):
    assert list(found.accuracy) == ["greedy", "pass@1", "pass@3"]
    for database in found.rows:
        for measure in MEASURES:
            assert found.accuracy["pass@1"][database][measure] <= found.accuracy["pass@3"][database][measure]
    assert 0 < found.accuracy["greedy"][""]["strict"] < 1


def test_greedy_accuracy_is_what_verify_rejected_finds_of_the_same_answers(found, rows, cache):
    greedy = SamplingSettings(num_rejects=1, max_new_tokens=64, temperature=0.0)
    sampled = generate_rejected(rows, TransformersEngine(demo_files().model), greedy, cache_dir=cache)
    judged = verify_rejected(sampled, demo_files().databases, cache_dir=cache)
    usable = [row for row in judged if row["gold_verdict"] in ("ok", "gold_empty")]
    right = ("equivalent", "same_ast", "same_text", "weak")
    count = sum(row["verdict"][0] in right for row in usable if row["verdict"])
    assert found.accuracy["greedy"][""]["strict"] == pytest.approx(count / len(usable))


def test_another_run_finds_the_same_and_json_holds_it(found, rows, cache):
    again = evaluate(rows, demo_files().model, demo_files().databases, SETTINGS, cache_dir=cache)
    assert again == found
    assert json.loads(json.dumps(found.to_dict())) == {**found.to_dict(), "notes": list(found.notes)}


def test_greedy_settings_are_evaluated_once(rows, cache):
    greedy = SamplingSettings(max_new_tokens=64, temperature=0.0)
    found = evaluate(rows.select(range(4)), demo_files().model, demo_files().databases, greedy, cache_dir=cache)
    assert list(found.accuracy) == ["greedy"]


def test_no_rows_and_no_database_are_refused(rows, cache):
    with pytest.raises(UserError, match="no rows"):
        evaluate(rows.select([]), demo_files().model, demo_files().databases, SETTINGS, cache_dir=cache)
    with pytest.raises(UserError, match="nowhere"):  # before the model is looked for
        evaluate(rows, "no/model", "nowhere", SETTINGS, cache_dir=cache)
    with pytest.raises(UserError, match="workers is 0"):
        evaluate(rows, "no/model", demo_files().databases, SETTINGS, workers=0, cache_dir=cache)
    bad = rows.select(range(2)).remove_columns("output").add_column("output", ["SELECT nope"] * 2)
    with pytest.raises(UserError, match="None of 2 golds can tell what is right: {'gold_error': 2}"):
        evaluate(bad, demo_files().model, demo_files().databases, SETTINGS, cache_dir=cache)

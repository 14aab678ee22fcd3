"""What users of verify_rejected can rely on: each verdict for what it is, nothing right called wrong or run twice."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, List, Value, load_from_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t2s_pref import WRONG, UserError, audit_golds, explode_rejected, lineage, verify_rejected
from t2s_pref.store import SampleStore

SCHEMA = """
CREATE TABLE singer (id INTEGER PRIMARY KEY, name TEXT, age INTEGER, country TEXT, score REAL);
INSERT INTO singer VALUES (1, 'Ana', 30, 'FR', 0.25), (2, 'Bo', 40, 'FR', 0.5), (3, 'Cy', 40, 'DE', 0.125),
    (4, 'Di', 25, 'DE', NULL), (5, 'ana ', 25, '', 2.0);
CREATE TABLE empty (a INTEGER);
"""
SLOW = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
MANY = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 100001) SELECT x FROM c"


def make(path, script=SCHEMA, more=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script + more)
    return path


@pytest.fixture(scope="module")
def music(tmp_path_factory):
    """A folder with one database, `music`."""
    folder = tmp_path_factory.mktemp("databases")
    make(folder / "music" / "music.sqlite")
    return folder


def rows(*pairs, db_id="music", **columns):
    golds, rejects = zip(*pairs, strict=True)
    named = {"db_id": [db_id] * len(pairs)} if db_id else {}
    return Dataset.from_dict({**named, "output": golds, "rejected": rejects, **columns})


def verdicts(databases, cache_dir, gold, *rejects, **kwargs):
    found = verify_rejected(rows((gold, list(rejects))), databases, cache_dir=cache_dir, **kwargs)
    return found["verdict"][0]


# -- verdicts --------------------------------------------------------------------------------------------------------

GOLD = "SELECT name FROM singer WHERE age > 29"


@pytest.mark.parametrize(
    ("reject", "verdict"),
    [
        (f" {GOLD} ", "same_text"),
        ("select NAME from singer where age>29; -- all", "same_ast"),
        (f"Here you are:\n```sql\n{GOLD}\n```", "same_text"),
        ("SELECT name FROM singer WHERE NOT age <= 29", "equivalent"),
        ("SELECT name FROM singer WHERE age >= 29 ORDER BY id DESC", "equivalent"),
        ("SELECT name FROM singer", "wrong_result"),
        ("SELECT name FROM singer WHERE age > 99", "wrong_result"),
        ("SELECT name, age FROM singer WHERE age > 29", "ambiguous"),
        ("SELECT upper(name) FROM singer WHERE age > 29", "ambiguous"),
        ("SELECT name FROM singer WHERE age > 29 UNION ALL SELECT 'Bo'", "ambiguous"),
        ("SELECT name FROM singer WHERE age > 29 ORDER BY random() LIMIT 2", "ambiguous"),
        ("SELECT name FROM singer ORDER BY age DESC, score LIMIT 2", "wrong_result"),
        ("SELECT nme FROM singer", "missing_column"),
        ("SELECT name FROM singers", "missing_table"),
        ("SELECT capital(name) FROM singer", "missing_function"),
        ("SELECT name FROM singer WHERE", "syntax_error"),
        ("SELCT name FROM singer", "syntax_error"),
        ("SELECT name FROM singer WHERE age > (SELECT id, age FROM singer)", "other_error"),
        ("DELETE FROM singer", "blocked"),
        ("PRAGMA table_info(singer)", "blocked"),
        ("SELECT 1; DROP TABLE singer", "multi_statement"),
        ("", "empty"),
        (" ; ", "empty"),
        ("I do not know.", "not_sql"),
        (SLOW, "timeout"),
        (MANY, "resource"),
        ("SELECT hex(zeroblob(99999999))", "resource"),
    ],
)
def test_each_reject_has_the_verdict_it_deserves(music, cache_dir, reject, verdict):
    assert verdicts(music, cache_dir, GOLD, reject, timeout=1) == [verdict]


@pytest.mark.parametrize(
    ("gold", "reject", "verdict"),
    [
        ("SELECT a FROM empty", "SELECT name FROM singer WHERE age > 99", "weak"),
        ("SELECT count(*) FROM empty", "SELECT count(*) FROM singer WHERE age > 99", "weak"),
        ("SELECT max(a) FROM empty", "SELECT max(a) FROM empty WHERE a = 7", "weak"),
        ("SELECT id FROM singer ORDER BY id", "SELECT id FROM singer ORDER BY id DESC", "ambiguous"),
        ("SELECT id FROM (SELECT id FROM singer ORDER BY id)", "SELECT id FROM singer ORDER BY id DESC", "equivalent"),
        ("SELECT score FROM singer WHERE id = 3", "SELECT round(score, 2) FROM singer WHERE id = 3", "ambiguous"),
        ("SELECT score FROM singer WHERE id < 4", "SELECT score * 100 FROM singer WHERE id < 4", "ambiguous"),
        ("SELECT country FROM singer", "SELECT nullif(country, '') FROM singer", "ambiguous"),
        ("SELECT age FROM singer", "SELECT CAST(age AS TEXT) FROM singer", "ambiguous"),
        ("SELECT 7 / 2.0", "SELECT 7 / 2", "wrong_result"),
        ("SELECT count(*) FROM singer", "SELECT count(score) FROM singer", "wrong_result"),
    ],
)
def test_what_a_result_shows_decides(music, cache_dir, gold, reject, verdict):
    assert verdicts(music, cache_dir, gold, reject) == [verdict]


@pytest.mark.parametrize(
    ("gold", "verdict"),
    [
        ("SELECT nme FROM singer", "gold_error"),
        ("DELETE FROM singer", "gold_error"),
        ("", "gold_error"),
        (SLOW, "gold_timeout"),
        (MANY, "gold_truncated"),
        ("SELECT name FROM singer ORDER BY age DESC LIMIT 1", "gold_nondeterministic"),
        ("SELECT name FROM singer LIMIT 2", "gold_nondeterministic"),
        ("SELECT group_concat(name) FROM singer", "gold_nondeterministic"),
        ("SELECT country, name FROM singer GROUP BY country", "gold_nondeterministic"),
        ("SELECT name FROM singer ORDER BY random() LIMIT 1", "gold_nondeterministic"),
        ("SELECT date('now')", "gold_nondeterministic"),
    ],
)
def test_a_gold_that_proves_nothing_condemns_nothing(music, cache_dir, gold, verdict):
    rejects = ["SELECT 1", "SELECT nme FROM singer", "SELECT * FROM nope", "SELEC", gold]
    found = verify_rejected(rows((gold, rejects)), music, gold_timeout=1, cache_dir=cache_dir)
    assert found["gold_verdict"][:] == [verdict]
    assert found["gold_detail"][0]
    assert set(found["verdict"][0]) == {"unverified"}
    assert len(explode_rejected(found, cache_dir=cache_dir)) == 0


@pytest.mark.parametrize(
    "gold",
    [
        "SELECT name FROM singer ORDER BY age DESC, id LIMIT 1",
        "SELECT age FROM singer ORDER BY age DESC LIMIT 2",
        "SELECT country, max(age), name FROM singer WHERE country = 'DE' GROUP BY country",
        "SELECT country, count(*) FROM singer GROUP BY country",
        "SELECT DISTINCT country FROM singer",
    ],
)
def test_a_gold_that_the_data_determine_is_not_suspected(music, cache_dir, gold):
    found = verify_rejected(rows((gold, ["SELECT 4711"])), music, cache_dir=cache_dir)
    assert found["gold_verdict"][:] == ["ok"]
    assert found["verdict"][:] == [["wrong_result"]]


@pytest.mark.parametrize(
    ("gold", "reject", "reason"),
    [
        ("SELECT id FROM singer ORDER BY id", "SELECT id FROM singer ORDER BY id DESC", "order"),
        ("SELECT age FROM singer", "SELECT DISTINCT age FROM singer", "duplicates"),
        ("SELECT id, name FROM singer", "SELECT name, id FROM singer", "columns permuted"),
        ("SELECT name FROM singer", "SELECT id, name, age FROM singer", "extra columns"),
        ("SELECT avg(score) FROM singer", "SELECT round(avg(score), 2) FROM singer", "rounding"),
        ("SELECT age FROM singer", "SELECT CAST(age AS TEXT) FROM singer", "number as text"),
        ("SELECT name FROM singer", "SELECT upper(trim(name)) FROM singer", "case or space"),
        ("SELECT country, id FROM singer", "SELECT nullif(country, ''), id FROM singer", "null or empty text"),
        ("SELECT score FROM singer WHERE id < 4", "SELECT 100 * score FROM singer WHERE id < 4", "percent"),
        ("SELECT id, name FROM singer", "SELECT upper(trim(name)), id FROM singer", "several"),
        (
            "SELECT id FROM singer WHERE age = 25",
            "SELECT id FROM singer LIMIT 2",
            "the data do not determine its result",
        ),
        ("SELECT 0.5", "SELECT abs(random())", "random() changes with time or chance"),
        ("SELECT 'x'", "SELECT date('now')", "'now' changes with time or chance"),
    ],
)
def test_a_doubt_has_its_reason_and_is_no_pair(music, cache_dir, gold, reject, reason):
    found = verify_rejected(rows((gold, [reject])), music, cache_dir=cache_dir)
    assert found["gold_verdict"][:] == ["ok"]
    assert (found["verdict"][0], found["verdict_detail"][0]) == (["ambiguous"], [reason])
    assert len(explode_rejected(found, cache_dir=cache_dir)) == 0


@pytest.mark.parametrize(
    ("gold", "reason"),
    [
        ("SELECT a FROM empty", "empty"),
        ("SELECT max(a) FROM empty", "null"),
        ("SELECT count(*) FROM empty", "zero"),
        ("SELECT 0.0", "zero"),
    ],
)
def test_a_result_that_tells_little_is_weak_and_says_what_it_lacks(music, cache_dir, gold, reason):
    found = verify_rejected(rows((gold, [f"SELECT * FROM ({gold})"])), music, cache_dir=cache_dir)
    assert (found["verdict"][0], found["verdict_detail"][0]) == (["weak"], [reason])


@pytest.mark.parametrize(
    ("reject", "detail"),
    [
        ("SELECT nme FROM singer", "no such column: nme"),
        ("SELECT * FROM singers", "no such table: singers"),
        ("SELECT capital(name) FROM singer", f"no such function: CAPITAL (SQLite {sqlite3.sqlite_version})"),
        ("SELECT name FROM singer WHERE", "incomplete input"),
        ("SELECT 'ü' FROM singer WHERE ü =", "incomplete input"),
        ("SELECT max(age, ) FROM singer", 'near ")": syntax error'),
    ],
)
def test_a_failure_comes_with_the_engines_message(music, cache_dir, reject, detail):
    found = verify_rejected(rows((GOLD, [reject])), music, cache_dir=cache_dir)
    assert found["verdict_detail"][0][0].lower() == detail.lower()
    assert found["result_digest"][0] == [""]


@pytest.mark.parametrize(
    "around",
    [
        "```sql\n{}\n```",
        "```\n{};\n```",
        "The answer is:\n\n```sqlite\n{}\n```\nIt lists them all.",
        "<think>Singers, so SELECT * FROM x?</think>\n{}",
        "  {} ; ",
    ],
)
def test_prose_and_fences_around_gold_and_reject_change_nothing(music, cache_dir, around):
    other, wrong = "SELECT name FROM singer WHERE NOT age <= 29", "SELECT age FROM singer"
    plain = verify_rejected(rows((GOLD, [GOLD, other, wrong])), music, cache_dir=cache_dir)
    both = verify_rejected(
        rows((around.format(GOLD), [around.format(sql) for sql in (GOLD, other, wrong)])), music, cache_dir=cache_dir
    )
    assert plain["verdict"][0] == ["same_text", "equivalent", "wrong_result"]
    for column in ("verdict", "verdict_detail", "result_digest", "gold_verdict", "gold_detail"):
        assert both[column][:] == plain[column][:]


def test_prose_and_fences_do_not_count_as_distance(music, cache_dir):
    wrong = "SELECT age FROM singer"
    found = verify_rejected(
        rows((GOLD, [wrong, f"```sql\n{wrong}\n```", f"```sql\n{GOLD}\n```"]), (f"```sql\n{GOLD}\n```", [wrong])),
        music,
        cache_dir=cache_dir,
    )
    plain, fenced, same = found["distance"][0]
    assert 0 < plain < 1
    assert (fenced, same, found["distance"][1]) == (plain, 0, [plain])


def test_the_reject_nearest_to_the_gold_has_the_least_distance(music, cache_dir):
    rejects = [GOLD, "SELECT name FROM singer WHERE age > 30", "SELECT count(*) FROM empty", "no SQL at all", ""]
    found = verify_rejected(rows((GOLD, rejects)), music, cache_dir=cache_dir)
    same, near, far, *none = found["distance"][0]
    assert 0 == same < near < far <= 1
    assert all(0 <= each <= 1 for each in none)


def test_the_nearest_accepted_gold_has_the_distance(music, cache_dir):
    near, far = "SELECT age FROM singer WHERE id = 1", "SELECT count(*) FROM empty"
    dataset = rows((far, [near.replace("1", "2")]), (near, [near.replace("1", "2")]), alternatives=[[near], None])
    first, second = verify_rejected(dataset, music, cache_dir=cache_dir)["distance"]
    assert first == second


def test_accepted_golds_that_are_no_lists_are_refused_everywhere(music, cache_dir):
    dataset = rows((GOLD, ["SELECT 1"]), alternatives=["SELECT 1"])
    for function in (verify_rejected, audit_golds):
        with pytest.raises(UserError, match="'alternatives' is .*; expected a list of strings"):
            function(dataset, music, cache_dir=cache_dir)
    with pytest.raises(UserError, match="'alternatives' is .*; expected a list of strings"):
        explode_rejected(dataset, cache_dir=cache_dir)


def test_the_dialect_of_a_row_decides_what_is_the_same_text(music, cache_dir):
    # MySQL's names may be case-sensitive: there these are two queries, which return the same
    dataset = rows(*[("SELECT name FROM singer", ["SELECT NAME FROM Singer"])] * 4)
    dataset = dataset.add_column("dialect", ["sqlite", "mysql", None, ""])
    found = verify_rejected(dataset, music, cache_dir=cache_dir)
    assert found["verdict"][:] == [["same_ast"], ["equivalent"], ["same_ast"], ["same_ast"]]


@pytest.mark.parametrize(
    "gold",
    [
        "SELECT random()",
        "SELECT name FROM singer WHERE age > abs(random() % 50)",
        "SELECT CURRENT_TIMESTAMP",
        "SELECT strftime('%Y', 'now') - age FROM singer",
        "SELECT name FROM singer ORDER BY country IS NULL LIMIT 2",
        "SELECT name FROM (SELECT name FROM singer LIMIT 2)",
        "SELECT name FROM singer WHERE id IN (SELECT id FROM singer ORDER BY country IS NULL LIMIT 2)",
        "SELECT name, row_number() OVER (ORDER BY country IS NULL) FROM singer",
        "SELECT group_concat(name, ', ') FROM singer WHERE age = 25",
        "SELECT age, name FROM singer GROUP BY age",
        "SELECT name, count(*) FROM singer",
    ],
)
def test_a_gold_that_chance_time_or_ties_decide_condemns_nothing(music, cache_dir, gold):
    found = verify_rejected(rows((gold, ["SELECT 4711", "SELEC", "SELECT nope"])), music, cache_dir=cache_dir)
    assert found["gold_verdict"][:] == ["gold_nondeterministic"]
    assert found["gold_detail"][0]
    assert found["verdict"][:] == [["unverified"] * 3]


def test_a_gold_of_no_rows_still_tells(music, cache_dir):
    found = verify_rejected(
        rows(("SELECT a FROM empty", ["SELECT 1", "SELECT b FROM empty"])), music, cache_dir=cache_dir
    )
    assert found["gold_verdict"][:] == ["gold_empty"]
    assert found["verdict"][:] == [["wrong_result", "missing_column"]]


def test_a_candidate_is_wrong_only_if_it_differs_from_every_accepted_gold(music, cache_dir):
    dataset = rows(
        (
            "SELECT name FROM singer WHERE id = 1",
            ["SELECT 'Bo'", "SELECT 'Cy'", "SELECT 'BO'", "select name FROM singer WHERE id=2"],
        ),
        ("SELECT 1", ["SELECT 2"]),
        ("SELECT 1", ["SELECT 2", "SELECT 3"]),
        alternatives=[["SELECT name FROM singer WHERE id = 2"], ["SELECT nope"], None],
    )
    found = verify_rejected(dataset, music, cache_dir=cache_dir)
    assert found["verdict"][:] == [
        ["equivalent", "wrong_result", "ambiguous", "same_ast"],
        ["unverified"],
        ["wrong_result", "wrong_result"],
    ]
    assert found["gold_verdict"][:] == ["ok", "gold_error", "ok"]


def test_with_several_instances_wrong_needs_one_and_equivalent_needs_all(tmp_path, cache_dir):
    folder = tmp_path / "databases"
    make(folder / "music" / "music.sqlite")
    make(folder / "music" / "more.sqlite", more="INSERT INTO singer VALUES (6, 'Ed', 29, 'IT', 1.0);")
    make(folder / "music" / "third.sqlite", script="CREATE TABLE other (a);")  # the gold fails there: it says nothing
    found = verdicts(
        folder,
        cache_dir,
        "SELECT name FROM singer WHERE age > 28",
        "SELECT name FROM singer WHERE age >= 29",
        "SELECT name FROM singer WHERE age > 29",
        "SELECT name FROM singer WHERE nope",
        "SELECT a FROM other",
    )
    assert found == ["equivalent", "wrong_result", "missing_column", "missing_table"]
    only = tmp_path / "only"
    make(only / "music" / "music.sqlite")
    assert verdicts(
        only, cache_dir, "SELECT name FROM singer WHERE age > 28", "SELECT name FROM singer WHERE age > 29"
    ) == ["equivalent"]


def test_a_tie_of_two_is_found_every_time(music, cache_dir):
    # or else a fresh run of the same rows gives other verdicts, and rejects that were right by luck become wrong
    golds = [f"SELECT name AS n{number} FROM singer ORDER BY age DESC LIMIT 1" for number in range(300)]
    found = verify_rejected(rows(*[(gold, ["SELECT 'Cy'"]) for gold in golds]), music, cache_dir=cache_dir)
    assert set(found["gold_verdict"]) == {"gold_nondeterministic"}


TIES = """
CREATE TABLE s (id INTEGER PRIMARY KEY, name TEXT, dept TEXT, score INTEGER, h INTEGER);
INSERT INTO s VALUES (1, 'Ann', 'A', 5, 1), (2, 'Bob', 'A', 9, 2), (3, 'Cid', 'B', 9, 2), (4, 'Dee', 'B', 70, 3),
    (5, 'Eve', 'B', 70, 3), (6, 'Fay', 'A', 90, 1), (7, 'Gus', 'C', 90, 4);
CREATE TABLE u (a INTEGER, b INTEGER);
INSERT INTO u VALUES (1, 1), (1, 9), (2, 5);
CREATE TABLE n (k INTEGER, v TEXT);
INSERT INTO n VALUES (1, 'a'), (1, NULL), (2, 'b');
CREATE VIEW best AS SELECT * FROM s ORDER BY score DESC LIMIT 1;
CREATE VIEW today AS SELECT date('now') AS day;
CREATE VIEW again AS SELECT name FROM best;
CREATE VIEW steady AS SELECT name, dept FROM s WHERE score > 6;
"""


@pytest.fixture(scope="module")
def ties(tmp_path_factory):
    return make(tmp_path_factory.mktemp("ties") / "ties.sqlite", script=TIES)


UNDETERMINED = [
    "SELECT name, MAX(score) FROM s",
    "SELECT dept, name, MAX(score) FROM s WHERE score < 80 GROUP BY dept",
    "SELECT name, MAX(score), MIN(h) FROM s",
    "SELECT dept FROM s WHERE dept <> 'C' GROUP BY dept ORDER BY score DESC LIMIT 1",
    "SELECT MIN(name) FROM s GROUP BY h ORDER BY dept LIMIT 1",
    "SELECT dept FROM s GROUP BY dept HAVING score > 60",
    "SELECT count(*) FROM (SELECT dept FROM s GROUP BY dept HAVING score > 60)",
    "SELECT * FROM s GROUP BY dept",
    "SELECT T1.*, COUNT(*) FROM s AS T1 JOIN u ON u.a = T1.h GROUP BY T1.dept",
    "SELECT dept, SUM(score) / h FROM s GROUP BY dept",
    "SELECT dept, IIF(COUNT(*) > 1, name, 'x') FROM s GROUP BY dept",
    "SELECT dept, GROUP_CONCAT(name) FROM s GROUP BY dept",
    "SELECT dept, json_group_array(name) FROM s GROUP BY dept",
    "SELECT id, GROUP_CONCAT(name) OVER (ORDER BY score) FROM s",
    "SELECT DISTINCT a FROM u ORDER BY b DESC LIMIT 1",
    "SELECT name FROM s WHERE id = (SELECT id FROM s ORDER BY score DESC)",
    "SELECT k, v FROM n GROUP BY k",
    "SELECT name dept, COUNT(*) FROM s GROUP BY dept",
    "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c LIMIT 3) "
    "SELECT name FROM s, c WHERE x = 1 ORDER BY score DESC LIMIT 1",
    "WITH t AS (SELECT * FROM s) SELECT `name`, max(score) FROM t",
    "SELECT name FROM s ORDER BY score DESC LIMIT 1 /* top",
    "SELECT name FROM best",
    "SELECT name FROM again",
    "SELECT day FROM today",
]


@pytest.mark.parametrize("sql", UNDETERMINED)
def test_a_result_that_ties_order_or_views_decide_condemns_nothing(ties, cache_dir, sql):
    found = verify_rejected(rows((sql, ["SELECT 4711"]), db_id=None), ties, cache_dir=cache_dir)
    assert (found["gold_verdict"][0], found["verdict"][0]) == ("gold_nondeterministic", ["unverified"])


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT dept, AVG(score), SUM(h), count(DISTINCT name) FROM s GROUP BY dept ORDER BY dept",
        "SELECT dept FROM s GROUP BY dept ORDER BY count(*) DESC, dept LIMIT 1",
        "SELECT GROUP_CONCAT(name) FROM (SELECT name FROM s ORDER BY name)",
        "SELECT dept, GROUP_CONCAT(name) FROM (SELECT name, dept FROM s ORDER BY name) GROUP BY dept",
        "SELECT name FROM s WHERE score = (SELECT MIN(score) FROM s)",
        "SELECT name, dept FROM s WHERE dept <> 'B' GROUP BY dept HAVING h = MAX(h)",
        "SELECT name, MIN(score) FROM s",
        "SELECT a.name, b.name FROM s AS a, s AS b WHERE a.score = b.score AND a.id < b.id",
        "SELECT name FROM s WHERE dept IN (SELECT dept FROM s GROUP BY dept HAVING COUNT(*) > 1)",
        "WITH t AS (SELECT max(score) AS m FROM s GROUP BY dept) SELECT DISTINCT s.id FROM s, t WHERE m = score",
        "SELECT id, RANK() OVER (ORDER BY score), SUM(h) OVER (PARTITION BY dept) FROM s",
        "SELECT name FROM steady GROUP BY name, dept",
        "SELECT max(rowid) FROM s",
    ],
)
def test_a_result_that_the_data_determine_is_not_suspected_however_its_tables_are_ordered(ties, cache_dir, sql):
    found = verify_rejected(rows((sql, ["SELECT 4711, 4711, 4711, 4711"]), db_id=None), ties, cache_dir=cache_dir)
    assert (found["gold_verdict"][0], found["verdict"][0]) == ("ok", ["wrong_result"])


@pytest.mark.parametrize(
    ("gold", "reject"),
    [
        ("SELECT name FROM s WHERE id = 7", "SELECT name, MAX(score) FROM s"),
        (
            "SELECT dept FROM s WHERE id = 6",
            "SELECT dept FROM s WHERE id < 7 GROUP BY dept ORDER BY score DESC LIMIT 1",
        ),
        (
            "SELECT dept, GROUP_CONCAT(name) FROM (SELECT * FROM s ORDER BY name DESC) GROUP BY dept",
            "SELECT dept, GROUP_CONCAT(name) FROM s GROUP BY dept",
        ),
        ("SELECT date('2020-01-01')", "SELECT day FROM today"),
    ],
)
def test_a_reject_that_may_return_the_golds_result_another_time_is_not_wrong(ties, cache_dir, gold, reject):
    found = verify_rejected(rows((gold, [reject]), db_id=None), ties, cache_dir=cache_dir)
    assert (found["gold_verdict"][0], found["verdict"][0]) == ("ok", ["ambiguous"])


READINGS = [
    "WITH a AS (\n  SELECT id, name FROM s\n), -- people\n\nb AS (\n SELECT * FROM a WHERE id = 1)\nSELECT name FROM b",
    "WITH a AS (SELECT id, name FROM s),\n\n-- second\n\nb AS (SELECT * FROM a WHERE id = 1) SELECT name FROM b",
    "SELECT\n  -- the name of it\n\n  name\nFROM s WHERE id = 1",
    "SELECT name FROM s\n\nWhere id = 1",
    "SELECT name\n\nFrom s\n\nWhere id = 1",
    "SELECT name FROM s WHERE id\n\nIS 1",
    "SELECT name FROM s WHERE id = 1<|im_end|>",
    "SELECT name FROM s WHERE id = 1 </sql>",
    "SELECT name FROM s WHERE id = 1\nThis gives the name",
    "SELECT name FROM s WHERE id = 1 This gives the name",
    "SELECT name FROM s WHERE id = 1\n\nwhere id is the key of the table",
    "SELECT name FROM s WHERE id = 1\n\n| name |\n|---|\n| Ann |",
    "SELECT name FROM s WHERE id = 1$$",
    "First try: `SELECT name FROM s`. But we need the filter.\nFinal: `SELECT name FROM s WHERE id = 1`",
    "```sql\nSELECT name FROM s WHERE id = 1\n```\nIf you want all names:\n```sql\nSELECT name FROM s\n```",
    "SELECT name FROM s WHERE id = 1;;",
]


@pytest.mark.parametrize("text", READINGS)
def test_a_right_sql_is_not_wrong_for_how_it_was_taken_out_of_its_text(ties, cache_dir, text):
    found = verify_rejected(rows(("SELECT name FROM s WHERE id = 1", [text]), db_id=None), ties, cache_dir=cache_dir)
    assert found["verdict"][0][0] not in WRONG
    wrong = text.replace("id = 1", "id = 2").replace("IS 1", "IS 2")
    other = verify_rejected(rows(("SELECT name FROM s WHERE id = 1", [wrong]), db_id=None), ties, cache_dir=cache_dir)
    assert other["verdict"][0][0] in WRONG


@pytest.mark.parametrize("text", READINGS[:6])
def test_a_gold_is_not_cut_where_the_engine_takes_it_as_it_stands(ties, cache_dir, text):
    rejects = ["SELECT name FROM s WHERE s.id = 1 + 0", "SELECT name FROM s"]
    found = verify_rejected(rows((text, rejects), db_id=None), ties, cache_dir=cache_dir)
    assert (found["gold_verdict"][0], found["verdict"][0]) == ("ok", ["equivalent", "wrong_result"])


def test_a_gold_that_looks_misspelt_proves_no_result_wrong(ties, cache_dir):
    golds = ['SELECT "nme" FROM s WHERE id = 1', "SELECT id FROM s WHERE \"dpt\" = 'A'"]
    rejects = ["SELECT name FROM s WHERE id = 1", "SELECT id FROM s WHERE dept = 'A'", "SELECT nme FROM s"]
    found = verify_rejected(rows(*[(gold, rejects) for gold in golds], db_id=None), ties, cache_dir=cache_dir)
    assert found["verdict"][:] == [["ambiguous", "ambiguous", "missing_column"]] * 2
    assert "is no column: read as a string" in found["verdict_detail"][0][0]


def test_what_only_the_databases_own_program_has_makes_nothing_wrong(tmp_path, cache_dir):
    path = tmp_path / "own.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.create_collation("localized", lambda a, b: (a > b) - (a < b))
        connection.create_function("shout", 1, str.upper, deterministic=True)
        connection.executescript(
            "CREATE TABLE t (id INTEGER, name TEXT COLLATE localized); INSERT INTO t VALUES (1, 'x');"
            "CREATE VIEW loud AS SELECT shout(name) AS name FROM t;"
        )
    rejects = ["SELECT id FROM t WHERE name = 'x'", "SELECT name FROM loud", "SELECT shout(name) FROM t"]
    found = verify_rejected(rows(("SELECT id FROM t", rejects), db_id=None), path, cache_dir=cache_dir)
    assert found["verdict"][0] == ["resource", "resource", "missing_function"]


def test_chance_is_the_same_each_time(music, tmp_path):
    rejects = [
        "SELECT hex(randomblob(8))",
        "SELECT random()",
        "SELECT name FROM singer ORDER BY random() LIMIT 2",
        "SELECT random(), id FROM singer",
    ]
    found = [verify_rejected(rows((GOLD, rejects)), music, cache_dir=tmp_path / str(number)) for number in range(2)]
    assert found[0][:] == found[1][:]
    assert len(set(found[0]["result_digest"][0])) == 4
    assert set(found[0]["verdict"][0]) == {"ambiguous"}


def instances(folder, *scripts):
    """A folder whose database `music` has these instances; the first is the one of its own name."""
    for number, script in enumerate(scripts):
        make(folder / "music" / ("music.sqlite" if not number else f"x{number}.sqlite"), script=script)
    return folder


ONE, TWO = (f"CREATE TABLE t (a); INSERT INTO t VALUES {values};" for values in ("(1)", "(1), (2)"))
NONE, OTHER = "CREATE TABLE t (a);", "CREATE TABLE u (b); INSERT INTO u VALUES (7);"


@pytest.mark.parametrize(
    ("scripts", "gold", "reject", "verdict"),
    [
        ([ONE, TWO], "SELECT a FROM t", "SELECT 1", "wrong_result"),  # equal on the first, different on the second
        ([TWO, ONE], "SELECT a FROM t", "SELECT 1", "wrong_result"),
        ([ONE, TWO], "SELECT a FROM t", "SELECT a + 0 FROM t", "equivalent"),
        ([ONE, NONE], "SELECT a FROM t", "SELECT a + 0 FROM t", "equivalent"),  # empty on the second tells nothing
        ([NONE, NONE], "SELECT a FROM t", "SELECT a + 0 FROM t", "weak"),
        ([ONE, TWO], "SELECT a FROM t", "SELECT DISTINCT 1 FROM t UNION ALL SELECT 1 FROM t", "wrong_result"),
        ([ONE, TWO], "SELECT a FROM t", "SELECT max(a), a FROM t GROUP BY a", "ambiguous"),
        ([ONE, OTHER], "SELECT a FROM t", "SELECT a + 0 FROM t", "equivalent"),  # the gold fails on the second
        ([OTHER, ONE], "SELECT a FROM t", "SELECT a + 0 FROM t", "equivalent"),
        ([OTHER, ONE], "SELECT a FROM t", "SELECT b FROM u", "missing_table"),
        ([OTHER, OTHER], "SELECT a FROM t", "SELECT b FROM u", "unverified"),
        ([ONE, TWO], "SELECT a FROM t LIMIT 1", "SELECT 4711", "wrong_result"),  # on one row the LIMIT leaves no choice
        (
            [ONE, TWO],
            "SELECT a FROM t",
            "SELECT CASE count(*) WHEN 2 THEN abs(-9223372036854775807 - 1) ELSE 1 END FROM t",
            "other_error",
        ),
    ],
)
def test_a_verdict_on_several_instances_is_wrong_for_one_and_right_for_all(
    tmp_path, cache_dir, scripts, gold, reject, verdict
):
    folder = instances(tmp_path / "databases", *scripts)
    assert verdicts(folder, cache_dir, gold, reject) == [verdict]
    # a new candidate of a gold that is known is judged as if it came with the first
    assert verdicts(folder, cache_dir, gold, reject, f"SELECT * FROM ({reject})")[0] == verdict
    alone = verdicts(folder, tmp_path / "other", gold, "SELECT 9", reject)
    assert verdicts(folder, cache_dir, gold, "SELECT 9", reject) == alone


def test_a_reject_too_slow_for_one_instance_is_not_right(tmp_path, cache_dir):
    folder = instances(tmp_path / "databases", ONE, TWO)
    reject = f"SELECT a FROM t WHERE (SELECT count(*) FROM t) = 1 OR ({SLOW}) > 0"
    assert verdicts(folder, cache_dir, "SELECT a FROM t", reject, timeout=0.5) == ["timeout"]


def test_any_accepted_gold_that_fails_leaves_its_row_unverified(music, cache_dir):
    bad = ["SELECT nope", "SELECT name FROM singer LIMIT 1", SLOW, MANY, "DELETE FROM singer"]
    dataset = rows(
        *[("SELECT 1", ["SELECT 2", "SELECT * FROM nope"])] * len(bad), alternatives=[[each] for each in bad]
    )
    found = verify_rejected(dataset, music, cache_dir=cache_dir, gold_timeout=1)
    assert found["verdict"][:] == [["unverified"] * 2] * len(bad)
    assert found["gold_verdict"][:] == [
        *("gold_error", "gold_nondeterministic", "gold_timeout", "gold_truncated", "gold_error")
    ]


def test_alternatives_that_are_null_empty_or_the_gold_again_are_none(music, cache_dir):
    dataset = rows(
        *[("SELECT 1", ["SELECT 2", "SELECT 1.0"])] * 4, alternatives=[None, [], [None, ""], ["SELECT 1"] * 2]
    )
    found = verify_rejected(dataset, music, cache_dir=cache_dir)
    assert found["verdict"][:] == [["wrong_result", "equivalent"]] * 4


def test_rows_of_a_database_that_is_not_there_are_unverified(music, cache_dir, caplog):
    dataset = Dataset.from_dict(
        {"db_id": ["music", "nope", None], "output": ["SELECT 1"] * 3, "rejected": [["SELECT 2", "SELCT 2 FROM x"]] * 3}
    )
    found = verify_rejected(dataset, music, cache_dir=cache_dir)
    assert found["gold_verdict"][:] == ["ok", "no_database", "no_database"]
    assert found["verdict"][:] == [["wrong_result", "syntax_error"], ["unverified"] * 2, ["unverified"] * 2]
    assert "2 of 3 databases were not found" in caplog.text


# -- columns ---------------------------------------------------------------------------------------------------------


def test_the_columns_are_added_with_their_types_and_all_others_stay(music, cache_dir):
    dataset = rows((GOLD, ["SELECT 1", "SELECT nope"]), ("SELECT 1", []), ("SELECT 1", None), note=[[1], [2], None])
    found = verify_rejected(dataset, music, cache_dir=cache_dir)
    text = Value("string")
    assert {name: found.features[name] for name in found.column_names if name not in dataset.column_names} == {
        "verdict": List(text),
        "verdict_detail": List(text),
        "result_digest": List(text),
        "distance": List(Value("float64")),
        "gold_verdict": text,
        "gold_detail": text,
    }
    assert found.select_columns(dataset.column_names)[:] == dataset[:]
    assert found["verdict"][:] == [["wrong_result", "missing_column"], [], []]
    assert found["verdict_detail"][0] == ["", "no such column: nope"]
    assert found["result_digest"][0][0]
    assert found["result_digest"][0][1] == ""
    assert all(0 < distance <= 1 for distance in found["distance"][0])
    assert "SQLite" in found.info.description


def test_pairs_get_plain_values(music, cache_dir):
    pairs = Dataset.from_dict({"chosen": [GOLD, GOLD], "rejected": ["SELECT 1", GOLD.lower()], "output": ["?", "?"]})
    found = verify_rejected(pairs, music / "music" / "music.sqlite", cache_dir=cache_dir)
    assert found["verdict"][:] == ["wrong_result", "same_ast"]
    assert isinstance(found["distance"][0], float)
    assert found.features["verdict"] == Value("string")


def test_columns_of_any_type_are_kept_as_they_are(music, cache_dir):
    dataset = rows(
        (GOLD, ["SELECT 1"]),
        (GOLD, ["SELECT 2"]),
        history=[[["hi", "there"]], []],
        meta=[{"a": 1, "b": [0.5]}, {"a": None, "b": None}],
        blob=[b"\x00", None],
        flag=[True, None],
    )
    found = verify_rejected(dataset, music, cache_dir=cache_dir)
    assert {name: found.features[name] for name in dataset.column_names} == dict(dataset.features)
    assert found.select_columns(dataset.column_names)[:] == dataset[:]


def test_lists_that_are_all_empty_or_null_are_no_rejects(music, cache_dir):
    typed = verify_rejected(rows((GOLD, ["SELECT 1"])), music, cache_dir=cache_dir).features
    for nothing in ([[], []], [None, None]):
        dataset = Dataset.from_dict({"db_id": ["music"] * 2, "output": [GOLD, "SELECT nope"], "rejected": nothing})
        found = verify_rejected(dataset, music, cache_dir=cache_dir)
        assert found["gold_verdict"][:] == ["ok", "gold_error"]
        for name in ("verdict", "verdict_detail", "result_digest", "distance"):
            assert found[name][:] == [[], []]
            assert found.features[name] == typed[name]


def test_texts_that_are_null_have_a_verdict_too(music, cache_dir):
    found = verify_rejected(rows((GOLD, [None, "SELECT 1"]), (None, ["SELECT 1"])), music, cache_dir=cache_dir)
    assert found["verdict"][:] == [["empty", "wrong_result"], ["unverified"]]
    assert found["gold_verdict"][:] == ["ok", "gold_error"]
    pairs = Dataset.from_dict({"db_id": ["music"] * 2, "chosen": [GOLD, None], "rejected": [None, "SELECT 1"]})
    assert verify_rejected(pairs, music, cache_dir=cache_dir)["verdict"][:] == ["empty", "unverified"]


def test_the_large_types_of_polars_and_arrow_are_taken_too(music, cache_dir):
    strings = pa.array([["SELECT 1", GOLD]], pa.large_list(pa.large_string()))
    large = Dataset(pa.table({"db_id": ["music"], "output": pa.array([GOLD], pa.large_string()), "rejected": strings}))
    found = verify_rejected(large, music, cache_dir=cache_dir)
    assert found["verdict"][:] == [["wrong_result", "same_text"]]
    assert found.features["verdict"] == List(Value("string"))


def test_pairs_are_verified_as_the_rows_that_they_were_made_of(music, cache_dir):
    found = verify_rejected(rows((GOLD, ["SELECT 1", "SELECT nope", GOLD])), music, cache_dir=cache_dir)
    pairs = explode_rejected(found, keep=["wrong_result", "missing_column"], cache_dir=cache_dir)
    again = verify_rejected(pairs.remove_columns(["verdict", "verdict_detail", "distance"]), music, cache_dir=cache_dir)
    for name in ("verdict", "verdict_detail", "distance"):
        assert again[name][:] == found[name][0][:2]
        assert again.features[name] == pairs.features[name]
    assert again["chosen"][:] == [GOLD] * 2
    assert again["gold_verdict"][:] == ["ok"] * 2


def test_verifying_what_is_verified_changes_nothing(music, cache_dir):
    found = verify_rejected(rows((GOLD, ["SELECT 1", "SELECT nope"])), music, cache_dir=cache_dir)
    again = verify_rejected(found, music, cache_dir=cache_dir)
    assert again[:] == found[:]
    assert again.features == found.features


def test_equal_results_have_equal_digests(music, cache_dir):
    rejects = ["SELECT id FROM singer", "SELECT id * 1.0 FROM singer ORDER BY 1 DESC", "SELECT age FROM singer"]
    found = verify_rejected(rows(("SELECT 1", rejects)), music, cache_dir=cache_dir)
    first, second, third = found["result_digest"][0]
    assert first == second != third


def test_splits_formats_and_empty_datasets_are_taken(music, cache_dir):
    dataset = rows((GOLD, ["SELECT 1"]), ("SELECT 1", ["SELECT 2"]))
    splits = DatasetDict(train=dataset.with_format("numpy", columns=["output"]), test=dataset.select([]))
    found = verify_rejected(splits, music, cache_dir=cache_dir)
    assert found["train"]["verdict"][:] == [["wrong_result"], ["wrong_result"]]
    assert found["test"].column_names == found["train"].column_names
    chained = found["train"].filter(lambda row: row["gold_verdict"] == "ok").map(lambda row: {"n": len(row["verdict"])})
    assert chained["n"][:] == [1, 1]


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas", "arrow"])
def test_a_dataset_in_another_format_gives_the_same_verdicts(music, cache_dir, kind):
    dataset = rows((GOLD, ["SELECT 1", GOLD]), (GOLD, []), number=[1, 2])
    plain = verify_rejected(dataset, music, cache_dir=cache_dir)
    assert verify_rejected(dataset.with_format(kind), music, cache_dir=cache_dir)[:] == plain[:]


def test_the_dataset_given_is_not_changed(music, cache_dir):
    dataset = rows((GOLD, ["SELECT 1"]))
    before = dataset[:], dataset.features.copy(), dataset._fingerprint, dataset.info.description
    verify_rejected(dataset, music, cache_dir=cache_dir)
    assert (dataset[:], dataset.features, dataset._fingerprint, dataset.info.description) == before


def test_a_dataset_without_rows_gets_the_columns_of_one_with_rows(music, cache_dir):
    full = verify_rejected(rows((GOLD, ["SELECT 1"])), music, cache_dir=cache_dir)
    empty = rows((GOLD, ["SELECT 1"])).select([])
    for none in (empty, Dataset.from_dict({name: [] for name in empty.column_names}, features=empty.features)):
        found = verify_rejected(none, music, cache_dir=cache_dir)
        assert len(found) == 0
        assert found.features == full.features


def test_verdicts_survive_every_further_transform(music, cache_dir, tmp_path):
    golds = [f"SELECT name FROM singer WHERE id > {number}" for number in range(8)]
    dataset = rows(*[(gold, ["SELECT 1", gold.lower()]) for gold in golds], number=list(range(8)))
    dataset = dataset.shuffle(seed=1).filter(lambda row: row["number"] % 2 == 0).map(lambda row: {"n": row["number"]})
    found = verify_rejected(dataset, music, cache_dir=cache_dir)
    assert found["n"][:] == dataset["n"][:]
    found.save_to_disk(tmp_path / "saved")
    loaded = load_from_disk(tmp_path / "saved")
    assert loaded[:] == found[:]
    assert loaded.info.description == found.info.description
    pairs = explode_rejected(loaded.sort("number"), cache_dir=cache_dir)
    assert pairs["rejected"][:] == ["SELECT 1"] * 4
    split = pairs.map(lambda row: {"sum": row["distance"] + 1}).train_test_split(test_size=0.25, seed=1)
    assert (len(split["train"]), len(split["test"])) == (3, 1)


def test_what_is_told_of_the_run_names_the_engine_and_no_place(music, cache_dir):
    found = verify_rejected(rows((GOLD, ["SELECT 1"])), music, cache_dir=cache_dir)
    assert lineage.told(found) == [f"verify_rejected: SQLite {sqlite3.sqlite_version}"]
    kept = b"".join(path.read_bytes() for path in cache_dir.glob("verified/*"))
    assert str(music).encode() not in kept


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"output": ["SELECT 1"]}, "Column 'rejected' not found"),
        ({"rejected": [["SELECT 1"]]}, "Column 'output' not found"),
        ({"output": [1], "rejected": [["SELECT 1"]]}, "expected strings, the gold SQL"),
        ({"output": ["SELECT 1"], "rejected": [[1]]}, "expected a list of strings"),
        ({"output": ["SELECT 1"], "rejected": [["a"]], "alternatives": ["SELECT 1"]}, "expected a list of strings"),
        ({"output": ["SELECT 1"], "rejected": [["a"]], "dialect": ["klingon"]}, "Dialect 'klingon' is not known"),
        ({"output": ["SELECT 1"], "rejected": [["a"]]}, "have no column 'db_id'"),
    ],
)
def test_what_is_missing_or_of_another_type_is_one_clear_line(music, columns, message):
    with pytest.raises(UserError, match=message) as caught:
        verify_rejected(Dataset.from_dict(columns), music)
    assert "\n" not in str(caught.value)


def test_what_would_break_the_result_is_refused(music):
    dataset = rows((GOLD, ["SELECT 1"]))
    with pytest.raises(UserError, match="num_proc is not supported"):
        verify_rejected(dataset, music, num_proc=2)
    with pytest.raises(UserError, match="timeout is 0; it must be above 0"):
        verify_rejected(dataset, music, timeout=0)
    with pytest.raises(UserError, match="workers is 0"):
        verify_rejected(dataset, music, workers=0, load_from_cache_file=False, cache_dir=music / "c")


@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), 1e9, -1.0, 0.0])
@pytest.mark.parametrize("name", ["timeout", "gold_timeout"])
def test_a_time_limit_is_taken_or_refused_in_one_line(music, cache_dir, name, seconds):
    with suppress(UserError):
        found = verify_rejected(rows((GOLD, ["SELECT 1"])), music, cache_dir=cache_dir, **{name: seconds})
        assert found["verdict"][:] == [["wrong_result"]]


def test_arguments_of_map_that_are_not_known_and_streams_are_refused(music, cache_dir):
    dataset = rows((GOLD, ["SELECT 1"]))
    for name in ("batch_size", "remove_columns", "features"):
        with pytest.raises(UserError, match=f"'{name}' is not known here"):
            verify_rejected(dataset, music, cache_dir=cache_dir, **{name: None})
    with pytest.raises(UserError, match="materialise it first"):
        verify_rejected(dataset.to_iterable_dataset(), music, cache_dir=cache_dir)
    assert not cache_dir.exists()


# -- a right SQL never becomes rejected ------------------------------------------------------------------------------


@given(st.data())
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_spelling_of_a_gold_becomes_a_pair(music, tmp_path_factory, data):
    conditions = ["age > 29", "country = 'FR'", "id IN (1, 2, 4)", "score IS NOT NULL"]
    chosen = data.draw(st.lists(st.sampled_from(conditions), min_size=1, max_size=3, unique=True))
    columns = data.draw(st.lists(st.sampled_from(["id", "name", "age"]), min_size=1, max_size=2, unique=True))
    gold = f"SELECT {', '.join(columns)} FROM singer WHERE {' AND '.join(chosen)}"
    other = data.draw(st.permutations(chosen))
    rewrites = [
        f"SELECT {', '.join(reversed(columns))} FROM singer AS s WHERE {' AND '.join(other)}",
        f"WITH x AS ({gold}) SELECT * FROM x",
        f"SELECT {', '.join(columns)}, 'more' FROM (SELECT * FROM singer ORDER BY id DESC) WHERE {' AND '.join(other)}",
        f"SELECT DISTINCT {', '.join(columns)} FROM singer WHERE {' AND '.join(f'NOT NOT ({each})' for each in other)}",
    ]
    cache = tmp_path_factory.mktemp("cache")
    found = verify_rejected(rows((gold, rewrites)), music, cache_dir=cache, workers=1)
    assert not set(found["verdict"][0]) & set(WRONG)
    assert len(explode_rejected(found, cache_dir=cache)) == 0


# -- nothing is run twice, nothing is lost ---------------------------------------------------------------------------


def launches(monkeypatch):
    """The worker processes started from now on."""
    started = []
    real = subprocess.Popen.__init__

    def noted(self, args, *rest, **kwargs):
        if "worker.py" in str(args):
            started.append(args)
        return real(self, args, *rest, **kwargs)

    monkeypatch.setattr(subprocess.Popen, "__init__", noted)
    return started


def test_a_second_call_starts_no_process_and_has_the_same_fingerprint(music, cache_dir, monkeypatch):
    dataset = rows((GOLD, ["SELECT 1", "SELECT nope"]))
    first = verify_rejected(dataset, music, cache_dir=cache_dir)
    started = launches(monkeypatch)
    second = verify_rejected(dataset, music, cache_dir=cache_dir)
    assert not started
    assert second._fingerprint == first._fingerprint
    assert second[:] == first[:]


def test_verdicts_are_known_again_for_other_datasets_but_not_for_other_data_or_limits(tmp_path, cache_dir, monkeypatch):
    folder = tmp_path / "databases"
    path = make(folder / "music" / "music.sqlite")
    verify_rejected(rows((GOLD, ["SELECT 1"])), folder, cache_dir=cache_dir)
    started = launches(monkeypatch)
    again = verify_rejected(rows((GOLD, ["SELECT 1"]), (GOLD, ["SELECT 1"])), folder, cache_dir=cache_dir)
    assert again["verdict"][:] == [["wrong_result"]] * 2
    assert not started
    moved = tmp_path / "elsewhere"
    make(moved / "music" / "music.sqlite").write_bytes(path.read_bytes())
    verify_rejected(rows((GOLD, ["SELECT 1"])), moved, cache_dir=cache_dir)
    assert not started  # the content counts, not the place
    verify_rejected(rows((GOLD, ["SELECT 1"])), folder, cache_dir=cache_dir, timeout=7)
    assert len(started) == 1
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DELETE FROM singer")
        connection.commit()
    changed = verify_rejected(rows((GOLD, ["SELECT 1"])), folder, cache_dir=cache_dir)
    assert len(started) == 2
    assert changed["gold_verdict"][:] == ["gold_empty"]


@pytest.mark.parametrize("changed", [{"timeout": 4.0}, {"gold_timeout": 29.0}])
def test_a_time_limit_is_part_of_the_key(music, cache_dir, changed):
    dataset = rows((GOLD, ["SELECT 1"]))
    first = verify_rejected(dataset, music, cache_dir=cache_dir)
    other = verify_rejected(dataset, music, cache_dir=cache_dir, **changed)
    assert other._fingerprint != first._fingerprint
    assert len(list((cache_dir / "verdicts").iterdir())) == 2


@pytest.mark.parametrize("how", ["argument", "datasets"])
def test_a_result_is_built_anew_where_that_is_asked_for(music, cache_dir, how):
    dataset = rows((GOLD, ["SELECT 1"]))
    first = verify_rejected(dataset, music, cache_dir=cache_dir)
    (file,) = cache_dir.glob("verified/*.arrow")
    before = file.stat().st_ino
    assert verify_rejected(dataset, music, cache_dir=cache_dir)[:] == first[:]
    assert file.stat().st_ino == before
    if how == "argument":
        second = verify_rejected(dataset, music, cache_dir=cache_dir, load_from_cache_file=False)
    else:
        datasets.disable_caching()
        try:
            second = verify_rejected(dataset, music, cache_dir=cache_dir)
        finally:
            datasets.enable_caching()
    assert second[:] == first[:]
    assert file.stat().st_ino != before


def test_what_is_the_gold_by_its_text_is_not_run(music, cache_dir):
    rejects = [GOLD, GOLD.lower(), "", "I do not know.", f"```sql\n{GOLD}\n```"]
    verify_rejected(rows((GOLD, rejects)), music, cache_dir=cache_dir)
    assert written(cache_dir) == 1  # the gold


def test_rows_that_are_added_run_alone(music, cache_dir, monkeypatch):
    first = rows(*[(f"SELECT {number}", [f"SELECT {number} + 1"]) for number in range(4)])
    more = rows(*[(f"SELECT {number}", [f"SELECT {number} + 1"]) for number in range(6)])
    verify_rejected(first, music, cache_dir=cache_dir)
    assert written(cache_dir) == 8
    found = verify_rejected(more, music, cache_dir=cache_dir)
    assert written(cache_dir) == 12
    assert found["verdict"][:] == [["wrong_result"]] * 6
    started = launches(monkeypatch)
    shuffled = verify_rejected(more.shuffle(seed=1), music, cache_dir=cache_dir)
    assert not started
    assert sorted(map(str, shuffled)) == sorted(map(str, found))


def test_a_result_with_rows_of_missing_databases_is_found_again_until_they_are_there(tmp_path, cache_dir, monkeypatch):
    folder = tmp_path / "databases"
    make(folder / "music" / "music.sqlite")
    columns = {"output": ["SELECT 1"] * 2, "rejected": [["SELECT 2"]] * 2}
    dataset = Dataset.from_dict({"db_id": ["music", "late"], **columns})
    first = verify_rejected(dataset, folder, cache_dir=cache_dir)
    started = launches(monkeypatch)
    again = verify_rejected(dataset, folder, cache_dir=cache_dir)
    assert again._fingerprint == first._fingerprint
    assert again["gold_verdict"][:] == ["ok", "no_database"]
    assert not started
    make(folder / "late.sqlite", more="INSERT INTO singer VALUES (6, 'Ed', 29, 'IT', 1.0);")
    assert verify_rejected(dataset, folder, cache_dir=cache_dir)["gold_verdict"][:] == ["ok", "ok"]
    assert len(started) == 1


def test_a_new_candidate_costs_only_itself(music, cache_dir):
    def known():
        (folder,) = (cache_dir / "verdicts").iterdir()
        return len(SampleStore(folder))

    verify_rejected(rows((GOLD, ["SELECT 1", "SELECT 2", ""])), music, cache_dir=cache_dir)
    assert known() == 3  # the gold and two candidates: what the text tells is not run
    verify_rejected(rows((GOLD, ["SELECT 2", "SELECT 3", "SELECT 1"]), ("SELECT 9", [])), music, cache_dir=cache_dir)
    assert known() == 5


def test_the_same_input_gives_the_same_output_with_any_number_of_workers(music, tmp_path):
    dataset = Dataset.from_list(
        [
            {
                "db_id": "music",
                "output": f"SELECT name FROM singer WHERE id > {n}",
                "rejected": [GOLD, f"SELECT {n}", "SELEC"],
            }
            for n in range(40)
        ]
    )
    found = [verify_rejected(dataset, music, workers=workers, cache_dir=tmp_path / str(workers)) for workers in (1, 3)]
    assert found[0][:] == found[1][:]
    assert found[0]._fingerprint == found[1]._fingerprint


RUN = """
import json, sys
from datasets import Dataset
from t2s_pref import verify_rejected
started = []
sys.addaudithook(lambda event, said: event == "subprocess.Popen" and "worker.py" in str(said) and started.append(said))
rows = Dataset.from_list(json.load(open(sys.argv[1])))
found = verify_rejected(rows, sys.argv[2], workers=1, timeout=0.5, cache_dir=sys.argv[3])
print(json.dumps({"rows": found.to_list(), "fingerprint": found._fingerprint, "started": len(started)}))
"""


@pytest.fixture(scope="module")
def script(music, tmp_path_factory):
    """The command that verifies 10 rows in a process of its own, in 5 seconds or more; it lacks a cache folder."""
    folder = tmp_path_factory.mktemp("script")
    asked = [
        {"output": f"SELECT {number}", "rejected": [f"SELECT {number} + 1", SLOW, f"SELECT 0 + {number}"]}
        for number in range(10)
    ]
    (folder / "rows.json").write_text(json.dumps(asked))
    return [sys.executable, "-c", RUN, str(folder / "rows.json"), str(music / "music" / "music.sqlite")]


RECORDS = 40  # golds and candidates


@pytest.fixture(scope="module")
def undisturbed_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("undisturbed")


@pytest.fixture(scope="module")
def undisturbed(script, undisturbed_cache):
    """What the script prints where nothing disturbs it."""
    return run(script, undisturbed_cache)


def run(script, cache, **environment):
    done = subprocess.run(
        [*script, str(cache)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
        env=os.environ | environment,
    )
    return json.loads(done.stdout.splitlines()[-1])


def written(cache):
    """How many verdicts were ever written down: those found twice count twice."""
    return sum(path.read_bytes().count(b"\n") for path in (cache / "verdicts").glob("*/segment*"))


def test_another_process_finds_the_result_without_starting_a_worker(script, undisturbed, undisturbed_cache):
    again = run(script, undisturbed_cache, PYTHONHASHSEED="7")
    assert undisturbed["started"] > 0
    assert again == {**undisturbed, "started": 0}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_ended_goes_on_where_it_was(number, script, undisturbed, tmp_path):
    with subprocess.Popen([*script, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        end = time.monotonic() + 60
        while written(tmp_path) < 2 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        os.kill(process.pid, number)
        process.communicate()
    assert process.returncode != 0
    assert not list((tmp_path / "verified").glob("*.arrow"))
    before = written(tmp_path)
    assert 2 <= before < RECORDS
    done = run(script, tmp_path)
    assert written(tmp_path) == RECORDS  # nothing that was written down was run again
    assert done["rows"] == undisturbed["rows"]
    assert done["fingerprint"] == undisturbed["fingerprint"]


def test_a_long_row_that_is_killed_keeps_what_was_found(music, tmp_path):
    code = """
import sys
from datasets import Dataset
from t2s_pref import verify_rejected
count = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 100000) SELECT count(*) + %d FROM c"
rows = Dataset.from_dict({"output": ["SELECT 7"], "rejected": [[count % number for number in range(900)]]})
verify_rejected(rows, sys.argv[1], workers=1, cache_dir=sys.argv[2])
"""
    command = [sys.executable, "-c", code, str(music / "music" / "music.sqlite"), str(tmp_path)]
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 60
        while not written(tmp_path) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        process.kill()
    assert 50 < written(tmp_path) < 901


def test_two_processes_on_one_cache_both_get_it_right(script, undisturbed, tmp_path):
    both = [subprocess.Popen([*script, str(tmp_path)], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert [each["rows"] for each in told] == [undisturbed["rows"]] * 2
    assert [each["fingerprint"] for each in told] == [undisturbed["fingerprint"]] * 2

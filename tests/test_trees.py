"""What tokens and trees tell: order, ties, chance and distance; nothing raises, whatever the text."""

import json
import logging
import random
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t2s_pref import demo_files
from t2s_pref.probes import bare_probes, tie_probes
from t2s_pref.trees import distance, is_ordered, volatile, without_distinct

FILES = demo_files()
GOLDS = [
    (row["db_id"], row["output"])
    for path in (FILES.train, FILES.heldout)
    for row in json.loads(Path(path).read_text(encoding="utf-8"))
]


@pytest.fixture(scope="module")
def table():
    """Names with ties in `points`, unique `id`s in another order than the rows."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute(
            "CREATE TABLE player (id INTEGER, name TEXT, team TEXT, points INTEGER, `limit` INTEGER,"
            " ties INTEGER, offset INTEGER, range INTEGER)"
        )
        rng = random.Random(3)
        rows = [(n, f"n{n}", f"t{n % 4}", n % 5, n, n, n % 5, n % 3) for n in range(40)]
        rng.shuffle(rows)
        connection.executemany("INSERT INTO player VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
        yield connection


def outcomes(connection, sql, times=12):
    return {tuple(sorted(connection.execute(sql).fetchall(), key=repr)) for _ in range(times)}


# -- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order\n by a limit 3", True),
        ("(SELECT a FROM t ORDER BY a);", True),
        ("WITH x AS (SELECT a FROM t ORDER BY a) SELECT * FROM x", False),
        ("WITH x AS (SELECT a FROM t) SELECT * FROM x ORDER BY 1", True),
        ("SELECT a FROM t UNION SELECT b FROM u ORDER BY 1", True),
        ("(SELECT a FROM t ORDER BY a) UNION (SELECT b FROM u)", False),
        ("SELECT a, row_number() OVER (ORDER BY a) FROM t", False),
        ("SELECT 'order by' FROM t -- ORDER BY a", False),
        ('SELECT "order by" FROM t', False),
        ("SELECT a FROM t WHERE b IN (SELECT b FROM u ORDER BY c)", False),
        ("SELECT a FROM t ORDER /* x */ BY a", True),
        ("((SELECT a FROM t)) ORDER BY a", True),
        ("/* ( */ (SELECT a FROM t ORDER BY a) -- )", True),
        ("SELECT a FROM t WHERE b = 'never closed ORDER BY a", False),
        ("SELECT a FROM t ORDER BY a, 'never closed", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a) WHERE b = 'never closed", False),
        ("", False),
        ("ORDER", False),
    ],
)
def test_only_the_outermost_order_by_counts(sql, ordered):
    assert is_ordered(sql) is ordered


# -- ties ------------------------------------------------------------------------------------------------------------

TIED = [
    "SELECT name FROM player ORDER BY points DESC LIMIT 1",
    "SELECT name FROM player LIMIT 3",
    "SELECT name FROM player ORDER BY points LIMIT 3 OFFSET 2",
    "SELECT name FROM player ORDER BY points LIMIT 2, 3",
    "SELECT name FROM player WHERE team = (SELECT team FROM player ORDER BY points LIMIT 1)",
    "WITH best AS (SELECT name FROM player ORDER BY points DESC LIMIT 2) SELECT * FROM best",
    "SELECT name FROM (SELECT name, row_number() OVER (PARTITION BY team ORDER BY points) AS place FROM player) "
    "WHERE place = 1",
    "SELECT name FROM (SELECT name, row_number() OVER () AS place FROM player) WHERE place = 1",
    "SELECT first_value(name) OVER (PARTITION BY team ORDER BY points ROWS BETWEEN UNBOUNDED PRECEDING AND "
    "UNBOUNDED FOLLOWING) FROM player",
    "SELECT name, sum(id) OVER (ORDER BY points ROWS UNBOUNDED PRECEDING) FROM player",
    "SELECT name FROM player WHERE team = 't1' UNION ALL SELECT name FROM player WHERE team = 't2' LIMIT 2",
    "SELECT name, points FROM player WHERE id > 5 UNION SELECT name, points FROM player ORDER BY 2 DESC LIMIT 1",
    "SELECT team FROM player GROUP BY team ORDER BY count(*) LIMIT 1",
    "SELECT name /* limit */ FROM player -- ORDER BY id\n ORDER BY CASE WHEN points > 2 THEN 1 ELSE 0 END LIMIT 1;",
    'SELECT name AS "limit" FROM player ORDER BY points COLLATE NOCASE DESC NULLS LAST LIMIT 1',
    # columns named as clauses are
    "SELECT name, ties FROM player ORDER BY points LIMIT 1",
    "SELECT name, offset FROM player ORDER BY offset LIMIT 1",
    "SELECT name, row_number() OVER (PARTITION BY range ORDER BY points) FROM player",
    # set operations, ordered by names or places, on any level
    "WITH x AS (SELECT name, points FROM player UNION SELECT team, points FROM player ORDER BY 2 LIMIT 3) "
    "SELECT * FROM x",
    "SELECT name FROM player WHERE name IN (SELECT name FROM player UNION ALL SELECT team FROM player LIMIT 3)",
    "SELECT player.name, player.points FROM player UNION ALL SELECT team, points FROM player "
    "ORDER BY player.points LIMIT 1",
    'SELECT name, points FROM player UNION SELECT team, points FROM player ORDER BY "points" DESC LIMIT 1',
    "SELECT name, row_number() OVER w FROM player WINDOW w AS (PARTITION BY team ORDER BY points)",
    "SELECT name, count(*) FILTER (WHERE id > 3) OVER (ORDER BY points ROWS UNBOUNDED PRECEDING) FROM player",
    "SELECT name, last_value(name) OVER (PARTITION BY team ORDER BY points) FROM player WHERE id % 20 < 12",
    "SELECT team, (SELECT name FROM player AS p WHERE p.team = o.team ORDER BY points LIMIT 1) FROM player AS o",
    "SELECT '😀', name FROM player\r\nORDER /* by id */ BY points\r\nLIMIT 1 -- é",
]


@pytest.mark.parametrize("sql", TIED)
def test_a_tie_that_decides_the_result_is_seen(table, sql):
    (probe,) = tie_probes(sql)
    assert len(outcomes(table, sql)) == 1
    plain = outcomes(table, sql, 1)
    assert sum(outcomes(table, probe, 5) != plain for _ in range(10)) >= 8  # as the workers compare them


DETERMINED = [
    "SELECT name FROM player ORDER BY id DESC LIMIT 3",
    "SELECT name FROM player ORDER BY points, id LIMIT 3 OFFSET 2",
    "SELECT points FROM player ORDER BY points LIMIT 3",
    "SELECT DISTINCT team FROM player ORDER BY team LIMIT 2",
    'SELECT name FROM player ORDER BY "limit" LIMIT 2',
    "SELECT name FROM player WHERE id IN (SELECT id FROM player ORDER BY id LIMIT 5)",
    "SELECT name, row_number() OVER (ORDER BY id) FROM player",
    "SELECT name, rank() OVER (ORDER BY points) FROM player",
    "SELECT name, sum(points) OVER (PARTITION BY team) FROM player",
    "SELECT team FROM player UNION SELECT name FROM player ORDER BY 1 LIMIT 4",
    "SELECT count(*) FROM (SELECT 1 FROM player LIMIT 7)",
    "SELECT name FROM player WHERE name = 'LIMIT 1' OR name = '(' OR id = 3 ORDER BY name LIMIT 1",
    # windows whose frames hold all equal rows, so that one key more would change them
    "SELECT name, sum(id) OVER (ORDER BY points RANGE UNBOUNDED PRECEDING) FROM player",
    "SELECT name, sum(id) OVER (ORDER BY points GROUPS UNBOUNDED PRECEDING) FROM player",
    "SELECT name, rank() OVER (ORDER BY points ROWS UNBOUNDED PRECEDING) FROM player",
    "SELECT points, nth_value(points, 2) OVER (ORDER BY points) FROM player",
    "SELECT name, rank() OVER w FROM player WINDOW w AS (ORDER BY points)",
    "SELECT name, rank() OVER w, row_number() OVER w FROM player WINDOW w AS (ORDER BY points, id)",
    "SELECT team, count(*) FROM player GROUP BY team UNION ALL SELECT 'x', 3 ORDER BY count(*) LIMIT 1",
    "SELECT name FROM player UNION SELECT team FROM player ORDER BY 1 COLLATE NOCASE DESC LIMIT 5",
]


KEYS = [
    "points",
    "team COLLATE NOCASE DESC",
    "ties % 3 DESC NULLS LAST",
    "CASE WHEN points > 2 THEN 'limit' ELSE ')' END",
    "-- , LIMIT (\n range",
    "(SELECT max(p.id) FROM player AS p WHERE p.points < player.points)",
]
NESTINGS = [
    "{}",
    "SELECT name FROM player WHERE id IN (SELECT id FROM ({}))",
    "WITH w AS ({}) SELECT player.name FROM w JOIN player ON player.id = w.id",
    "SELECT id + 1 FROM ({}) AS s",
]


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("limit", ["LIMIT 3", "limit 4 OFFSET 2", "LIMIT 2, 4", "LIMIT (1 + 1)", "LIMIT 0", "LIMIT 99"])
def test_a_unique_last_key_determines_a_query_and_without_it_the_probe_still_runs(table, nesting, limit):
    rng = random.Random(nesting + limit)
    for _ in range(6):
        keys = ", ".join(rng.sample(KEYS, 2))
        unique = nesting.format(f"SELECT id FROM player ORDER BY {keys}, id DESC {limit}")
        tied = nesting.format(f"SELECT id FROM player ORDER BY {keys} {limit}")
        (probe,) = tie_probes(unique)
        assert outcomes(table, probe, 4) == outcomes(table, unique, 1)
        assert outcomes(table, tie_probes(tied)[0], 1)


@pytest.mark.parametrize("sql", DETERMINED)
def test_a_probe_returns_the_same_rows_where_the_data_determine_them(table, sql):
    for probe in tie_probes(sql):
        assert outcomes(table, probe) == outcomes(table, sql, 1)


def test_what_has_neither_limit_nor_window_has_no_probe():
    assert tie_probes("SELECT a FROM t ORDER BY b") == tie_probes("SELECT 'limit' FROM t") == tie_probes("") == []
    assert tie_probes("SELECT a FROM t; DELETE FROM t LIMIT 1") == []


def test_a_probe_uses_the_dialects_own_function():
    assert "RAND()" in tie_probes("SELECT a FROM t ORDER BY b LIMIT 1", "mysql")[0]
    assert "RANDOM()" in tie_probes("SELECT a FROM t ORDER BY b FETCH FIRST 1 ROW ONLY", "postgres")[0]
    assert tie_probes("SELECT a FROM t ORDER BY b FETCH FIRST 1 ROW WITH TIES", "postgres") == []
    assert tie_probes("SELECT DISTINCT t.a, t.b FROM t ORDER BY t.b DESC LIMIT 1", "postgres") == [
        "SELECT * FROM (SELECT DISTINCT t.a, t.b FROM t ) AS probed ORDER BY b DESC, RANDOM() LIMIT 1"
    ]
    assert tie_probes("SELECT a FROM t UNION SELECT b FROM u LIMIT 1", "mysql") == [
        "SELECT * FROM (SELECT a FROM t UNION SELECT b FROM u ) AS probed ORDER BY RAND() LIMIT 1"
    ]
    assert tie_probes("SELECT DISTINCT ON (a) a, b FROM t ORDER BY a -- x", "postgres") == [
        "SELECT DISTINCT ON (a) a, b FROM t ORDER BY a , RANDOM()  -- x"
    ]


def test_every_probe_of_every_demo_gold_runs():
    probes = 0
    for db_id, sql in GOLDS:
        with closing(sqlite3.connect(f"{FILES.databases}/{db_id}/{db_id}.sqlite")) as connection:
            for probe in tie_probes(sql):
                assert len(connection.execute(probe).fetchall()) == len(connection.execute(sql).fetchall())
                probes += 1
    assert probes > 20


# -- chance and clock ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "found"),
    [
        ("SELECT random()", "random()"),
        ("SELECT * FROM t ORDER BY RANDOM () LIMIT 1", "random()"),
        ("SELECT date('now', '-1 year')", "'now'"),
        ("SELECT strftime('%Y', 'NOW')", "'now'"),
        ("SELECT strftime('%Y', \"now\") FROM t", "'now'"),  # a string, where no column has that name
        ('SELECT date("now")', "'now'"),
        ("SELECT strftime('%Y')", "strftime()"),
        ("SELECT strftime('%Y', born) FROM t", ""),
        ("SELECT datetime( )", "datetime()"),
        ("SELECT date(born) FROM t", ""),
        ("SELECT CURRENT_DATE", "current_date"),
        ("SELECT 'random()', now, t.random, current FROM t", ""),
        ("SELECT brand, uuid FROM t WHERE changes = 1", ""),
        ("SELECT 'now' FROM t", ""),
        ("SELECT name FROM t WHERE name = 'now'", ""),
        ("SELECT name FROM t WHERE name IN ('then', 'now')", ""),
        ("WITH d(n) AS (SELECT 'now') SELECT date(n) FROM d", "'now'"),  # the argument of a date function elsewhere
        ("SELECT date(CASE WHEN a THEN 'now' END) FROM t", "'now'"),
        ("SELECT julianday ( /* none */ )", "julianday()"),
        ("SELECT localtime FROM t", ""),
        ("SELECT last_insert_rowid()", "last_insert_rowid()"),
    ],
)
def test_what_changes_with_time_or_chance_is_seen_and_names_and_strings_are_not_taken_for_it(sql, found):
    assert volatile(sql) == found


def test_servers_clocks_are_seen_too():
    assert volatile("SELECT now()", "postgres") == "now()"
    assert volatile("SELECT age(born) FROM t", "postgres") == "age()"
    assert volatile("SELECT age(died, born) FROM t", "postgres") == ""
    assert volatile("SELECT CURDATE()", "mysql") == "curdate()"
    assert volatile("SELECT a FROM t WHERE day > 'today'", "postgres") == "'today'"
    assert volatile("SELECT a FROM t TABLESAMPLE SYSTEM (10)", "postgres") == "tablesample"
    assert volatile("SELECT a FROM t WHERE name = 'now'", "mysql") == ""


# -- distance --------------------------------------------------------------------------------------------------------


def test_the_distance_grows_with_what_is_changed():
    gold = "SELECT name FROM player WHERE team = 'a' AND points > 3"
    column = "SELECT team FROM player WHERE team = 'a' AND points > 3"
    dropped = "SELECT team FROM player WHERE team = 'a'"
    unrelated = "SELECT count(*) FROM song JOIN album ON song.album = album.id GROUP BY year"
    near, further, far = (distance(gold, other) for other in (column, dropped, unrelated))
    assert 0 < near < further < far <= 1


def test_spelling_and_the_order_of_conditions_are_no_distance():
    assert distance("SELECT a FROM t WHERE b=1 AND c=2", "select A  from T where c = 2 and b = 1 -- x") == 0
    assert distance("SELECT a FROM t", "SELECT a FROM t") == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("SELECT a - b FROM t", "SELECT b - a FROM t"),
        ("SELECT a FROM t WHERE a < b", "SELECT a FROM t WHERE b < a"),
        ("SELECT a FROM t EXCEPT SELECT b FROM u", "SELECT b FROM u EXCEPT SELECT a FROM t"),
        ("SELECT a FROM t ORDER BY a, b", "SELECT a FROM t ORDER BY b, a"),
        ("SELECT CAST(a AS INTEGER) FROM t", "SELECT CAST(a AS REAL) FROM t"),
        ("SELECT substr(a, 1, 2) FROM t", "SELECT substr(a, 2, 1) FROM t"),
    ],
)
def test_what_changes_places_and_so_its_meaning_is_a_small_distance(one, other):
    assert 0 < distance(one, other) < 0.25


def test_neither_side_comes_first_where_nothing_parses():
    assert distance("t i d e", "d i e t") == distance("d i e t", "t i d e")


def test_sqlglot_warns_of_nothing_while_distances_are_measured_and_of_its_own_after(caplog, capfd):
    distance("GRANT a TO b", "ALTER TABLE t FOO BAR")
    assert not caplog.records
    assert capfd.readouterr().err == ""
    logging.getLogger("sqlglot").warning("the user's own")
    assert [record.message for record in caplog.records] == ["the user's own"]


def test_what_does_not_parse_has_a_distance_too():
    assert 0 < distance("SELECT a FROM t", "SELECT FROM WHERE a t") <= 1
    assert distance("SELEC a FORM t", "SELEC a FORM t") == 0


@given(st.text(max_size=60), st.sampled_from([gold for _, gold in GOLDS[:40]]), st.integers(0, 60))
@settings(deadline=None, max_examples=60)
def test_nothing_raises_and_distances_are_symmetric_and_between_0_and_1(text, gold, cut):
    for other in (text, gold[:cut] + text, gold[cut:]):
        assert distance(gold, other) == distance(other, gold)
        assert 0 <= distance(gold, other) <= 1
        assert isinstance(is_ordered(other), bool)
        assert isinstance(volatile(other), str)
        assert all(isinstance(probe, str) for probe in tie_probes(other))
        assert len(without_distinct(other)) <= len(other)


@pytest.mark.parametrize(
    "text", ["(" * 20000, "SELECT " + "(" * 5000 + "1" + ")" * 5000, "'" * 9999, "a,\ud800" * 99999, "[" * 99999]
)
def test_deep_long_and_broken_texts_end_well(text):
    limited = text + " LIMIT 1 over order distinct now"
    assert 0 <= distance(text, "SELECT 1") <= 1
    assert is_ordered(limited) in (True, False)
    assert tie_probes(limited) is not None
    assert volatile(limited) is not None
    assert without_distinct(limited)


def test_many_outer_parentheses_take_no_time():
    started = time.monotonic()
    assert is_ordered("(" * 40000 + "SELECT a FROM t ORDER BY a" + ")" * 40000)
    assert time.monotonic() - started < 5


# -- DISTINCT --------------------------------------------------------------------------------------------------------


def test_distinct_is_taken_out_of_queries_and_aggregates_only():
    assert without_distinct("SELECT DISTINCT a, count(DISTINCT b) FROM t") == "SELECT  a, count( b) FROM t"
    kept = "SELECT 'distinct' FROM t WHERE a IS DISTINCT FROM b OR a IS NOT DISTINCT FROM c"
    assert without_distinct(kept) == kept


# -- columns outside of GROUP BY -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "probe"),
    [
        ("SELECT team, name FROM player GROUP BY team", "SELECT team, min(name) AS name FROM player GROUP BY team"),
        (
            "SELECT T1.name AS n, count(*) FROM player T1 GROUP BY T1.team HAVING count(*) > 1",
            "SELECT min(T1.name) AS n, count(*) FROM player T1 GROUP BY T1.team HAVING count(*) > 1",
        ),
        ("SELECT name, count(*) FROM player", "SELECT min(name) AS name, count(*) FROM player"),
        ("SELECT name n, sum(id) FROM player GROUP BY 2 + 0", "SELECT min(name) n, sum(id) FROM player GROUP BY 2 + 0"),
        (
            "SELECT * FROM (SELECT DISTINCT `name`, points FROM player GROUP BY points)",
            "SELECT * FROM (SELECT DISTINCT min(`name`) AS `name`, points FROM player GROUP BY points)",
        ),
    ],
)
def test_a_column_that_comes_from_any_row_of_its_group_is_probed(table, sql, probe):
    assert bare_probes(sql)[0] == probe
    for each in bare_probes(sql):
        table.execute(each)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT team, count(*) FROM player GROUP BY team",
        "SELECT team AS t, count(*) FROM player GROUP BY t ORDER BY 2",
        "SELECT T1.team, count(*) FROM player T1 GROUP BY team",
        "SELECT team, count(*) FROM player GROUP BY 1",
        "SELECT upper(team), 'x', 1, avg(points) FROM player GROUP BY upper(team)",
        "SELECT name, max(points) FROM player GROUP BY team",  # SQLite takes the name from the row of the max
        "SELECT name, (SELECT count(*) FROM player) FROM player",
        "SELECT name, rank() OVER (ORDER BY count(*)) FROM player GROUP BY team",
        "SELECT count(*) FROM player",
        "SELECT name FROM player WHERE id IN (1, 2)",
        "SELECT 'group by' FROM player",
        "SELECT",
        "",
    ],
)
def test_what_is_grouped_aggregated_or_constant_is_not(sql):
    assert bare_probes(sql) == []


def test_no_probe_of_a_demo_gold_shows_another_result():
    for db_id, sql in GOLDS:
        with closing(sqlite3.connect(f"{FILES.databases}/{db_id}/{db_id}.sqlite")) as connection:
            for probe in bare_probes(sql):
                assert outcomes(connection, probe, 1) == outcomes(connection, sql, 1)

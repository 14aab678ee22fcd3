"""What a model's answer holds comes out as the model wrote it; equal normalised texts mean the same."""

import logging
import sqlite3
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t2s_pref.errors import UserError
from t2s_pref.sql import check_dialect, extract_sql, normalize_sql

PLAIN = [
    "SELECT name FROM singer",
    "select count(*) from singer;",
    "Select * from t",
    "select a b from t",
    "SELECT DISTINCT T1.name, T2.age FROM singer AS T1\nJOIN concert AS T2 ON T1.id = T2.id\nWHERE T2.year > 2014",
    "SELECT 'a;b', \"c;d\", [e;f], `g;h` FROM t; ",
    "SELECT 'it''s; here' FROM t",
    "SELECT x FROM t WHERE y = '```' OR z = '```sql\nSELECT 1\n```'",
    "SELECT '<think>' AS a, '</think>' AS b",
    'SELECT "<think>never closed" FROM t',
    "-- the names; all of them\nSELECT name FROM t -- really\nWHERE a = 1",
    "-- get it\n\nSELECT a\n\nFROM b\n\nWHERE c = 1\n\n-- done",
    "/* a; b\n\nThis is a comment */ SELECT 1; -- end",
    "WITH t AS (\n\n  SELECT 1 AS a\n\n), u(b) AS (SELECT 2)\n\nSELECT * FROM t, u",
    "with recursive n(x) as (select 1 union all select x + 1 from n) select x from n limit 5",
    "SELECT a FROM b; DROP TABLE c;",
    "(SELECT a FROM b) UNION (SELECT c FROM d)",
    "SELECT T1.`Free Meal Count (K-12)` / T1.`Enrollment (K-12)` FROM frpm AS T1",
    "SELECT name FROM t WHERE name LIKE'%a;b%' AND x = x'00'",
    "SELECT a FROM b\r\n\r\nWHERE c = 'd'",
    "INSERT INTO t VALUES (1, 'x; y')",
    "INSERT OR REPLACE INTO t SELECT * FROM u",
    "UPDATE t SET a = 1 WHERE b = ';'",
    "DELETE FROM t",
    "CREATE TEMP TABLE t (a INT)",
    "CREATE TRIGGER r AFTER INSERT ON t BEGIN UPDATE t SET a = 1; DELETE FROM u; END;",
    "DROP TABLE t",
    "VALUES (1, 2), (3, 4)",
    "EXPLAIN QUERY PLAN SELECT a FROM b",
    "PRAGMA table_info(t)",
    "SELECT the FROM t",
    "SELECT a FROM b) WHERE c",
    "SELECT 'never closed FROM t",
    "SELECT FROM WHERE",
    "SELECT",
    "WITH t (SELECT 1) SELECT * FROM t",
    'SELECT \'é😀\', "ключ" FROM "таблица"',
]


@pytest.mark.parametrize("sql", PLAIN)
@pytest.mark.parametrize(
    "around", ["{}", "\n\n {}\n", "{}\n```", "{}\n```\n\n### Question 2\n```sql\nSELECT other FROM x\n```"]
)
def test_plain_sql_passes_unchanged(sql, around):
    assert extract_sql(around.format(sql)) == sql.strip()


@pytest.mark.parametrize("sql", [sql for sql in PLAIN if "```" not in sql and "<think>never" not in sql])
@pytest.mark.parametrize(
    "around",
    [
        "```sql\n{}\n```",
        "```SQL\n{}\n```\nThis query returns it's rows; enjoy.",
        "Sure! Here is the query:\n\n```sqlite\n{}\n```\n\nIt's sorted.",
        "```\n{}\n```",
        "~~~sql\n{}\n~~~",
        "Here you are:\n```sql\n{}",
        "<think>\nSELECT draft FROM x;\n```sql\nSELECT 9\n```\n</think>\n\n```sql\n{}\n```",
        "So I would SELECT the rows ...\n</think>\n{}",
        "First:\n```sql\nSELECT draft FROM x\n```\nBetter:\n```sql\n{}\n```\nResult:\n```\n| a |\n| 1 |\n```",
    ],
)
def test_sql_comes_out_of_fences_and_thoughts(sql, around):
    assert extract_sql(around.format(sql)) == sql.strip()


@pytest.mark.parametrize(
    ("answer", "sql"),
    [
        ("Here is the query: SELECT a FROM b; This query returns a.", "SELECT a FROM b;"),
        ("The SQL is:SELECT count(*) FROM t where it's = 3; Don't", "SELECT count(*) FROM t where it's = 3;"),
        ("SQL: SELECT a FROM b", "SELECT a FROM b"),
        ("**SQLQuery:** SELECT a FROM b", "SELECT a FROM b"),
        ("Answer:\nselect a from b", "select a from b"),
        ("**SELECT a FROM b**", "SELECT a FROM b"),
        ("Use `SELECT name FROM t` please.", "SELECT name FROM t"),
        ('It is "SELECT a FROM t WHERE b = "x"".', 'SELECT a FROM t WHERE b = "x"'),
        ("You can get it (SELECT a FROM b) easily.", "SELECT a FROM b"),
        ("1. SELECT a FROM b", "SELECT a FROM b"),
        ("> SELECT a FROM b", "SELECT a FROM b"),
        ("Sure!\nSELECT a\nFROM b\nExplanation: foo", "SELECT a\nFROM b"),
        ("SELECT a FROM b\n\nThis query selects a.", "SELECT a FROM b"),
        ("SELECT a FROM b WHERE c = 'x\n\nThis' \n\nThe query ...", "SELECT a FROM b WHERE c = 'x\n\nThis'"),
        ("Query: WITH t AS (\nSELECT 1 AS a)\nSELECT a FROM t", "WITH t AS (\nSELECT 1 AS a)\nSELECT a FROM t"),
        ("It is SELECT a FROM b\nUNION\nSELECT c FROM d", "SELECT a FROM b\nUNION\nSELECT c FROM d"),
        ("Result:\n(SELECT a FROM b) UNION (SELECT c FROM d)", "(SELECT a FROM b) UNION (SELECT c FROM d)"),
        ("Here: SELECT a FROM b; SELECT c FROM d; Done.", "SELECT a FROM b; SELECT c FROM d;"),
        ("```sql SELECT 1```", "SELECT 1"),
        ("Run ```SELECT a FROM b``` now", "SELECT a FROM b"),
        ("```python\ncursor.execute('x')\n```\nSELECT a FROM b", "SELECT a FROM b"),
        ("```sql\nSQL: SELECT a FROM b\n```", "SELECT a FROM b"),
    ],
)
def test_sql_comes_out_of_chatty_answers(answer, sql):
    assert extract_sql(answer) == sql
    assert extract_sql(sql) == sql


QUERY = "SELECT name FROM student WHERE city = 'x;y'"


@pytest.mark.parametrize(
    "prose",
    [
        "Select the rows from the table with the following query:\n\n{}\n\nThis returns them.",
        "Select name from student as follows:\n```sql\n{}\n```",
        "Create a table scan, then update the set with this:\n{}",
        "To answer, we SELECT name, age FROM the table.\n\n{}",
        "First `SELECT`, then `FROM`. So:\n\n{}",
        "You use a SELECT statement with FROM here. Delete nothing.\n\n{}",
        "With canvas as the basis:\n{}",
    ],
)
def test_english_verbs_are_not_statements(prose):
    assert extract_sql(prose.format(QUERY)) == QUERY


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " \n",
        "I am sorry, I cannot answer this.",
        "Select the rows from the table",
        "with the following query you get it from there",
        "Create a table first.",
        "I got this from the table",
        "You use a SELECT statement with FROM here.",
        "<think>SELECT a FROM b",
        "<think>it never ends\n```sql\nSELECT a FROM b\n```",
        "SELECT a FROM b</think>",
        "```sql\n```",
        "```json\n{}\n```",
        ";",
    ],
)
def test_an_answer_without_sql_gives_nothing(answer):
    assert extract_sql(answer) == ""


@pytest.mark.parametrize(
    ("answer", "sql"),
    [
        ("```\nSELCT a FORM b\n```", "SELCT a FORM b"),
        ("```sql\nthe names\n```", "the names"),
        ("Draft:\n```sql\nSELECT 1\n```\nFinal:\n```sql\nSELCT 2\n```", "SELCT 2"),
        ("SELCT a FROM b", "SELCT a FROM b"),
        ("SQL: SLECT a FROM b", "SLECT a FROM b"),
        ("Selected rows come from b", ""),
        ("SELCT a FROM b. Sorry!", ""),
    ],
)
def test_garbage_that_was_meant_as_sql_is_taken(answer, sql):
    assert extract_sql(answer) == sql


@pytest.mark.parametrize(
    ("answer", "sql"),
    [
        ("<think>a</think>SELECT 1", "SELECT 1"),
        ("<think>a</think>\n<THINK>b</THINK>\n\nSELECT 1;", "SELECT 1;"),
        ("<thinking>a</thinking>SELECT 1", "SELECT 1"),
        ("<think>a <think> b</think> c</think> SELECT 1", "SELECT 1"),
        ("I'd SELECT x FROM y, let's see\n</think>\nSELECT 1", "SELECT 1"),
        ("SELECT 1 <think> is that right?", "SELECT 1"),
        ("<think>the text '</think>' is data, isn't it</think>SELECT '</think>'", "SELECT '</think>'"),
    ],
)
def test_thoughts_are_removed_before_the_sql_is_taken(answer, sql):
    assert extract_sql(answer) == sql


PIECES = st.sampled_from(
    [
        *PLAIN,
        "```",
        "```sql\n",
        "~~~",
        "\n",
        "\n\n",
        "<think>",
        "</think>",
        "'",
        '"',
        "`",
        "[",
        "(",
        ")",
        ";",
        "--",
        "/*",
    ]
    + ["*/", "**", ":", " ", "SELECT ", "with t as (", "Select the ", " FROM ", "This query ", "it's ", "Answer: ", "x"]
)
ANSWERS = st.text(st.characters()) | st.lists(PIECES | st.text(max_size=3), max_size=12).map("".join)


@given(ANSWERS)
@settings(max_examples=1500, deadline=None)
def test_taking_sql_out_twice_changes_nothing(answer):
    sql = extract_sql(answer)
    assert sql == sql.strip()
    assert extract_sql(sql) in (sql, "")  # "": garbage from a fence is not known as SQL without it
    if sql in (plain.strip() for plain in PLAIN):
        assert extract_sql(sql) == sql


HOSTILE = {
    "quotes": "SELECT '" + "''" * 9 + "'a" + "\"`'" * 9,
    "unclosed quotes": "SELECT a'\"`[",
    "fences": "```sql\n",
    "ticks": "`````",
    "tildes": "~~~\n",
    "thoughts": "<think>'\"",
    "closed thoughts": "</think>",
    "keywords": "SELECT ",
    "shaped keywords": "\nSELECT a, ",
    "mid-sentence keywords": "so SELECT a FROM ",
    "WITH": "with a (",
    "semicolons": "SELECT 1; -- c\n",
    "brackets": "[" * 20,
    "comments": "/*",
    "dashes": "SELECT 1 --",
    "blank lines": "SELECT 1\n \n",
    "spaces": "SELECT     ",
    "line ends": "\n ",
    "letters": "SELECT aaaaaaaaaaaaaaaaaa",
    "one word": "a",
    "parentheses": "((((((",
    "updates": "UPDATE a ",
    "stars": "**SELECT ",
    "colons": ": ",
}


def steps(function, argument: str) -> int:
    """Lines of Python and calls of C a function takes: unlike seconds, the same on a busy machine."""
    count = 0

    def trace(*_):
        nonlocal count
        count += 1
        return trace

    sys.settrace(trace)
    try:
        function(argument)
    finally:
        sys.settrace(None)
    return count


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("function", [extract_sql, normalize_sql.__wrapped__])
def test_the_work_is_linear_in_the_answer(kind, function):
    small, large = (HOSTILE[kind] * (size // len(HOSTILE[kind])) for size in (4_000, 16_000))
    assert steps(function, large) < 5 * steps(function, small) + 500


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_megabyte_of_nonsense_is_no_trouble(kind):
    # What happens inside a regular expression is no step of Python: only seconds show it. Quadratic would be hours.
    nonsense = HOSTILE[kind] * (1_000_000 // len(HOSTILE[kind]))
    extract_sql("Sure: " + nonsense)
    normalize_sql(nonsense)


# -- normalisation


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("SELECT a FROM t", "select  A\nfrom T ;"),
        ("SELECT a FROM t", "```sql\nSELECT a FROM t;\n```"),
        ("SELECT a FROM t", "SELECT a -- the a\nFROM /* the\n t */ t;;"),
        ("SELECT a FROM t WHERE b != 1", "SELECT a FROM t WHERE b<>1"),
        ("SELECT a FROM t WHERE b == 1", "SELECT a FROM t WHERE b=1"),
        ("SELECT COUNT(*),T1.A FROM t T1", "select count ( * ) , t1.a from t t1"),
        ("SELECT a FROM t GROUP   BY a", "SELECT a FROM t GROUP BY A"),
    ],
)
def test_spellings_of_one_query_are_equal(one, other):
    assert normalize_sql(one) == normalize_sql(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("SELECT 'A' FROM t", "SELECT 'a' FROM t"),
        ("SELECT 'a  b' FROM t", "SELECT 'a b' FROM t"),
        ('SELECT a FROM t WHERE b = "Nebraska"', 'SELECT a FROM t WHERE b = "nebraska"'),  # may be a string in SQLite
        ('SELECT "a" FROM t', "SELECT [a] FROM t"),  # only the first may be a string
        ("SELECT 'a' FROM t", 'SELECT "a" FROM t'),
        ("SELECT \u212a FROM t", "SELECT k FROM t"),  # SQLite folds ASCII only: the first is a Kelvin sign
        ("SELECT\u00a0a FROM t", "SELECT a FROM t"),
        ("SELECT 5x", "SELECT 5 x"),
        ("SELECT 1 {# 2 #}", "SELECT 1"),
        ("SELECT 1 /* /* */ , 2 */", "SELECT 1"),
        ("SELECT a FROM b; SELECT c", "SELECT a FROM b"),
        # What sqlglot's tree holds to be the same, and SQLite 3.40 does not.
        ("SELECT NVL(a, b) FROM t", "SELECT IFNULL(a, b) FROM t"),
        ("SELECT CHAR_LENGTH(a) FROM t", "SELECT LENGTH(a) FROM t"),
        ("SELECT a::int FROM t", "SELECT CAST(a AS INTEGER) FROM t"),
        ("SELECT CAST(5 AS DECIMAL) / 2", "SELECT CAST(5 AS REAL) / 2"),
    ],
)
def test_what_may_mean_something_else_is_not_equal(one, other):
    assert normalize_sql(one) != normalize_sql(other)


def test_case_of_names_is_kept_where_the_dialect_may_care():
    assert normalize_sql("SELECT a FROM T", "mysql") != normalize_sql("SELECT a FROM t", "mysql")
    assert normalize_sql("select a from t", "mysql") == normalize_sql("SELECT a FROM t;", "mysql")
    assert normalize_sql("SELECT COUNT (*) FROM t", "mysql") != normalize_sql("SELECT COUNT(*) FROM t", "mysql")
    assert normalize_sql("SELECT 5--3", "mysql") != normalize_sql("SELECT 5", "mysql")
    assert normalize_sql("SELECT A FROM T", "postgres") == normalize_sql("select a from t", "postgres")


@given(ANSWERS, st.sampled_from(["sqlite", "mysql", "postgres", "duckdb", "bigquery", "tsql"]))
@settings(max_examples=1500, deadline=None)
def test_normalising_never_raises_and_twice_changes_nothing(sql, dialect):
    once = normalize_sql(sql, dialect)
    assert normalize_sql(once, dialect) == once


ATOMS = st.sampled_from(
    [
        "a",
        "A",
        "1",
        "'x  y'",
        "'X'",
        '"a"',
        '"zz"',
        "'it''s'",
        "[a]",
        "`A`",
        "count(*)",
        "sum( a )",
        "b",
        "null",
        "x'00'",
    ]
)
OPERATORS = st.sampled_from(
    ["=", "==", "!=", "<>", "<", ">=", "+", " - ", "- -", "||", "*", " and ", " OR ", " is ", "/"]
)
EXPRESSIONS = st.lists(st.tuples(OPERATORS, ATOMS), max_size=4).map(lambda rest: "".join(map("".join, rest)))


@given(
    ATOMS, EXPRESSIONS, st.sampled_from(["", " ", "\n\t", " -- c\n", "/* ; */"]), st.sampled_from(["", ";", " ; -- x"])
)
@settings(max_examples=300, deadline=None)
def test_the_normalised_text_means_what_the_text_means(first, rest, gap, end):
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE t (a, b)")
    connection.executemany("INSERT INTO t VALUES (?, ?)", [(1, "X"), (2, None), ("a", 3)])
    sql = f"SELECT{gap or ' '}{first}{gap}{rest}{gap or ' '}From{gap or ' '}T{end}"

    def run(text: str) -> object:
        try:
            return connection.execute(text).fetchall()
        except sqlite3.Error as error:
            return type(error)

    assert run(sql) == run(normalize_sql(sql))
    connection.close()


@pytest.mark.parametrize(
    "sql", ["(" * 10_000 + "1" + ")" * 10_000, "SELECT " + "-" * 3 + "NOT " * 20_000 + "1", "f(" * 30_000]
)
def test_deep_nests_do_not_recurse(sql):
    assert normalize_sql(sql) == normalize_sql(normalize_sql(sql))


def test_nothing_is_logged(caplog):
    caplog.set_level(logging.DEBUG)
    for sql in ["SHOW TABLES", "'unclosed", "EXECUTE x y", "{% if %}", "/* unclosed"]:
        normalize_sql(sql)
    assert not caplog.records


@pytest.mark.parametrize("dialect", ["sqlight", "", "SQLite", None])
def test_an_unknown_dialect_is_refused_with_the_known_ones(dialect):
    with pytest.raises(UserError, match="is not known; use one of .*postgres.*sqlite"):
        check_dialect(dialect)
    with pytest.raises(UserError):
        normalize_sql("SELECT 1", dialect)

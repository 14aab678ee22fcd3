"""What model-written SQL cannot do: each attack, on real worker processes, ends in a verdict and changes nothing."""

import hashlib
import os
import resource
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from t2s_pref import verdicts
from t2s_pref.pool import GRACE, Bounds, Candidate, Gold, Job, WorkerPool

DEADLINE = 1.0
SLACK = 0.3  # for the gold before it and a process to start; a busy machine has three tries

ENDLESS = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c)"
BLOCKED, RESOURCE, TIMEOUT = verdicts.BLOCKED, verdicts.RESOURCE, verdicts.TIMEOUT
COSTLY = (RESOURCE, TIMEOUT, verdicts.WORKER_DIED)

REFUSED = {
    "delete": "DELETE FROM t",
    "delete returning": "DELETE FROM t RETURNING *",
    "drop": "DROP TABLE t",
    "update": "UPDATE t SET a = 1",
    "insert": "INSERT INTO t VALUES (1, 'x')",
    "insert in a WITH": "WITH x AS (SELECT 1) INSERT INTO t SELECT 1, 'x' FROM x",
    "replace": "REPLACE INTO t VALUES (1, 'x')",
    "alter": "ALTER TABLE t ADD COLUMN z",
    "create table": "CREATE TABLE z (a)",
    "create temp table": "CREATE TEMP TABLE z (a)",
    "create table as": "CREATE TABLE z AS SELECT * FROM t",
    "create view": "CREATE VIEW z AS SELECT 1",
    "create trigger": "CREATE TRIGGER z AFTER INSERT ON t BEGIN DELETE FROM t; END",
    "create index": "CREATE INDEX z ON t (a)",
    "create virtual table": "CREATE VIRTUAL TABLE z USING fts5(a)",
    "attach a file": "ATTACH DATABASE '{folder}/new.sqlite' AS z",
    "attach memory": "ATTACH ':memory:' AS z",
    "attach a uri": "ATTACH 'file:{folder}/new.sqlite?mode=rwc' AS z",
    "detach": "DETACH main",
    "vacuum": "VACUUM",
    "vacuum into": "VACUUM INTO '{folder}/new.sqlite'",
    "pragma": "PRAGMA journal_mode=WAL",
    "pragma writable schema": "PRAGMA writable_schema=ON",
    "pragma limits": "PRAGMA hard_heap_limit=0",
    "pragma as a table": "SELECT * FROM pragma_database_list",
    "the path of the file": "SELECT file FROM pragma_database_list()",
    "begin exclusive": "BEGIN EXCLUSIVE",
    "commit": "COMMIT",
    "rollback": "ROLLBACK",
    "savepoint": "SAVEPOINT z",
    "reindex": "REINDEX",
    "analyze": "ANALYZE",
    "load extension": "SELECT load_extension('/lib/x86_64-linux-gnu/libc.so.6')",
    "fts3 tokenizer": "SELECT fts3_tokenizer('simple', x'4141414141414141')",
    "pages of the file": "SELECT * FROM sqlite_dbpage",
    "statistics of the file": "SELECT * FROM dbstat",
    "write the schema": "UPDATE sqlite_master SET sql = 'x'",
}

GREEDY = {
    "endless count": f"{ENDLESS} SELECT count(*) FROM c",
    "endless rows": f"{ENDLESS} SELECT x FROM c",
    "endless sum that is sorted": f"{ENDLESS} SELECT x FROM c ORDER BY x DESC",
    "endless distinct": f"{ENDLESS} SELECT DISTINCT x FROM c",
    "endless group": f"{ENDLESS} SELECT x, count(*) FROM c GROUP BY x",
    "strings that double": "WITH RECURSIVE c(x) AS (SELECT 'ab' UNION ALL SELECT x || x FROM c) SELECT count(x) FROM c",
    "many strings": f"{ENDLESS} SELECT x, hex(randomblob(100000)) FROM c",
    "cross join": "SELECT count(*) FROM t a, t b, t c, t d, t e, t f",
    "big sort": "SELECT a.b || b.b || c.b FROM t a, t b, t c, t d ORDER BY 1",
    "group_concat": "SELECT group_concat(a.b || b.b || c.b) FROM t a, t b, t c, t d",
    "window over a cross join": "SELECT sum(a.a) OVER (ORDER BY b.a, c.a, d.a) FROM t a, t b, t c, t d",
    "correlated subqueries": "SELECT count(*) FROM t a WHERE (SELECT sum(b.a) FROM t b, t c, t d WHERE b.a > a.a) > 1",
    "randomblob": "SELECT randomblob(1000000000)",
    "zeroblob in hex": "SELECT hex(zeroblob(900000000))",
    "printf": "SELECT printf('%.*c', 900000000, 'x')",
    "printf measured": "SELECT length(printf('%.*c', 900000000, 'x'))",
    "printf often": f"{ENDLESS} SELECT count(printf('%.*c', 100000000, 'x')) FROM c",
    "instr": "SELECT instr(hex(zeroblob(4000000)), hex(zeroblob(2000000)) || '1')",
    "replace": "SELECT length(replace(replace(hex(zeroblob(3000)), '0', hex(zeroblob(3000))), '0', hex(zeroblob(9))))",
    "like": "SELECT hex(zeroblob(2000)) LIKE '%' || replace(hex(zeroblob(200)), '0', '0%_') || '1'",
    "glob": "SELECT hex(zeroblob(20000)) GLOB replace(hex(zeroblob(20)), '0', '*0') || '1'",
    "json": "SELECT json('" + "[" * 100_000 + "')",
    "quote": "SELECT quote(zeroblob(7999999)) || quote(zeroblob(7999999))",
    "many rows of long text": f"{ENDLESS} SELECT hex(zeroblob(3000000)) FROM c LIMIT 1000",
    "more rows than are looked at": f"{ENDLESS} SELECT x FROM c LIMIT 200000",
    "wide rows": f"{ENDLESS} SELECT {', '.join(['x'] * 1500)} FROM c LIMIT 5000",
    "union of very many": " UNION ALL ".join(["SELECT 1"] * 5000),
    "deep parentheses": "SELECT " + "(" * 20_000 + "1" + ")" * 20_000,
    "long expression": "SELECT " + "+".join(["1"] * 50_000),
    "too long a text": "SELECT '" + "x" * 5_000_000 + "'",
}

STRANGE = {
    "nul character": "SELECT 'a\0b'",
    "lone surrogate": "SELECT '\ud800'",
    "statement without end": "SELECT 'abc",
    "comment without end": "SELECT 1 /* abc",
    "only a comment": "-- DROP TABLE t",
    "nothing": "",
    "two statements": "SELECT 1; DROP TABLE t",
    "many semicolons": "SELECT 1;;;",
    "a parameter": "SELECT ?",
    "a named parameter": "SELECT :x",
    "another file's table": "SELECT * FROM other.t",
    "a shell's function": "SELECT readfile('/etc/passwd')",
    "another shell's function": "SELECT writefile('{folder}/new', 'x')",
    "an editor": "SELECT edit('x', 'vi')",
    "compile options": "SELECT sqlite_compileoption_get(1)",
    "explain": "EXPLAIN SELECT * FROM t",
    "the schema": "SELECT * FROM sqlite_master",
    "invalid utf-8 in the data": "SELECT CAST(x'fffe41' AS TEXT)",
    "the largest integers": "SELECT 9223372036854775807 + 1, 1e999, -1e999, abs(-9223372036854775808)",
    "two thousand columns": "SELECT " + ", ".join(map(str, range(2000))),
    "fifty like columns": f"{ENDLESS} SELECT {', '.join(['x % 2'] * 50)} FROM c LIMIT 2000",
    "floats by the ten thousand": f"{ENDLESS} SELECT x / 7.0, x / 3.0, x * 1.1 FROM c LIMIT 30000",
}


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacked") / "db"
    folder.mkdir()
    with closing(sqlite3.connect(folder / "db.sqlite")) as connection:
        connection.execute("CREATE TABLE t (a INTEGER, b TEXT)")
        connection.executemany("INSERT INTO t VALUES (?, ?)", [(number, f"name {number}" * 9) for number in range(300)])
        connection.commit()
    return folder / "db.sqlite"


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(1, Bounds(timeout=DEADLINE, gold_timeout=DEADLINE)) as opened:
        yield opened


def state(database: Path) -> tuple:
    folder = database.parent
    return hashlib.sha256(database.read_bytes()).hexdigest(), sorted(os.listdir(folder)), sorted(os.listdir("/"))


def judge(pool, database, golds, candidates):
    def task():
        return (yield Job(str(database), tuple(map(Gold, golds)), tuple(map(Candidate, candidates))))

    ((_, outcome),) = pool.run([task()])
    return outcome


def attack(pool, database, sql, limit=DEADLINE + GRACE + SLACK):
    """The verdict on an attack and the seconds it took, if need be the last of three times."""
    for _ in range(3):
        verdict, seconds = attack_once(pool, database, sql)
        if seconds < limit:
            break
    return verdict, seconds


def attack_once(pool, database, sql):
    """The file and the pool are as good afterwards as before."""
    sql = sql.replace("{folder}", str(database.parent))
    before = state(database)
    start = time.monotonic()
    outcome = judge(pool, database, ["SELECT count(*) FROM t"], [sql])
    seconds = time.monotonic() - start
    assert state(database) == before
    assert outcome.golds[0]["verdict"] == verdicts.GOLD_OK
    right = judge(pool, database, ["SELECT count(*) FROM t"], ["SELECT 300"])
    assert right.candidates[0]["verdict"] == verdicts.EQUIVALENT
    return outcome.candidates[0]["verdict"], seconds


@pytest.mark.parametrize("sql", REFUSED.values(), ids=REFUSED)
def test_what_is_no_query_is_blocked(pool, database, sql):
    verdict, seconds = attack(pool, database, sql)
    # an engine built without a module says that there is no such table, and REINDEX of nothing is nothing
    assert verdict in (BLOCKED, verdicts.MISSING_TABLE) or (sql, verdict) == ("REINDEX", verdicts.EMPTY)
    assert seconds < DEADLINE + SLACK


@pytest.mark.parametrize("sql", GREEDY.values(), ids=GREEDY)
def test_what_takes_too_much_is_ended_in_time_and_is_not_called_wrong(pool, database, sql):
    verdict, seconds = attack(pool, database, sql)
    # a parser that gives up, or a machine that is fast enough, may have other words; wrong it is only if it did run
    allowed = {*COSTLY, verdicts.SYNTAX_ERROR, verdicts.OTHER_ERROR, verdicts.WRONG_RESULT}
    assert verdict in (COSTLY if "RECURSIVE" in sql or "FROM t" in sql or "printf" in sql else allowed)
    assert seconds < DEADLINE + GRACE + SLACK


@pytest.mark.parametrize("sql", STRANGE.values(), ids=STRANGE)
def test_what_is_strange_has_a_verdict(pool, database, sql):
    verdict, seconds = attack(pool, database, sql)
    assert verdict in verdicts.VERDICTS
    assert verdict not in verdicts.RIGHT
    assert seconds < DEADLINE + GRACE + SLACK


@pytest.mark.parametrize(
    "name", ["endless count", "endless rows", "printf", "big sort", "more rows than are looked at"]
)
def test_a_gold_that_attacks_condemns_nobody_and_is_ended_in_time(pool, database, name):
    for _ in range(3):
        start = time.monotonic()
        outcome = judge(pool, database, [GREEDY[name]], ["SELECT 1", "SELEC 1"])
        if (seconds := time.monotonic() - start) < DEADLINE + GRACE + SLACK:
            break
    assert outcome.golds[0]["verdict"] in (
        verdicts.GOLD_TIMEOUT,
        verdicts.GOLD_TRUNCATED,
        verdicts.GOLD_ERROR,
    )
    assert outcome.candidates == []
    assert seconds < DEADLINE + GRACE + SLACK


def test_candidates_before_and_after_an_attack_are_judged_as_if_it_were_not_there(pool, database):
    kill = GREEDY["printf"]
    candidates = [
        "SELECT 300",
        kill,
        "SELECT 299",
        GREEDY["endless count"],
        "DROP TABLE t",
        kill,
        "SELECT count(a) FROM t",
    ]
    found = judge(pool, database, ["SELECT count(*) FROM t"], candidates).candidates
    assert [each["verdict"] for each in found] == [
        verdicts.EQUIVALENT,
        TIMEOUT,
        verdicts.WRONG_RESULT,
        TIMEOUT,
        BLOCKED,
        TIMEOUT,
        verdicts.EQUIVALENT,
    ]


def test_no_process_ever_held_a_gigabyte(database):
    """In a process apart, whose children are the pool's alone."""
    command = [sys.executable, __file__, str(database)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1 << 20  # KiB


def hold(database: Path) -> None:
    """Attack the database, and print the most KiB that a process held."""
    with WorkerPool(1, Bounds(timeout=DEADLINE, gold_timeout=DEADLINE)) as pool:
        for name in ("many strings", "printf", "strings that double", "many rows of long text"):
            attack(pool, database, GREEDY[name])
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def test_a_result_that_is_slow_to_compare_ends_in_time(database):
    bits = ", ".join(f"(x >> {place % 11}) & 1" for place in range(40))
    gold = f"{ENDLESS} SELECT {bits} FROM c LIMIT 2000"
    other = f"{ENDLESS} SELECT {bits} FROM (SELECT x * 7 + 3 AS x FROM c) LIMIT 2000"
    many = f"{ENDLESS} SELECT x * 1.000001, x / 3.0 FROM c LIMIT 90000"
    near = f"{ENDLESS} SELECT x / 3.0, x * 1.000001 FROM c LIMIT 90001"
    with WorkerPool(1, Bounds(timeout=DEADLINE, gold_timeout=20)) as pool:
        for left, right in ((gold, other), (many, near)):
            start = time.monotonic()
            outcome = judge(pool, database, [left], [right])
            took = time.monotonic() - start
            (found,) = outcome.candidates
            assert found["verdict"] in (verdicts.AMBIGUOUS, TIMEOUT, verdicts.WRONG_RESULT)
            assert took < 20 + GRACE + 2  # its gold has 20 seconds


if __name__ == "__main__":
    hold(Path(sys.argv[1]))

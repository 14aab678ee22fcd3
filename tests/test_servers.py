"""What users of PostgreSQL, MySQL and MariaDB can rely on, on real servers where they answer."""

import logging
import time
from pathlib import Path

import pytest
from database_servers import PASSWORD, administer, reading_role
from datasets import Dataset
from sqlalchemy import make_url

from t2s_pref import UserError, audit_golds, verify_rejected
from t2s_pref.judge import Failed, Limits
from t2s_pref.servers import ServerDatabase

LIMITS = Limits(rows=10_000, size=8 << 20)
FOREVER = {"postgres": "SELECT pg_sleep(60)", "mysql": "SELECT sleep(60)"}
ENDLESS = {
    "postgres": "SELECT a.x FROM generate_series(1, 1000000) a(x), generate_series(1, 1000) b(y)",
    "mysql": "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 900) SELECT a.x FROM c a, c b",
}


@pytest.fixture(scope="module", params=["postgres", "mysql"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def url(kind):
    with reading_role(kind) as found:
        yield found


@pytest.fixture(scope="module")
def database(url):
    opened = ServerDatabase(url, LIMITS)
    yield opened
    opened.close()


def outcome(database, sql, seconds=2.0):
    try:
        return database.run(sql, seconds)
    except Failed as failed:
        return failed.verdict


def rows(url, *pairs, **columns):
    golds, rejects = zip(*pairs, strict=True)
    return Dataset.from_dict({"output": list(golds), "rejected": list(rejects), **columns})


# -- one statement ---------------------------------------------------------------------------------------------------


def test_values_come_as_they_were_put_in(database):
    found = database.run("SELECT id, title, price, bought, lent, cover FROM book ORDER BY id", 5)
    assert found.width == 6
    assert found.rows == [
        (1, "100 % 'Jazz' :x", 9.5, "2020-01-02", 1, b"\x00\xff"),
        (2, "Zürich", 12.0, None, 0, None),
        (3, None, 12.0, "9999-12-31", None, None),
    ]
    assert '"a"' in database.run("SELECT note FROM book WHERE id = 1", 5).rows[0][0]
    assert database.run("SELECT id FROM book WHERE id > 7", 5) == (1, [])


def test_percent_signs_and_colons_are_no_parameters(database):
    assert database.run("SELECT count(*) FROM book WHERE title LIKE '100 %' AND title LIKE '%:x'", 5).rows == [(1,)]


def test_the_engines_name_and_version_are_known(database, kind):
    name, _, version = database.version.partition(" ")
    assert name in (("PostgreSQL",) if kind == "postgres" else ("MariaDB", "MySQL"))
    assert version[0].isdigit()


@pytest.mark.parametrize(
    ("sql", "verdict"),
    [
        ("SELECT * FROM nope", "missing_table"),
        ("SELECT nope FROM book", "missing_column"),
        ("SELECT nope(1)", "missing_function"),
        ("SELECT FROM WHERE book", "syntax_error"),
        ("SELCT 1", "syntax_error"),
        ("SELECT (SELECT id FROM book)", "other_error"),
        ("", "empty"),
        ("-- nothing", "empty"),
        (";", "empty"),
        ("SELECT 1; DROP TABLE book", "multi_statement"),
        ("COMMIT; DROP TABLE book", "multi_statement"),
        ("DROP TABLE book", "blocked"),
        ("DELETE FROM book", "blocked"),
        ("/* hi */ (((UPDATE book SET id = 1", "blocked"),
        ("INSERT INTO book (id) VALUES (9)", "blocked"),
        ("SET TRANSACTION READ WRITE", "blocked"),
        ("CREATE TEMPORARY TABLE x (a integer)", "blocked"),
        ("EXPLAIN SELECT 1", "blocked"),
        ("GRANT ALL ON book TO public", "blocked"),
        ("SELECT id FROM book FOR UPDATE", "blocked"),
        ("CALL something()", "blocked"),
        ("LOCK TABLE book", "blocked"),
    ],
)
def test_each_failure_has_its_verdict(database, kind, sql, verdict):
    found = outcome(database, sql)
    # MySQL tells nobody whether a function exists who may not run any
    assert found == verdict or ((verdict, found) == ("missing_function", "blocked") and kind == "mysql")
    assert database.run("SELECT count(*) FROM book", 5).rows == [(3,)]


def test_a_statement_in_a_string_or_a_comment_is_none(database):
    assert database.run("SELECT 'a; DROP TABLE book' -- ; DELETE FROM book", 5).rows == [("a; DROP TABLE book",)]
    assert database.run("SELECT 'insert into book for update'", 5).rows == [("insert into book for update",)]


WRITES = {
    "postgres": [
        "WITH gone AS (DELETE FROM book RETURNING *) SELECT * FROM gone",
        "SELECT * INTO other FROM book",
        "SELECT nextval('ticket')",
        "SELECT lo_create(4711)",
        "SELECT pg_read_file('/etc/passwd')",
        "SELECT pg_terminate_backend(1)",
        "COPY book TO PROGRAM 'true'",
        "SELECT lo_import('/etc/passwd')",
        "SELECT * FROM pg_authid",
        "DO $$ BEGIN DELETE FROM book; END $$",
        "SELECT $$;$$; DROP TABLE book",
        "SELECT E'\\'; DROP TABLE book; --'",
    ],
    "mysql": [
        "SELECT * FROM book INTO OUTFILE '/tmp/t2s_pref_book'",
        "SELECT title INTO DUMPFILE '/tmp/t2s_pref_book' FROM book LIMIT 1",
        "SELECT * FROM mysql.user",
        "SELECT id FROM book LOCK IN SHARE MODE",
        "LOAD DATA LOCAL INFILE '/etc/passwd' INTO TABLE book",
        "SELECT 1 /*!; DROP TABLE book */",
        "SELECT '\\'; DROP TABLE book; -- '",
    ],
}


SAFE = ("blocked", "multi_statement", "other_error", "not_sql", "syntax_error")


def test_nothing_that_a_statement_does_stays(database, kind, url):
    name = make_url(url).database
    before = administer(kind, ("SELECT * FROM book ORDER BY id",), name)
    for sql in WRITES[kind]:
        found = outcome(database, sql)
        assert not isinstance(found, str) or found in SAFE
    assert administer(kind, ("SELECT * FROM book ORDER BY id",), name) == before
    assert not Path("/tmp/t2s_pref_book").exists()
    if kind == "postgres":
        assert administer(kind, ("SELECT last_value, is_called FROM ticket",), name) == [(1, False)]
        assert administer(kind, ("SELECT count(*) FROM pg_largeobject_metadata WHERE oid = 4711",), name) == [(0,)]


def test_what_a_statement_sets_is_gone_before_the_next(database, kind):
    if kind == "postgres":
        database.run("SELECT set_config('search_path', 'nowhere', false), pg_advisory_lock(7)", 5)
        assert database.run("SELECT current_setting('search_path')", 5).rows != [("nowhere",)]
        assert database.run("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'", 5).rows == [(0,)]
    else:
        database.run("SELECT @mine := 5, get_lock('t2s', 1)", 5)
        assert database.run("SELECT @mine, is_free_lock('t2s')", 5).rows == [(None, 1)]


def test_random_numbers_start_at_a_seed_and_their_negatives_order_rows_the_other_way(database, kind):
    chance = "random()" if kind == "postgres" else "rand()"
    orders = [
        [database.run(f"SELECT id FROM book ORDER BY {sign}{chance}", 5, seed=seed).rows for sign in ("", "-", "")]
        for seed in range(8)
    ]
    assert all(one == again == list(reversed(other)) for one, other, again in orders)
    assert len({str(one) for one, _, _ in orders}) > 2


def test_a_statement_that_takes_too_long_is_stopped_by_the_server_too(database, kind, url):
    start = time.monotonic()
    assert outcome(database, FOREVER[kind], seconds=1.0) == "timeout"
    assert time.monotonic() - start < 5
    name = make_url(url).database
    shown = (
        f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{name}' AND state = 'active'"
        if kind == "postgres"
        else f"SELECT count(*) FROM information_schema.processlist WHERE db = '{name}' AND command = 'Query'"
    )
    assert administer(kind, (shown,)) == [(0,)]
    assert database.run("SELECT 1", 5).rows == [(1,)]


def test_an_endless_result_is_cut_and_not_held(database, kind):
    assert outcome(database, ENDLESS[kind], seconds=20.0) == "resource"
    assert database.run("SELECT 1", 5).rows == [(1,)]


def test_a_database_that_cannot_be_reached_says_so_without_the_password(url):
    address = make_url(url)
    for wrong, verdict in (
        (address.set(database="not_there"), "no_database"),
        (address.set(port=1), "unreachable"),
        (address.set(username="nobody_here"), "unreachable"),
    ):
        with pytest.raises(Failed) as caught:
            ServerDatabase(wrong.render_as_string(hide_password=False), LIMITS)
        assert caught.value.verdict == verdict
        assert PASSWORD not in caught.value.message


# -- verification ----------------------------------------------------------------------------------------------------


def test_rejects_are_judged_on_the_server(url, kind, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    dataset = rows(
        url,
        (
            "SELECT count(*) FROM book",
            [
                "SELECT count(id) FROM book",
                "SELECT count(title) FROM book",
                "SELECT nope",
                "DELETE FROM book",
                FOREVER[kind],
            ],
        ),
        ("SELECT title FROM book ORDER BY price DESC LIMIT 1", ["SELECT 'Zürich'", "SELECT 1"]),
        ("SELECT nope FROM book", ["SELECT 1"]),
        ("SELECT id FROM book ORDER BY id", ["SELECT id FROM book ORDER BY id DESC", "SELECT id + 1 FROM book"]),
    )
    found = verify_rejected(dataset, url, timeout=1, cache_dir=tmp_path, database_version="1")
    assert found["verdict"][:] == [
        ["equivalent", "wrong_result", "missing_column", "blocked", "timeout"],
        ["unverified", "unverified"],
        ["unverified"],
        ["ambiguous", "wrong_result"],
    ]
    assert found["gold_verdict"][:] == ["ok", "gold_nondeterministic", "gold_error", "ok"]
    assert found.info.description.endswith("database_version 1")
    # the password is nowhere: not in what is kept, nor in what was said
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"equivalent" in kept
    assert PASSWORD.encode() not in kept
    assert PASSWORD not in caplog.text + str(found.info) + found._fingerprint + str(found[:])


def test_what_the_order_of_rows_decides_on_a_server_condemns_nothing(url, kind, tmp_path):
    together = "string_agg(title, ',')" if kind == "postgres" else "group_concat(title)"
    tied = f"SELECT price, {together} FROM book GROUP BY price"
    ordered = tied.replace("title,", "title, ").replace(")", " ORDER BY id)", 1)
    determined = ["SELECT price, count(*) FROM book GROUP BY price", "SELECT max(id) FROM book WHERE id < 3", ordered]
    golds = [tied, "SELECT id FROM book WHERE price = 12 LIMIT 1", *determined]
    dataset = rows(url, *[(gold, ["SELECT 4711, 'x'"]) for gold in golds])
    with_null = "UPDATE book SET title = 'Anna' WHERE id = 3"
    administer(kind, (with_null,), make_url(url).database)
    found = verify_rejected(dataset, url, cache_dir=tmp_path)
    administer(kind, ("UPDATE book SET title = NULL WHERE id = 3",), make_url(url).database)
    assert found["gold_verdict"][:] == ["gold_nondeterministic"] * 2 + ["ok"] * 3


def test_what_a_server_said_is_kept_only_where_its_content_has_a_name(url, tmp_path):
    dataset = rows(url, ("SELECT count(*) FROM book", ["SELECT 1"]))
    for version, kept in ((None, False), ("2026-11", True)):
        cache = tmp_path / str(version)
        first = verify_rejected(dataset, url, cache_dir=cache, database_version=version)
        second = verify_rejected(dataset, url, cache_dir=cache, database_version=version)
        assert first[:] == second[:]
        assert (first._fingerprint == second._fingerprint) is kept
        assert bool(list(cache.rglob("*.arrow"))) is kept
        assert bool(list(cache.rglob("*.log"))) is kept


def test_each_row_may_have_a_database_of_its_own_in_the_url(url, tmp_path):
    name = make_url(url).database
    dataset = rows(url, ("SELECT 1", ["SELECT 2"]), ("SELECT 1", ["SELECT 2"]), db_id=[name, "not_there"])
    found = verify_rejected(dataset, url.removesuffix(name) + "{db_id}", cache_dir=tmp_path)
    assert found["verdict"][:] == [["wrong_result"], ["unverified"]]
    assert found["gold_verdict"][:] == ["ok", "no_database"]


def test_a_server_that_is_away_ends_the_run_and_leaves_no_verdict_behind(url, tmp_path):
    dataset = rows(url, ("SELECT count(*) FROM book", ["SELECT 1"]))
    away = make_url(url).set(port=1).render_as_string(hide_password=False)
    with pytest.raises(UserError, match="cannot be reached") as refused:
        verify_rejected(dataset, away, cache_dir=tmp_path, database_version="1")
    assert PASSWORD not in str(refused.value)
    assert "\n" not in str(refused.value)
    # the same address later: nothing stands in the way
    assert not list(tmp_path.rglob("*.arrow"))
    assert not [log for log in tmp_path.rglob("*.log") if log.stat().st_size]


def test_golds_are_audited_on_the_server(url, tmp_path):
    dataset = rows(url, ("SELECT nope FROM book", []), ("SELECT id FROM book WHERE id > 9", []), ("SELECT 1", []))
    found = audit_golds(dataset, url, cache_dir=tmp_path)
    assert found.verdicts == {"ok": 1, "gold_empty": 1, "gold_error": 1}
    assert PASSWORD not in str(found) + str(found.to_dict())


def test_a_server_that_is_not_known_is_refused():
    with pytest.raises(UserError, match="'oracle' is not a server known here"):
        audit_golds(Dataset.from_dict({"output": ["SELECT 1"]}), "oracle://a:b@c/d")

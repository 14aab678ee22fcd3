"""What a statement may not do to a server, to its worker, or to the next statement; on real servers."""

import os
import re
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from database_servers import ADMIN, PASSWORD, administer, reading_role
from sqlalchemy import make_url

from t2s_pref.judge import Failed, Limits
from t2s_pref.servers import ServerDatabase

LIMITS = Limits(rows=1000, size=1 << 20)


@pytest.fixture(scope="module", params=["postgres", "mysql"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def url(kind):
    with reading_role(kind) as found:
        yield found


@pytest.fixture
def database(url):
    opened = ServerDatabase(url, LIMITS)
    yield opened
    opened.close()


def outcome(database, sql, seconds=2.0):
    try:
        return database.run(sql, seconds).rows
    except Failed as failed:
        return failed.verdict


def only(kind):
    """For what one kind of server alone has."""
    return pytest.mark.parametrize("kind", [kind], indirect=True, scope="module")


def test_a_result_that_streams_on_is_cut_at_once(database, kind):
    """psycopg's stream held the lock that the reset waits for."""
    sql = "SELECT generate_series(1, 1000000000)" if kind == "postgres" else "SELECT * FROM seq_1_to_1000000000"
    start = time.monotonic()
    assert outcome(database, sql, 20) == "resource"
    assert time.monotonic() - start < 3
    assert outcome(database, "SELECT 1") == [(1,)]


def test_too_many_bytes_are_cut_too(database, kind):
    rows = "generate_series(1, 900)" if kind == "postgres" else "seq_1_to_900"
    assert outcome(database, f"SELECT repeat('x', 9000) FROM {rows}", 20) == "resource"
    assert outcome(database, "SELECT 1") == [(1,)]


@only("mysql")
def test_an_interrupted_benchmark_is_no_result(database, kind):
    """MariaDB answers 0 and MySQL's sleep 1 when the time limit ends them."""
    assert outcome(database, "SELECT benchmark(1e12, md5(1))", 1.0) == "timeout"


def test_functions_called_like_statements_are_queries(database):
    sql = "WITH q AS (SELECT id FROM book) SELECT upper(replace('abc', 'b', 'x')), count(*) FROM q"
    assert outcome(database, sql) == [("AXC", 3)]


@only("postgres")
def test_words_in_strings_of_any_kind_are_no_keywords(database, kind):
    assert outcome(database, "SELECT E'go into x', $$ for update $$, U&'into'") == [
        ("go into x", " for update ", "into")
    ]


@pytest.mark.parametrize("sql", ["MOVE x", "REASSIGN OWNED BY a TO b", "CHECKSUM TABLE book", "HELP 'x'", "SIGNAL x"])
def test_no_statement_of_any_server_is_a_syntax_error(database, sql):
    assert outcome(database, sql) == "blocked"


@only("mysql")
@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1 /*! INTO OUTFILE '/tmp/t2s_pref_hidden' */",
        "SELECT 1 /*M! INTO OUTFILE '/tmp/t2s_pref_hidden' */",
        "SELECT /*+ MAX_EXECUTION_TIME(0) */ 1",
        "SELECT /*+ SET_VAR(max_execution_time = 0) */ 1",
    ],
)
def test_what_a_comment_hides_is_not_sent(kind, sql):
    """As an administrator: nothing but the look at the text is in the way."""
    try:
        database = ServerDatabase(ADMIN["mysql"], LIMITS)
    except Failed as failed:
        pytest.skip(failed.message)
    assert outcome(database, sql) == "blocked"
    database.close()
    assert not Path("/tmp/t2s_pref_hidden").exists()


def test_a_nul_does_not_cut_a_statement_short(database):
    assert outcome(database, "SELECT 1 \x00, 2") == "not_sql"
    assert outcome(database, "SELECT '\ud800'") == "not_sql"


def test_values_that_python_cannot_hold_come_as_the_server_writes_them(database, kind):
    if kind == "postgres":
        sql = (
            "SELECT 'infinity'::date, ARRAY['-infinity'::timestamp], '12345-01-01'::date, interval '1 mon', "
            "daterange('-infinity', '2020-01-01'), 'NaN'::numeric::text, time '24:00', 12345678901234567890::numeric, "
            '\'{"b": 1, "a": 2}\'::json, true, ARRAY[1, 2], 1e400::numeric'
        )
        assert outcome(database, sql) == [
            (
                *("infinity", "{-infinity}", "12345-01-01", "1 mon", "[-infinity,2020-01-01)", "NaN", "24:00:00"),
                *(12345678901234567890, '{"a": 2, "b": 1}', 1, "{1,2}", float("inf")),
            )
        ]
    else:
        sql = (
            "SELECT maketime(26, 3, 4), cast('0000-00-00' AS date), timestamp('2020-01-01 00:00:00'), "
            "cast(12345678901234567890 AS decimal(30, 2)), cast(1 AS decimal(8, 2)), true"
        )
        assert outcome(database, sql) == [
            ("26:03:04", "0000-00-00", "2020-01-01 00:00:00", 12345678901234567890, 1.0, 1)
        ]


@only("mysql")
def test_bits_are_numbers(kind, url):
    name = make_url(url).database
    administer(kind, ("CREATE TABLE flag (b bit(1), c bit(12))", "INSERT INTO flag VALUES (b'1', b'100000001')"), name)
    database = ServerDatabase(url, LIMITS)
    assert outcome(database, "SELECT b, c, b + 0, c + 0 FROM flag") == [(1, 257, 1, 257)]
    database.close()


@only("postgres")
def test_no_statement_ends_a_session(database, kind):
    for ending in ("pg_terminate_backend(pg_backend_pid())", "pg_cancel_backend(1)"):
        assert outcome(database, f"SELECT {ending}") == "blocked"


def test_a_statement_whose_session_was_ended_from_outside_is_run_again(database, kind, url):
    name = make_url(url).database
    started = threading.Event()

    def end():
        started.wait()
        time.sleep(0.7)
        if kind == "postgres":
            administer(kind, (f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'",))
        else:
            for (number,) in administer(kind, (f"SELECT id FROM information_schema.processlist WHERE db = '{name}'",)):
                administer(kind, (f"KILL {number}",))

    thread = threading.Thread(target=end)
    thread.start()
    started.set()
    sleeping = "SELECT 7 FROM pg_sleep(1.2)" if kind == "postgres" else "SELECT 7 + sleep(1.2)"
    assert outcome(database, sleeping, 5) == [(7,)]
    thread.join()


@only("postgres")
def test_a_value_that_nobody_gives_is_an_error_like_any_other(database, kind):
    assert outcome(database, "SELECT id FROM book WHERE id = $1") == "other_error"


@only("postgres")
def test_a_statement_cannot_lift_its_time_limit(database, kind, url):
    lifting = "CASE WHEN g = 300 THEN pg_sleep(6)::text ELSE set_config('statement_timeout', '0', true) END"
    start = time.monotonic()
    assert outcome(database, f"SELECT g, {lifting} FROM generate_series(1, 400) g", 1.0) == "timeout"
    assert time.monotonic() - start < 4


@only("postgres")
def test_a_server_that_is_full_is_out_of_reach_and_not_without_the_database(kind, url):
    name = make_url(url).database
    administer(kind, (f"ALTER DATABASE {name} CONNECTION LIMIT 0",))
    try:
        with pytest.raises(Failed) as caught:
            ServerDatabase(url, LIMITS)
    finally:
        administer(kind, (f"ALTER DATABASE {name} CONNECTION LIMIT -1",))
    assert caught.value.verdict == "unreachable"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://me:p@ss/word@127.0.0.1/db", "an @ too many"),
        ("mysql://me:s3cr@t@127.0.0.1/db", "an @ too many"),
        ("mysql://me@127.0.0.1/db?sql_mode=ANSI_QUOTES", "sql_mode in the URL"),
        ("mysql://me@127.0.0.1/db?init_command=SELECT+1", "init_command in the URL"),
    ],
)
def test_a_url_that_means_something_else_than_it_seems_is_refused(url, message):
    with pytest.raises(Failed, match=message) as caught:
        ServerDatabase(url, LIMITS)
    assert caught.value.verdict == "unreachable"
    assert not {"ss", "word", "s3cr"} & set(re.findall(r"\w+", caught.value.message))


def test_a_session_that_others_ended_is_replaced(database, kind, url):
    assert outcome(database, "SELECT 1") == [(1,)]
    name = make_url(url).database
    if kind == "postgres":
        administer(kind, (f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'",))
    else:
        for (number,) in administer(kind, (f"SELECT id FROM information_schema.processlist WHERE db = '{name}'",)):
            administer(kind, (f"KILL {number}",))
    assert outcome(database, "SELECT 1") == [(1,)]


def test_nothing_is_left_of_a_session(database, kind):
    for _ in range(8):
        if kind == "postgres":
            outcome(
                database, "SELECT set_config('search_path', 'nope', false), set_config('timezone', 'Asia/Tokyo', false)"
            )
            outcome(database, "SELECT pg_advisory_lock(7), setseed(0.5)")
            assert outcome(database, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == [(0,)]
            assert outcome(database, "SELECT count(*) FROM book WHERE current_setting('timezone') = 'Asia/Tokyo'") == [
                (0,)
            ]
        else:
            outcome(database, "SELECT @x := 5, get_lock('t2s', 1), last_insert_id(7)")
            assert outcome(database, "SELECT @x, is_free_lock('t2s'), last_insert_id()") == [(None, 1, 0)]
            assert outcome(database, "SELECT title FROM book WHERE title = 'Zürich'") == [("Zürich",)]


def test_a_connection_error_shows_no_password_and_what_is_kept_no_host(url):
    address = make_url(url)
    for wrong, verdict in (
        (address.set(database="not_there"), "no_database"),
        (address.set(port=1), "unreachable"),
        (address.set(username="nobody_here", password="pa55 w@rd"), "unreachable"),
        (address.set(host="pa55.invalid"), "unreachable"),
    ):
        with pytest.raises(Failed) as caught:
            ServerDatabase(wrong.render_as_string(hide_password=False), LIMITS)
        assert caught.value.verdict == verdict
        message = caught.value.message
        assert not [text for text in (PASSWORD, "pa55 w@rd") if text in message], message
        assert verdict == "unreachable" or address.host not in message  # of these alone details become columns


@pytest.mark.parametrize("bad", ["mysql://u:wr0ng@h:ab/x", "nonsense wr0ng", "foo://u:wr0ng@h/x", "sqlite:///wr0ng"])
def test_a_url_that_is_none_is_not_repeated(bad):
    with pytest.raises(Failed) as caught:
        ServerDatabase(bad, LIMITS)
    assert caught.value.verdict == "unreachable"
    assert "wr0ng" not in caught.value.message


def test_a_driver_that_is_not_here_is_replaced_by_ours(url):
    for other in ("postgresql+psycopg2", "postgresql+asyncpg", "mysql+mysqldb"):
        if other.partition("+")[0] == make_url(url).drivername:
            address = make_url(url).set(drivername=other).render_as_string(hide_password=False)
            assert outcome(ServerDatabase(address, LIMITS), "SELECT 1") == [(1,)]


@pytest.mark.slow
@only("postgres")
def test_a_gigabyte_in_one_value_ends_no_other_statement(url, kind):
    """In a process with the worker's limit on memory."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "from t2s_pref.servers import ServerDatabase; from t2s_pref.judge import Limits, Failed\n"
        f"d = ServerDatabase({url!r}, Limits(1000, 1 << 20))\n"
        "wide = \"SELECT repeat('x', 8000000) FROM generate_series(1, 1000)\"\n"
        "for sql in (\"SELECT repeat('x', 900000000)\", 'SELECT 1', wide, 'SELECT 1'):\n"
        "    try: print(d.run(sql, 20).rows)\n"
        "    except Failed as f: print(f.verdict, f.message)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ)
    lines = run.stdout.splitlines()
    assert lines[0].startswith("resource"), run.stdout + run.stderr
    assert lines[1] == lines[3] == "[(1,)]"
    assert lines[2].startswith("resource"), run.stdout


def test_little_memory_is_held(database, kind):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sql = "SELECT generate_series(1, 1000000000)" if kind == "postgres" else "SELECT * FROM seq_1_to_1000000000"
    outcome(database, sql, 20)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB

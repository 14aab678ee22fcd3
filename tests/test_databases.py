"""Where databases are looked for, what identifies them, and that looking leaves no trace."""

import ctypes
import hashlib
import json
import logging
import os
import shutil
import sqlite3
import struct
import subprocess
import sys
import tempfile
from contextlib import closing, suppress
from pathlib import Path

import pytest
from datasets import Dataset

from t2s_pref import UserError, verify_rejected
from t2s_pref.databases import Databases
from t2s_pref.pool import Bounds
from t2s_pref.verifier import Question, Verifier

REPOSITORY = Path(__file__).parent.parent
PASSWORD = "s3cret"


def make(path, rows=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE t (a)")
        connection.executemany("INSERT INTO t VALUES (?)", [(number,) for number in range(rows)])
        connection.commit()
    return path


def found(given, *db_ids, **kwargs):
    with Databases(given, db_ids, **kwargs) as databases:
        return [[Path(each.address).name for each in databases[db_id]] for db_id in db_ids]


def count(databases, cache_dir, **columns):
    rows = Dataset.from_dict({"output": ["SELECT 1"], "rejected": [["SELECT count(*) FROM t"]], **columns})
    return verify_rejected(rows, databases, cache_dir=cache_dir)["verdict"][0][0]


def without_roots_powers():
    """Give up writing to what is read-only, for the process that is started: CAP_DAC_OVERRIDE and its like."""
    libc = ctypes.CDLL(None)
    for power in (1, 2):
        libc.prctl(24, power, 0, 0, 0)  # PR_CAPBSET_DROP


def test_each_layout_is_understood(tmp_path):
    make(tmp_path / "spider" / "car" / "car.sqlite")
    make(tmp_path / "spider" / "car" / "a_second.db")
    make(tmp_path / "spider" / "pet" / "other.sqlite3")
    make(tmp_path / "flat" / "car.db")
    (tmp_path / "spider" / "car" / "schema.sql").write_text("")
    (tmp_path / "spider" / "car" / "database_description").mkdir()
    assert found(tmp_path / "spider", "car", "pet") == [["car.sqlite", "a_second.db"], ["other.sqlite3"]]
    assert found(str(tmp_path / "flat"), "car") == [["car.db"]]
    one = tmp_path / "flat" / "car.db"
    assert found(one, None, "car", "anything") == [["car.db"]] * 3
    mapping = {"car": one, "pet": [str(one), tmp_path / "spider" / "pet" / "other.sqlite3"]}
    assert found(mapping, "car", "pet", "cow") == [["car.db"], ["car.db", "other.sqlite3"], []]


@pytest.mark.parametrize("name", ["a b", "q?x#y%20", "Ünïcode", "it's", "a.b", "-rf"])
def test_odd_names_are_names(name, tmp_path, cache_dir):
    make(tmp_path / name / f"{name}.sqlite")
    assert count(tmp_path, cache_dir, db_id=[name]) == "equivalent"
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == [f"{name}.sqlite"]


@pytest.mark.parametrize("name", ["../secret", "..", ".", "/etc", "a/../../secret", "a\\b", "", None, "x\0y"])
def test_a_name_from_the_data_never_leads_out_of_the_folder(name, tmp_path):
    make(tmp_path / "secret" / "secret.sqlite")
    make(tmp_path / "in" / "here" / "here.sqlite")
    assert found(tmp_path / "in", "here", name) == [["here.sqlite"], []]


@pytest.mark.parametrize(
    ("given", "db_id", "message"),
    [
        ("{here}/nothing", "a", "is neither a file nor a folder"),
        ("{here}", "nope", "No database for 'nope' in"),
        ("{here}", None, "have no column 'db_id'"),
        ({"a": "x"}, "nope", "the mapping has \\['a'\\]"),
        ("oracle://u:pw@h/d", "a", "'oracle' is not a server known here"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(given, db_id, message, tmp_path):
    given = given if isinstance(given, dict) else given.replace("{here}", str(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        Databases(given, [db_id])
    assert "\n" not in str(caught.value)
    assert "pw" not in str(caught.value)


def test_a_file_that_is_no_database_is_refused_alone_and_unverified_among_others(tmp_path, cache_dir):
    text, path = tmp_path / "in" / "text.sqlite", make(tmp_path / "in" / "x.sqlite")
    text.write_text("not a database at all, but long enough to be looked at" * 9)
    with pytest.raises(UserError, match=r"text\.sqlite' is no SQLite database; databases are"):
        count(text, cache_dir)
    path.write_bytes(path.read_bytes()[:16] + b"broken" * 999)
    rows = Dataset.from_dict(
        {"db_id": ["x", "text"], "output": ["SELECT 1"] * 2, "rejected": [["SELECT 2", "SELECT a FROM t"]] * 2}
    )
    found = verify_rejected(rows, tmp_path / "in", cache_dir=cache_dir)
    assert found["verdict"][:] == [["unverified"] * 2] * 2
    assert found["gold_verdict"][:] == ["no_database"] * 2


def test_a_folder_too_high_or_another_spelling_is_answered_with_what_is_there(tmp_path):
    make(tmp_path / "spider" / "database" / "car" / "car.sqlite")
    with pytest.raises(
        UserError, match=r"in '.*spider'; expected car/car\.sqlite in it, and found that in '.*database'"
    ):
        Databases(tmp_path / "spider", ["car"])
    with pytest.raises(UserError, match=r"expected Car/Car\.sqlite in it, and found \['car'\]\."):
        Databases(tmp_path / "spider" / "database", ["Car"])


def test_the_folders_and_urls_of_a_mapping_are_those_of_their_database(tmp_path):
    for name in ("car.sqlite", "another.db"):
        make(tmp_path / "cars" / name)
    assert found({"car": tmp_path / "cars"}, "car") == [["car.sqlite", "another.db"]]
    with Databases({"car": "postgresql://h/{db_id}"}, ["car"]) as databases:
        assert databases["car"][0].address == "postgresql://h/car"


@pytest.mark.parametrize("given", [None, 7, b"x", {"a": 7}, {"a": [None]}, "sqlite:///x.db", {"a": "sqlite:///x.db"}])
def test_what_is_no_place_is_refused_with_what_is(given):
    with pytest.raises(UserError, match="databases are a folder of <db_id>/<db_id>.sqlite, a SQLite file") as refused:
        Databases(given, ["a"])
    assert "\n" not in str(refused.value)


def test_a_folder_that_may_not_be_read_is_said_in_one_line(tmp_path):
    make(tmp_path / "in" / "car" / "car.sqlite")
    code = (
        "from t2s_pref import UserError, audit_golds; from datasets import Dataset; import sys\n"
        "try: audit_golds(Dataset.from_dict({'db_id': ['car'], 'output': ['SELECT 1']}), sys.argv[1])\n"
        "except UserError as error: print(error)"
    )
    (tmp_path / "in" / "car").chmod(0o000)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "in")],
            capture_output=True,
            text=True,
            check=True,
            cwd=REPOSITORY,
            preexec_fn=without_roots_powers,
        )
    finally:
        (tmp_path / "in" / "car").chmod(0o700)
    assert done.stdout.startswith("The databases cannot be read: PermissionError")


def test_the_content_counts_and_not_the_place(tmp_path):
    first, other, more = (make(tmp_path / name / "x.sqlite", rows) for name, rows in (("a", 1), ("b", 1), ("c", 2)))
    other.write_bytes(first.read_bytes())
    contents = []
    for path in (first, other, more):
        with Databases(path, ["x"], memo=tmp_path / "memo.json") as databases:
            contents.append(databases.contents)
    assert contents[0] == contents[1] != contents[2]
    assert "xxh3" not in (tmp_path / "memo.json").read_text()  # paths, sizes and hashes only
    with closing(sqlite3.connect(first)) as connection:
        connection.execute("INSERT INTO t VALUES (7)")
        connection.commit()
    with Databases(first, ["x"], memo=tmp_path / "memo.json") as databases:
        assert databases.contents not in contents


def state(folder):
    return {
        str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_nothing_is_written_to_a_database_or_beside_it(tmp_path, cache_dir):
    folder = tmp_path / "databases"
    path = make(folder / "car" / "car.sqlite")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    before = state(folder)
    os.chmod(path.parent, 0o500)
    assert count(folder, cache_dir, db_id=["car"]) == "equivalent"
    os.chmod(path.parent, 0o700)
    assert state(folder) == before


def test_rows_that_are_still_in_a_live_log_are_seen_and_the_log_is_left_alone(tmp_path, cache_dir):
    folder = tmp_path / "databases"
    folder.mkdir()
    writer = sqlite3.connect(folder / "live.sqlite")
    writer.execute("PRAGMA journal_mode=WAL")
    writer.execute("CREATE TABLE t (a)")
    writer.execute("INSERT INTO t VALUES (1)")
    writer.commit()
    assert (folder / "live.sqlite-wal").stat().st_size
    before = state(folder)
    assert count(folder / "live.sqlite", cache_dir) == "equivalent"
    assert state(folder) == before
    writer.execute("INSERT INTO t VALUES (2)")
    writer.commit()
    assert count(folder / "live.sqlite", cache_dir) == "wrong_result"
    writer.close()


def test_half_a_transaction_that_a_crash_left_is_not_seen(tmp_path, cache_dir):
    path = make(tmp_path / "x.sqlite")
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("PRAGMA cache_size=1")
    writer.execute("BEGIN")
    writer.executemany("INSERT INTO t VALUES (?)", [("x" * 500,)] * 500)
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    for name in ("x.sqlite", "x.sqlite-journal"):
        shutil.copy(tmp_path / name, crashed / name)
    writer.execute("ROLLBACK")
    writer.close()
    before = state(crashed)
    assert count(crashed / "x.sqlite", cache_dir) == "equivalent"
    assert state(crashed) == before


def test_a_journal_that_names_another_file_is_not_played_back(tmp_path):
    path, victim = make(tmp_path / "x.sqlite"), tmp_path / "victim.txt"
    victim.write_text("mine")
    name = str(victim).encode()
    trailer = struct.pack(">I", 0x40000000 // 1024 + 1) + name + struct.pack(">II", len(name), sum(name))
    header = bytes.fromhex("d9d505f920a163d7") + struct.pack(">IIIII", 0, 1, 2, 512, 1024)
    journal = tmp_path / "x.sqlite-journal"
    journal.write_bytes(header.ljust(512, b"\0") + trailer + bytes.fromhex("d9d505f920a163d7"))
    before = state(tmp_path)
    with pytest.raises(UserError, match="is of several databases at once"):
        Databases(path, [None])
    assert state(tmp_path) == before


@pytest.mark.parametrize("change", ["other data", "emptied", "cut", "garbage"])
def test_verdicts_on_a_file_that_changes_during_a_run_are_not_kept(tmp_path, change):
    path, question = make(tmp_path / "x.sqlite", 3), Question(None, "sqlite", ("SELECT count(*) FROM t",))
    content = path.read_bytes()
    with Databases(path, [None]) as databases, Verifier(databases, Bounds(), 1, tmp_path / "verdicts") as verifier:
        changed = make(tmp_path / "other.sqlite", 5).read_bytes()
        path.write_bytes({"other data": changed, "emptied": b"", "cut": content[:4096]}.get(change, b"?" * 9999))
        with pytest.raises(UserError, match="has changed since the run began"):
            verifier.judge([(question, ["SELECT 3"])])
    path.write_bytes(content)
    with Databases(path, [None]) as databases, Verifier(databases, Bounds(), 1, tmp_path / "verdicts") as verifier:
        verifier.judge([(question, ["SELECT 3"])])
        assert verifier.candidate(question, "SELECT 3").verdict == "equivalent"


def test_a_url_with_one_slash_is_not_repeated():
    with pytest.raises(UserError) as refused:
        Databases("postgresql:/me:s3cret@h/d", [None])
    assert "s3cret" not in str(refused.value)


def test_a_servers_content_has_a_name_only_if_the_user_gives_one(caplog):
    caplog.set_level(logging.DEBUG)
    options = "passwd=s3cret&ssl_key_password=s3cret"
    urls = [
        "postgresql://me:s3cret@h:5432/{db_id}",
        "mysql://me@h/{db_id}?password=s3cret",
        f"mysql://h/{{db_id}}?{options}",
    ]
    for url in urls:
        with Databases(url, ["a b/c"]) as databases:
            assert databases.contents is None
            (instance,) = databases["a b/c"]
            assert "a%20b%2Fc" in instance.address
        with (
            Databases(url, ["x"], version="1") as one,
            Databases(url.replace("s3cret", "new"), ["x"], version="1") as two,
        ):
            assert one.contents == two.contents is not None
        with Databases(url, ["x"], version="2") as three:
            assert three.contents != one.contents
    assert "s3cret" not in caplog.text


def test_a_version_is_for_servers_only(tmp_path):
    with pytest.raises(UserError, match="database_version is for servers"):
        Databases(make(tmp_path / "x.sqlite"), ["x"], version="1")


# -- names and places ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x" * 300, "é" * 200, "a\nb", "*", "~", "CON"])
def test_a_name_that_no_folder_can_have_is_no_database_and_no_error(name, tmp_path, cache_dir):
    make(tmp_path / "in" / "here" / "here.sqlite")
    rows = Dataset.from_dict({"db_id": ["here", name], "output": ["SELECT 1"] * 2, "rejected": [["SELECT 2"]] * 2})
    found = verify_rejected(rows, tmp_path / "in", cache_dir=cache_dir)
    assert found["gold_verdict"][:] == ["ok", "no_database"]
    assert found["verdict"][:] == [["wrong_result"], ["unverified"]]


def test_names_that_are_no_strings_are_told_in_one_clear_line(tmp_path, cache_dir):
    make(tmp_path / "in" / "1" / "1.sqlite")
    rows = Dataset.from_dict({"db_id": [1], "output": ["SELECT 1"], "rejected": [["SELECT 2"]]})
    with pytest.raises(UserError, match="db_id") as caught:
        verify_rejected(rows, tmp_path / "in", cache_dir=cache_dir)
    assert "\n" not in str(caught.value)


def test_a_relative_folder_is_the_one_of_the_caller(tmp_path, cache_dir, monkeypatch):
    make(tmp_path / "in" / "car" / "car.sqlite")
    monkeypatch.chdir(tmp_path)
    assert count("in", cache_dir, db_id=["car"]) == "equivalent"
    assert count(Path("in") / "car" / "car.sqlite", cache_dir) == "equivalent"


def test_a_link_to_a_database_is_followed(tmp_path, cache_dir):
    make(tmp_path / "elsewhere" / "car.sqlite")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "car.sqlite").symlink_to(tmp_path / "elsewhere" / "car.sqlite")
    assert count(tmp_path / "in", cache_dir, db_id=["car"]) == "equivalent"


def test_one_file_serves_rows_with_and_without_a_db_id(tmp_path, cache_dir):
    path = make(tmp_path / "no suffix at all")
    assert count(path, cache_dir) == "equivalent"
    assert count(path, cache_dir, db_id=["whatever"]) == "equivalent"
    assert count(str(path), cache_dir, db_id=[None]) == "equivalent"


def test_a_further_file_that_is_no_database_is_left_out(tmp_path, cache_dir):
    make(tmp_path / "car" / "car.sqlite")
    (tmp_path / "car" / "._car.sqlite").write_bytes(b"what a Mac leaves in an archive" * 99)
    assert count(tmp_path, cache_dir, db_id=["car"]) == "equivalent"


def test_the_instances_of_a_mapping_come_in_its_order(tmp_path, cache_dir):
    one, two = (make(tmp_path / f"{number}.sqlite", number) for number in (1, 2))
    assert found({"car": [two, one]}, "car") == [["2.sqlite", "1.sqlite"]]
    assert count({"car": [one, two]}, cache_dir, db_id=["car"]) == "wrong_result"
    assert count({"car": [str(one)]}, cache_dir, db_id=["car"]) == "equivalent"


def test_a_file_of_a_mapping_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.sqlite' is neither a file nor a folder"):
        Databases({"car": tmp_path / "gone.sqlite"}, ["car"])


def test_the_verdicts_on_a_file_do_not_depend_on_other_rows_being_on_a_server(tmp_path, cache_dir):
    # reversing unordered rows does not show this one, and what does is written in SQLite's dialect
    path = make(tmp_path / "x.sqlite")
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "CREATE TABLE s (name TEXT, age INTEGER); CREATE INDEX by_age ON s (age);"
            "INSERT INTO s VALUES ('Ana', 30), ('Bo', 40), ('Cy', 40);"
        )
    gold = "SELECT name, count(*) FROM s GROUP BY age"

    def judged(databases, *db_ids):
        columns = {"output": [gold] * len(db_ids), "rejected": [["SELECT 'Cy', 2"]] * len(db_ids)}
        rows = Dataset.from_dict({"db_id": list(db_ids), **columns})
        return verify_rejected(rows, databases, cache_dir=cache_dir)[0]["gold_verdict"]

    assert judged({"x": path}, "x") == "gold_nondeterministic"
    mixed = {"x": path, "y": "postgresql+psycopg://me@127.0.0.1:1/y"}
    with suppress(UserError):  # to refuse the mixture is as good
        assert judged(mixed, "x", "y") == "gold_nondeterministic"


# -- what is read, and what is left behind ---------------------------------------------------------------------------

VERIFY = """
import sys
from pathlib import Path
from datasets import Dataset
from t2s_pref import verify_rejected
try:
    (Path(sys.argv[1]).parent / "new").touch()
    sys.exit("the folder can be written to")
except PermissionError:
    pass
rows = Dataset.from_dict({"output": ["SELECT 2"], "rejected": [["SELECT count(*) FROM t"]]})
print(verify_rejected(rows, sys.argv[1], cache_dir=sys.argv[2])["verdict"][:])
"""


@pytest.mark.parametrize("live", [False, True], ids=["plain", "live log"])
@pytest.mark.parametrize("mode", [0o644, 0o444], ids=["writable", "read-only"])
def test_databases_in_a_folder_that_nobody_may_write_to_are_read(tmp_path, live, mode):
    folder = tmp_path / "databases"
    folder.mkdir()
    writer = sqlite3.connect(folder / "x.sqlite")
    if live:
        writer.execute("PRAGMA journal_mode=WAL")
    writer.execute("CREATE TABLE t (a)")
    writer.execute("INSERT INTO t VALUES (1), (2)")
    writer.commit()
    if not live:
        writer.close()
    before = state(folder)
    for file in folder.iterdir():
        file.chmod(mode)
    folder.chmod(0o500)
    try:
        done = subprocess.run(
            [sys.executable, "-c", VERIFY, str(folder / "x.sqlite"), str(tmp_path / "cache")],
            capture_output=True,
            text=True,
            check=False,
            cwd=REPOSITORY,
            preexec_fn=without_roots_powers,
        )
    finally:
        folder.chmod(0o700)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[['equivalent']]"
    assert state(folder) == before
    writer.close()


def test_what_a_live_log_holds_has_one_key_and_its_copy_is_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    writer = sqlite3.connect(tmp_path / "live.sqlite")
    writer.execute("PRAGMA journal_mode=WAL")
    contents = []
    for _ in range(2):
        writer.execute("CREATE TABLE IF NOT EXISTS t (a)")
        writer.commit()
        with Databases(tmp_path / "live.sqlite", [None], memo=tmp_path / "memo.json") as databases:
            assert list((tmp_path / "temporary").iterdir())
            contents.append(databases.contents)
        assert not list((tmp_path / "temporary").iterdir())
    assert contents[0] == contents[1]
    writer.execute("INSERT INTO t VALUES (1)")
    writer.commit()
    with Databases(tmp_path / "live.sqlite", [None], memo=tmp_path / "memo.json") as databases:
        assert databases.contents != contents[0]
    writer.close()


def test_the_hashes_that_are_remembered_are_of_files_that_stay(tmp_path):
    path = make(tmp_path / "x.sqlite")
    with closing(sqlite3.connect(path)) as writer:
        writer.execute("PRAGMA journal_mode=WAL")
        writer.execute("INSERT INTO t VALUES (1)")
        writer.commit()
        with Databases(path, [None], memo=tmp_path / "memo.json"):
            pass
    remembered = json.loads((tmp_path / "memo.json").read_text()) if (tmp_path / "memo.json").exists() else {}
    assert not [key for key in remembered if "t2s_pref-databases" in key]


def test_a_file_that_has_not_changed_is_not_read_again(tmp_path):
    path, memo = make(tmp_path / "x.sqlite"), tmp_path / "memo.json"
    with Databases(path, [None], memo=memo) as databases:
        (known,) = databases.contents["None"]
    assert known in memo.read_text()
    memo.write_text(memo.read_text().replace(known, "remembered"))
    with Databases(path, [None], memo=memo) as databases:
        assert databases.contents == {"None": ["remembered"]}
    memo.write_text("{damaged")
    with Databases(path, [None], memo=memo) as databases:
        assert databases.contents == {"None": [known]}


def test_a_file_that_is_gone_ends_the_run_and_leaves_no_verdict_behind(tmp_path):
    path, question = make(tmp_path / "x.sqlite"), Question(None, "sqlite", ("SELECT 1",))
    content = path.read_bytes()

    def judged(act):
        with Databases(path, [None]) as databases:
            act()
            with Verifier(databases, Bounds(), 1, tmp_path / "verdicts") as verifier:
                verifier.judge([(question, ["SELECT 2"])])
                return verifier.gold(question).verdict, verifier.candidate(question, "SELECT 2").verdict

    with pytest.raises(UserError, match=r"cannot be reached: .*x\.sqlite: unable to open"):
        judged(path.unlink)
    path.write_bytes(content)
    assert judged(lambda: None) == ("ok", "wrong_result")


# -- servers ---------------------------------------------------------------------------------------------------------

URLS = [
    f"postgresql://me:{PASSWORD}@127.0.0.1:1/{{db_id}}",
    f"postgresql+psycopg://127.0.0.1:1/{{db_id}}?user=me&password={PASSWORD}",
    f"mysql+pymysql://me:{PASSWORD}?{PASSWORD}@127.0.0.1:1/{{db_id}}",
    f"mysql+pymysql://me:{PASSWORD}%40x@127.0.0.1:1/{{db_id}}?charset=utf8mb4",
]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("db_id", [None, "", "x"])
@pytest.mark.parametrize("mapped", [False, True])
def test_no_refusal_shows_a_password(url, db_id, mapped):
    given = {"other": url} if mapped else url
    try:
        with Databases(given, [db_id], version="1") as databases:
            told = str(databases.contents)
    except UserError as error:
        told = str(error)
    assert PASSWORD not in told
    with pytest.raises(UserError) as refused:
        Databases(url.replace("postgresql", "oracle").replace("mysql", "oracle"), ["x"])
    assert PASSWORD not in str(refused.value)


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("version", [None, "1"])
def test_a_password_is_nowhere_in_what_is_kept_or_said(url, version, cache_dir, caplog):
    pytest.importorskip("sqlalchemy")
    caplog.set_level(logging.DEBUG)
    rows = Dataset.from_dict({"db_id": ["shop"], "output": ["SELECT 1"], "rejected": [["SELECT 2"]]})
    with pytest.raises(UserError, match="cannot be reached") as refused:
        verify_rejected(rows, url, cache_dir=cache_dir, database_version=version)
    for path in cache_dir.rglob("*"):
        assert PASSWORD not in str(path)
        assert not path.is_file() or PASSWORD.encode() not in path.read_bytes()
    assert PASSWORD not in caplog.text + str(refused.value)


def test_a_server_that_could_not_be_reached_is_asked_again(cache_dir):
    pytest.importorskip("psycopg")
    # nobody listens on port 1 today; somebody may tomorrow
    rows = Dataset.from_dict({"output": ["SELECT 1"], "rejected": [["SELECT 2"]]})
    url = "postgresql+psycopg://me@127.0.0.1:1/x"
    with pytest.raises(UserError, match="cannot be reached"):
        verify_rejected(rows, url, cache_dir=cache_dir, database_version="1")
    assert not [path for path in cache_dir.rglob("*") if path.suffix in (".log", ".arrow") and path.stat().st_size]


def test_servers_that_only_an_option_tells_apart_have_contents_of_their_own():
    def contents(url):
        with Databases(url, ["x"], version="1") as databases:
            return databases.contents

    given = "postgresql:///{db_id}?host=one&options=-csearch_path%3Da"
    others = [given.replace("one", "two"), given.replace("3Da", "3Db"), given.replace("///", "//h/")]
    assert len({str(contents(url)) for url in (given, *others)}) == 4
    assert contents(given + "&password=a") == contents(given + "&password=b") == contents(given)


def test_a_name_is_quoted_before_it_becomes_part_of_a_url():
    for name in ("a/b", "x@evil:1", "x?host=evil", "x#y", "100%", "é", "a b"):
        with Databases("postgresql://me@h/{db_id}", [name]) as databases:
            ((address, _, server),) = databases[name]
        assert server
        tail = address.removeprefix("postgresql://me@h/")
        assert tail != address
        assert not set(tail) & set("/@?#: ")

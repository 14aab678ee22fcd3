"""The store keeps every record that `append` returned for, and never gives a wrong one."""

import contextlib
import json
import logging
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t2s_pref.store import SampleStore, record_key


def make_records(count: int, start: int = 0) -> dict[bytes, dict]:
    return {record_key("row", number): {"text": f"SELECT {number}", "tokens": number} for number in range(start, count)}


def only_segment(folder: Path) -> Path:
    (segment,) = folder.glob("segment-*.log")
    return segment


def contents(folder: Path, keys) -> dict[bytes, dict]:
    with SampleStore(folder) as store:
        return {key: record for key in keys if (record := store.get(key)) is not None}


def start_python(code: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)


# -- what a store is


def test_what_was_appended_is_read_by_the_next_process(tmp_path):
    records = make_records(20)
    with SampleStore(tmp_path / "not" / "there" / "yet") as store:
        store.append(records.items())
        assert len(store) == 20
        assert record_key("row", 3) in store
        assert store.get(record_key("row", 3)) == {"text": "SELECT 3", "tokens": 3}
        assert store.get(record_key("row", 99)) is None
    assert contents(store.folder, records) == records


def test_an_empty_folder_and_an_empty_batch_write_nothing(tmp_path):
    with SampleStore(tmp_path / "store") as store:
        store.append([])
        store.refresh()
        assert len(store) == 0
    assert not (tmp_path / "store").exists()


def test_each_opened_store_writes_a_segment_of_its_own(tmp_path):
    for number in range(3):
        with SampleStore(tmp_path) as store:
            store.append([(record_key(number), {"number": number})])
            store.append([(record_key(number, "more"), {"number": number})])
    assert len(list(tmp_path.glob("segment-*.log"))) == 3
    with SampleStore(tmp_path) as store:
        assert len(store) == 6


def test_the_first_record_of_a_key_wins(tmp_path):
    key = record_key("row")
    with SampleStore(tmp_path) as store:
        store.append([(key, {"turn": 1}), (key, {"turn": 2})])
        store.append([(key, {"turn": 3})])
        assert store.get(key) == {"turn": 1}
    assert len(only_segment(tmp_path).read_bytes().splitlines()) == 1


def test_duplicates_of_concurrent_writers_resolve_the_same_way_for_everyone(tmp_path):
    key = record_key("row")
    first, second = SampleStore(tmp_path), SampleStore(tmp_path)
    first.append([(record_key("other"), {})])  # the first's segment is the older one ...
    second.append([(key, {"by": "second"})])  # ... though the second writes this key before it
    first.append([(key, {"by": "first"})])
    assert second.get(key) == {"by": "second"}
    for store in (first, second):
        store.refresh()
        assert store.get(key) == {"by": "first"}
        store.close()
    assert contents(tmp_path, [key]) == {key: {"by": "first"}}


def test_refresh_reads_what_others_wrote_since(tmp_path):
    with SampleStore(tmp_path) as reader, SampleStore(tmp_path) as writer:
        for number in range(5):
            writer.append([(record_key(number), {"number": number})])
            assert record_key(number) not in reader
            reader.refresh()
            assert reader.get(record_key(number)) == {"number": number}


def test_files_that_are_not_segments_are_ignored(tmp_path):
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "segment-notes.log").write_text("garbage\n")
    (tmp_path / ".segment-00000000000000000001-h-1-00000000.log.swp").write_bytes(b"garbage\n")
    with SampleStore(tmp_path) as store:
        assert (len(store), store.dropped) == (0, 0)


def test_more_segments_than_files_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr("t2s_pref.store._OPEN_SEGMENTS", 3)
    records = make_records(10)
    for key, record in records.items():
        with SampleStore(tmp_path) as store:
            store.append([(key, record)])
    with SampleStore(tmp_path) as store:
        for _ in range(2):
            assert {key: store.get(key) for key in records} == records
        assert len(store._files) == 3


def test_a_closed_store_can_be_used_again(tmp_path):
    store = SampleStore(tmp_path)
    for number in range(2):
        store.append([(record_key(number), {"number": number})])
        store.close()
        assert store.get(record_key(number)) == {"number": number}
    store.close()
    assert len(list(tmp_path.glob("segment-*.log"))) == 2


@pytest.mark.parametrize(
    ("key", "record"),
    [
        (b"short", {}),
        ("x" * 16, {}),
        (record_key(1), ["list"]),
        (record_key(1), None),
        (record_key(1), {"x": object()}),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path, key, record):
    with SampleStore(tmp_path) as store, pytest.raises((TypeError, ValueError)):
        store.append([(record_key(0), {"fine": 1}), (key, record)])
    assert not list(tmp_path.iterdir())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.lists(st.tuples(st.integers(0, 9), st.dictionaries(st.text(), JSON)))),
            st.sampled_from([("reopen", None), ("refresh", None), ("other", None), ("pickle", None)]),
        ),
        max_size=12,
    )
)
@settings(max_examples=40, deadline=None)
def test_a_store_is_a_dict_in_which_the_first_write_wins(steps):
    with tempfile.TemporaryDirectory() as folder:
        model: dict[bytes, dict] = {}
        stores = [SampleStore(folder), SampleStore(folder)]
        for step, batch in steps:
            if step == "append":
                stores[0].refresh()
                stores[0].append([(record_key(number), record) for number, record in batch])
                for number, record in batch:
                    model.setdefault(record_key(number), record)
            elif step == "reopen":
                stores[0].close()
                stores[0] = SampleStore(folder)
            elif step == "pickle":
                stores[0].close()
                stores[0] = pickle.loads(pickle.dumps(stores[0]))
            elif step == "other":
                stores.reverse()
                stores[0].refresh()
            else:
                stores[0].refresh()
            assert len(stores[0]) == len(model)
            assert {key: stores[0].get(key) for key in model} == model
        for store in stores:
            store.close()
        assert contents(Path(folder), model) == model


def test_lone_surrogates_and_line_breaks_of_a_models_text_come_back(tmp_path):
    key, record = record_key("odd"), {"text": "a\nb\r\u2028\x00\udc80 \ud83d é 😀", "nan": [1e308, -0.0]}
    with SampleStore(tmp_path) as store:
        store.append([(key, record)])
    assert contents(tmp_path, [key]) == {key: record}


# -- keys

PART = st.text(st.characters(), max_size=3) | st.binary(max_size=3) | st.integers() | st.booleans() | st.none()
PARTS = st.lists(PART)


def kinds(parts) -> list:
    return [(type(part), part) for part in parts]


@given(PARTS, PARTS)
def test_keys_are_equal_only_for_equal_parts(one, other):
    assert len(record_key(*one)) == 16
    assert (record_key(*one) == record_key(*other)) == (kinds(one) == kinds(other))


def test_keys_do_not_change_between_versions():
    # Whoever changes these throws away the samples of every user.
    assert record_key("row", 0).hex() == "ddca1a56d5cae22b684aa687437e46d3"
    assert record_key(b"row", 1.5, None, True).hex() == "0924686d5adb1b94bab6e4bded072a72"


def test_what_has_no_canonical_bytes_makes_no_key():
    with pytest.raises(TypeError, match="not list"):
        record_key(["a"])


# -- damage


@pytest.fixture
def small(tmp_path):
    """A segment of four records and its bytes."""
    records = make_records(4)
    with SampleStore(tmp_path) as store:
        store.append(records.items())
    return records, only_segment(tmp_path), only_segment(tmp_path).read_bytes()


@pytest.mark.parametrize("flip", [0xFF, 0x01, 0x20, "newline", "zero"])
def test_every_damaged_byte_costs_two_records_at_most_and_never_gives_a_wrong_one(small, flip):
    records, segment, whole = small
    logging.disable(logging.WARNING)
    try:
        for at, byte in enumerate(whole):
            new = {"newline": 10, "zero": 0}.get(flip) if isinstance(flip, str) else byte ^ flip
            if new == byte:
                continue
            segment.write_bytes(whole[:at] + bytes([new]) + whole[at + 1 :])
            with SampleStore(segment.parent) as store:
                found = {key: record for key in records if (record := store.get(key)) is not None}
                assert len(found) >= len(records) - 2, at
                assert all(records[key] == record for key, record in found.items()), at
                assert len(store) == len(found), at
                assert store.dropped, at
    finally:
        logging.disable(logging.NOTSET)


def test_every_truncation_keeps_all_records_before_it(small):
    records, segment, whole = small
    ends = [at + 1 for at, byte in enumerate(whole) if byte == 10]
    logging.disable(logging.WARNING)
    try:
        for length in range(len(whole)):
            segment.write_bytes(whole[:length])
            before = sum(end <= length for end in ends)
            with SampleStore(segment.parent) as store:
                assert [store.get(key) for key in records] == [*records.values()][:before] + [None] * (4 - before)
                assert store.dropped == (length not in (0, *ends))
    finally:
        logging.disable(logging.NOTSET)


def test_a_hole_of_zeros_costs_only_what_it_covers(small):
    records, segment, whole = small
    first, second = (at + 1 for at, byte in enumerate(whole) if byte == 10 and at < len(whole) // 2 + 2)
    segment.write_bytes(whole[: first + 5] + bytes(5000) + whole[second - 5 :])
    found = contents(segment.parent, records)
    assert len(found) == 3
    assert all(records[key] == record for key, record in found.items())


def test_damage_is_reported_once_with_file_and_count(small, caplog):
    records, segment, whole = small
    segment.write_bytes(whole.replace(b"SELECT 1", b"SELECT 7").replace(b"SELECT 2", b"SELECT 8"))
    with SampleStore(segment.parent) as store:
        store.refresh()
        for key in records:
            store.get(key)
        assert store.dropped == 2
    (message,) = [record.getMessage() for record in caplog.records]
    assert str(segment) in message
    assert "2 damaged records" in message


def test_a_record_that_rots_after_opening_is_missing_and_can_be_sampled_again(small):
    records, segment, whole = small
    key = record_key("row", 1)
    with SampleStore(segment.parent) as store:
        segment.write_bytes(whole.replace(b"SELECT 1", b"SELECT 7"))
        assert key in store
        assert store.get(key) is None
        assert key not in store
        assert store.dropped == 1
        store.append([(key, records[key])])
        assert store.get(key) == records[key]
    assert contents(segment.parent, records) == records


def test_a_segment_taken_away_is_missing_records_not_an_error(small):
    records, segment, _ = small
    with SampleStore(segment.parent) as store:
        segment.unlink()
        store.refresh()
        assert store.get(record_key("row", 1)) is None


def test_a_living_writers_partial_line_is_pending_and_not_damage(small):
    records, segment, whole = small
    cut = whole.index(b"\n") + 20
    segment.write_bytes(b"")
    with SampleStore(segment.parent) as early:
        segment.write_bytes(whole[:cut])
        early.refresh()
        assert (len(early), early.dropped) == (1, 0)
        with SampleStore(segment.parent) as late:  # opened fresh: nobody may ever complete this line
            assert (len(late), late.dropped) == (1, 1)
            segment.write_bytes(whole)
            for store in (early, late):
                store.refresh()
                assert (len(store), store.dropped) == (4, 0)
                assert {key: store.get(key) for key in records} == records


# -- processes

WRITER = """
import sys
from t2s_pref.store import SampleStore, record_key
folder, name, batches, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
store = SampleStore(folder)
print("ready", flush=True)
for batch in range(batches):
    numbers = range(batch * size, batch * size + size)
    store.append((record_key(name, n), {"writer": name, "number": n, "pad": "x" * (n % 997)}) for n in numbers)
    print(batch, flush=True)
"""


def test_a_killed_writer_loses_at_most_the_batch_in_flight(tmp_path):
    size = 50
    rng = random.Random(0)
    for turn in range(6):
        with start_python(WRITER, tmp_path, turn, 1_000_000, size) as process:
            process.stdout.readline()
            time.sleep(rng.uniform(0.01, 0.25))
            process.send_signal(signal.SIGKILL)
            done = [int(line) for line in process.stdout if line.endswith("\n")]
        safe = (done[-1] + 1) * size if done else 0
        with SampleStore(tmp_path) as store:
            for number in range(safe):
                assert store.get(record_key(str(turn), number))["number"] == number
            for number in range(safe, safe + 3 * size):  # what comes after is whole or not there
                record = store.get(record_key(str(turn), number))
                assert record is None or (record["number"] == number and number < safe + 2 * size)
            assert store.dropped <= turn + 1


def test_processes_that_write_at_once_do_not_disturb_each_other(tmp_path):
    batches, size = 20, 10
    processes = [start_python(WRITER, tmp_path, name, batches, size) for name in ("one", "two")]
    with SampleStore(tmp_path) as reader:
        while any(process.poll() is None for process in processes):
            reader.refresh()
            assert reader.dropped == 0
            time.sleep(0.002)
        assert [process.wait() for process in processes] == [0, 0]
        reader.refresh()
        assert len(reader) == 2 * batches * size
        for name in ("one", "two"):
            for number in range(batches * size):
                assert reader.get(record_key(name, number))["writer"] == name
    for process in processes:
        process.stdout.close()


FULL = """
import resource, sys
from t2s_pref.store import SampleStore, record_key
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
store = SampleStore(sys.argv[1])
done = 0
try:
    for batch in range(1000):
        store.append((record_key(batch, n), {"batch": batch, "n": n}) for n in range(10))
        done += 1
except OSError as error:
    print(done, type(error).__name__, len(store), store.get(record_key(done, 0)), flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.append([(record_key("after"), {"space": "again"})])
"""


@pytest.mark.parametrize("limit", [100, 5_000, 5_017, 40_000])
def test_a_full_disk_raises_and_leaves_whole_batches(tmp_path, limit):
    process = start_python(FULL, tmp_path, limit)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    done, error, visible, refused = output.split()
    assert (error, refused, int(visible)) == ("OSError", "None", 10 * int(done))
    with SampleStore(tmp_path) as store:
        assert store.dropped == 0
        assert len(store) == 10 * int(done) + 1  # the same process went on once there was space again
        for batch in range(int(done)):
            assert store.get(record_key(batch, 9)) == {"batch": batch, "n": 9}
        store.append([(record_key(int(done), 0), {"batch": int(done)})])
    assert all(segment.stat().st_size for segment in tmp_path.iterdir())


def test_a_failed_fsync_hides_the_batch_and_begins_a_new_segment(tmp_path, monkeypatch):
    with SampleStore(tmp_path) as store:
        store.append([(record_key(0), {"n": 0})])
        real, calls = os.fsync, []

        def fails_once(descriptor: int) -> None:
            calls.append(descriptor)
            if len(calls) == 1:
                raise OSError(5, "Input/output error")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fails_once)
        with pytest.raises(OSError, match="Input/output"):
            store.append([(record_key(1), {"n": 1})])
        assert record_key(1) not in store
        store.append([(record_key(1), {"n": "again"})])
    with SampleStore(tmp_path) as store:
        assert (store.get(record_key(0)), store.get(record_key(1)), store.dropped) == ({"n": 0}, {"n": "again"}, 0)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_append_returned_for_was_synced_with_its_folder(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))[1])
    with SampleStore(tmp_path) as store:
        store.append([(record_key(0), {})])
        assert synced == [str(tmp_path), str(only_segment(tmp_path))]
        store.append([(record_key(1), {}), (record_key(2), {})])
        assert synced[2:] == [str(only_segment(tmp_path))]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_writes_a_segment_of_its_own(tmp_path):
    with SampleStore(tmp_path) as store:
        store.append([(record_key("parent", 0), {"by": "parent"})])
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                assert store.get(record_key("parent", 0)) == {"by": "parent"}
                store.append([(record_key("child"), {"by": "child"})])
                os._exit(0)
            os._exit(1)
        store.append([(record_key("parent", 1), {"by": "parent"})])
        assert os.waitpid(child, 0)[1] == 0
        store.refresh()
        assert len(store) == 3
    assert len(list(tmp_path.glob("segment-*.log"))) == 2


def test_threads_share_a_store(tmp_path):
    with SampleStore(tmp_path) as store:

        def work(name: int) -> None:
            for number in range(30):
                store.append([(record_key(name, number), {"n": [name, number]})])
                assert store.get(record_key(name, number)) == {"n": [name, number]}

        threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with SampleStore(tmp_path) as store:
        assert (len(store), store.dropped) == (120, 0)


def test_a_segment_can_be_read_without_this_package(small):
    records, segment, whole = small
    lines = [json.loads(line.split(b" ", 1)[1]) for line in whole.splitlines()]
    assert {bytes.fromhex(line["key"]): line["record"] for line in lines} == records

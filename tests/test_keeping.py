"""Answers reach the disk by themselves, and whole batches whole or not at all."""

import time

import pytest

from t2s_pref.keeping import Keeper, failure_of
from t2s_pref.store import SampleStore, record_key

KEYS = [record_key("row", number) for number in range(3)]


def on_disk(folder):
    with SampleStore(folder) as store:
        return [key for key in KEYS if key in store]


def comes_true(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_an_answer_is_on_disk_soon_though_no_other_comes(tmp_path):
    """So a run that is killed while a slow server is silent loses nothing that was answered before."""
    with SampleStore(tmp_path) as store, Keeper(store, soon=True) as keeper:
        keeper.add(KEYS[0], {"text": "a"})
        keeper.add(KEYS[1], {"text": "b"})
        assert comes_true(lambda: on_disk(tmp_path) == KEYS[:2])
        keeper.add(KEYS[2], {"text": "c"})
    assert on_disk(tmp_path) == KEYS


def test_what_is_there_is_kept_where_a_run_is_interrupted(tmp_path):
    with pytest.raises(KeyboardInterrupt), SampleStore(tmp_path) as store, Keeper(store, soon=True) as keeper:  # noqa: PT012
        keeper.add(KEYS[0], {"text": "a"})
        raise KeyboardInterrupt
    assert on_disk(tmp_path) == KEYS[:1]


def test_a_batch_is_kept_whole_or_not_at_all_where_it_is_to_be_repeated(tmp_path):
    with SampleStore(tmp_path) as store:
        with pytest.raises(KeyboardInterrupt), Keeper(store, soon=False) as keeper:  # noqa: PT012
            keeper.add(KEYS[0], {"text": "a"})
            raise KeyboardInterrupt
        assert on_disk(tmp_path) == []
        with Keeper(store, soon=False) as keeper:
            keeper.add(KEYS[0], {"text": "a"})
        assert on_disk(tmp_path) == KEYS[:1]


def test_a_disk_that_takes_no_more_ends_the_run_instead_of_losing_answers_silently(tmp_path):
    folder = tmp_path / "store"
    store = SampleStore(folder)
    folder.write_text("no folder")  # what is written now fails, as on a disk that is gone
    with pytest.raises(OSError, match="store"), Keeper(store, soon=True) as keeper:  # noqa: PT012
        while True:
            keeper.add(KEYS[0], {"text": "a"})
            time.sleep(0.05)


def test_a_failure_is_noted_under_a_key_of_its_own():
    assert len({*KEYS, *map(failure_of, KEYS)}) == 6

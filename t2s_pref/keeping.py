"""Answers on their way to the store: written down a second after they came, whether or not another one comes."""

from threading import Event, Lock, Thread
from typing import Any, Self

from t2s_pref.store import SampleStore, record_key

KEEP_AFTER = 1.0  # seconds between two writes


class Keeper:
    """Takes records and writes them to the store, all of them at its end. A context manager.

    Args:
        store: where they go.
        soon: write in a thread of its own, about once a second; else at the end only.
    """

    def __init__(self, store: SampleStore, soon: bool) -> None:
        self.store, self.soon = store, soon
        self._fresh: list[tuple[bytes, dict[str, Any]]] = []
        self._lock, self._over = Lock(), Event()
        self._thread: Thread | None = None
        self._error: OSError | None = None

    def __enter__(self) -> Self:
        if self.soon:
            self._thread = Thread(target=self._work, name="keeper", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        if self.soon or kind is None:
            self.keep()

    def add(self, key: bytes, record: dict[str, Any]) -> None:
        """Take a record; raises `OSError` where an earlier one could not be written, so that no more are drawn."""
        with self._lock:
            self._fresh.append((key, record))
        if self._error is not None:
            raise self._error

    def keep(self) -> None:
        """Write what there is."""
        with self._lock:
            self.store.append(self._fresh)
            self._fresh.clear()

    def _work(self) -> None:
        while not self._over.wait(KEEP_AFTER):
            try:
                self.keep()
            except OSError as error:  # the disk is full: the next record says so
                self._error = error
                return


def failure_of(key: bytes) -> bytes:
    """The key under which it is noted that an engine gave no answer for `key`."""
    return record_key("failed", key)

"""The sample store: what has been sampled is never sampled again, whatever happens to the run.

A folder of append-only segment files. Each process writes a segment of its own and reads everyone's, so nothing is
locked and any file system will do that keeps one writer's bytes in order, shared ones too (SQLite's WAL needs shared
memory, which they lack). A record is a line:

    <checksum of the rest, 16 hex> {"key":"<32 hex>","record":{...}}

A reader takes whole lines whose checksum is right and goes on at the next line break after anything else, so a torn
write, a flipped byte or a block of zeros costs the records it touches and no other; they are sampled again.

Not covered: a segment whose bytes an attacker chose (the checksum has no secret), and Windows (`os.pread`).
"""

import json
import logging
import os
import re
import socket
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import blake2b
from io import FileIO
from pathlib import Path
from typing import Any

from t2s_pref.files import sync_folder

logger = logging.getLogger(__name__)

_SEGMENT = re.compile(r"segment-\d{20}-[\w.-]+-\d+-[0-9a-f]{8}\.log")
_RECORD = re.compile(rb'([0-9a-f]{16}) (\{"key":"([0-9a-f]{32})","record":(\{.*\})\})')
_OPEN_SEGMENTS = 64  # a store resumed a thousand times has a thousand segments, and a process often 1024 files


def record_key(*parts: str | bytes | int | float | bool | None) -> bytes:
    """A 16-byte key of all that decides a record. `("ab", "c")` and `("a", "bc")` differ, and `1`, `"1"` and `True`."""
    digest = blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, bytes):
            kind, data = b"b", part
        elif isinstance(part, str):
            kind, data = b"s", part.encode("utf-8", "surrogatepass")
        elif part is None or isinstance(part, bool):
            kind, data = b"c", repr(part).encode()
        elif isinstance(part, int | float):  # as plain numbers: numpy's float is a float with a repr of its own
            kind, data = (
                (b"i", repr(int(part)).encode()) if isinstance(part, int) else (b"f", repr(float(part)).encode())
            )
        else:
            raise TypeError(f"A key is made of str, bytes, int, float, bool and None, not {type(part).__name__}.")
        digest.update(kind + len(data).to_bytes(8, "little") + data)
    return digest.digest()


def _checksum(payload: bytes) -> bytes:
    return blake2b(payload, digest_size=8).hexdigest().encode()


def _line(key: bytes, record: dict[str, Any]) -> bytes:
    if not isinstance(key, bytes) or len(key) != 16:
        raise ValueError(f"A key is 16 bytes, got {key!r}; record_key makes one.")
    # ASCII with every line break escaped, lone surrogates of a model's text included: a line is a record.
    payload = b'{"key":"%s","record":%s}' % (key.hex().encode(), json.dumps(record, separators=(",", ":")).encode())
    line = _checksum(payload) + b" " + payload
    if not _RECORD.fullmatch(line):
        raise TypeError(f"A record is a dict, got {type(record).__name__}.")
    return line + b"\n"


class SampleStore:
    """A mapping from 16-byte keys to JSON records that survives kills, power cuts and full disks.

    Opening reads all segments in `folder`, which need not exist yet. Memory holds where each record lies (about 300
    bytes a record), not the records.

    A key's first record wins, in the order of the segments' names and then of their lines. Names begin with the time,
    so that is nearly the order of writing, and it depends on the files alone: two processes that sampled the same key
    at once agree after a `refresh()`, and so does every later process.

    Threads may share a store. A pickled copy and a forked child read the same folder and write segments of their own.

    ```python
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> with SampleStore(folder) as store:
    ...     store.append([(record_key("row", 0), {"text": "SELECT 1"})])
    >>> with SampleStore(folder) as store:
    ...     store.get(record_key("row", 0))
    {'text': 'SELECT 1'}

    ```
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._index: dict[bytes, tuple[str, int, int]] = {}  # key -> segment, offset, length without the line break
        self._read_to: dict[str, int] = {}  # segment -> end of its last whole line
        self._damaged: Counter[str] = Counter()
        self._torn: set[str] = set()  # segments that ended without a line break when the store was opened
        self._files: OrderedDict[str, FileIO] = OrderedDict()
        self._own: FileIO | None = None
        self._own_name = ""
        self._pid = os.getpid()
        self._lock = threading.RLock()
        for name in self._segments():
            self._read(name)
            if self._size(name) > self._read_to[name]:
                self._torn.add(name)
            if lost := self._damaged[name] + (name in self._torn):
                logger.warning("%s: %d damaged records skipped; they will be sampled again", self.folder / name, lost)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder,)

    def __enter__(self) -> "SampleStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: bytes) -> bool:
        return key in self._index

    @property
    def dropped(self) -> int:
        """Damaged pieces found: bad lines, records that rotted since, and ends cut short when the store was opened.

        A piece is not a record: a line break that was lost makes two records one damaged piece. An end cut short that
        its living writer has completed since no longer counts.
        """
        return self._damaged.total() + len(self._torn)

    def get(self, key: bytes) -> dict[str, Any] | None:
        """The record of `key`, or None. Its checksum is verified again: a rotten record is forgotten and counted."""
        with self._lock:
            if key not in self._index:
                return None
            name, offset, length = self._index[key]
            try:
                line = os.pread(self._file(name).fileno(), length, offset)
            except OSError:  # removed, or the disk has gone bad there
                line = b""
            whole = _RECORD.fullmatch(line)
            if whole and _checksum(whole[2]) == whole[1] and whole[3] == key.hex().encode():
                return json.loads(whole[4])
            del self._index[key]
            self._damaged[name] += 1
            if self._damaged[name] == 1:
                logger.warning("%s: a record was damaged after it was read; it is sampled again", self.folder / name)
            return None

    def append(self, records: Iterable[tuple[bytes, dict[str, Any]]]) -> None:
        """Write a batch and make it visible to `get`. When this returns, the batch is on disk; known keys are left out.

        Raises `OSError` where it cannot be written (a full disk): the part written is cut off again, no record of the
        batch is visible, and the next call begins a new segment. Raises `TypeError` or `ValueError`, before anything is
        written, for what is not a 16-byte key with a dict that JSON can hold.
        """
        with self._lock:
            lines: dict[bytes, bytes] = {}
            for key, record in records:
                line = _line(key, record)
                if key not in self._index:
                    lines.setdefault(key, line)
            if not lines:
                return
            self._after_fork()
            file = self._own or self._create()
            start = self._read_to[self._own_name]
            try:
                rest = memoryview(b"".join(lines.values()))
                while rest:  # a write may stop early: the disk is full, which the next one says, or it is very large
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except BaseException:
                self._abandon(start)
                raise
            for key, line in lines.items():
                self._index[key] = (self._own_name, start, len(line) - 1)
                start += len(line)
            self._read_to[self._own_name] = start

    def refresh(self) -> None:
        """Read what other processes have written since. An end without its line break is left for the next time."""
        with self._lock:
            self._after_fork()
            for name in self._segments():
                damaged = self._damaged[name]
                if name != self._own_name and self._size(name) > self._read_to.get(name, 0) and self._read(name):
                    self._torn.discard(name)
                if not damaged and self._damaged[name]:
                    logger.warning("%s: %d damaged records skipped", self.folder / name, self._damaged[name])

    def close(self) -> None:
        """Close all files. A closed store can still be used: it opens them again, and writes a new segment."""
        with self._lock:
            for file in [*self._files.values(), *([self._own] if self._own else [])]:
                file.close()
            self._files.clear()
            self._own, self._own_name = None, ""

    def _segments(self) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.folder) if _SEGMENT.fullmatch(name))
        except FileNotFoundError:
            return []

    def _size(self, name: str) -> int:
        try:
            return os.stat(self.folder / name).st_size
        except FileNotFoundError:  # its writer could not fill it and took it away
            return 0

    def _read(self, name: str) -> int:
        """Index the whole lines of a segment from where it was last read; returns how many."""
        offset = self._read_to.setdefault(name, 0)
        count = 0
        try:
            # Opened anew: over NFS only that is sure to show what another host has written.
            with open(self.folder / name, "rb") as file:
                file.seek(offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    whole = _RECORD.fullmatch(line, 0, len(line) - 1)
                    if whole and _checksum(whole[2]) == whole[1]:
                        key = bytes.fromhex(whole[3].decode())
                        known = self._index.get(key)
                        if known is None or (name, offset) < known[:2]:
                            self._index[key] = (name, offset, len(line) - 1)
                    else:
                        self._damaged[name] += 1
                    offset += len(line)
                    count += 1
        except FileNotFoundError:
            pass
        self._read_to[name] = offset
        return count

    def _file(self, name: str) -> FileIO:
        if name in self._files:
            self._files.move_to_end(name)
        else:
            if len(self._files) >= _OPEN_SEGMENTS:
                self._files.popitem(last=False)[1].close()
            self._files[name] = FileIO(os.fspath(self.folder / name))
        return self._files[name]

    def _create(self) -> FileIO:
        self.folder.mkdir(parents=True, exist_ok=True)
        host = re.sub(r"[^\w.-]", "_", socket.gethostname(), flags=re.ASCII)[:40] or "host"
        name = f"segment-{time.time_ns():020d}-{host}-{os.getpid()}-{os.urandom(4).hex()}.log"
        file = FileIO(os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666), "w")
        sync_folder(self.folder)
        self._own, self._own_name, self._read_to[name] = file, name, 0
        return file

    def _abandon(self, end: int) -> None:
        """Cut our segment back to its last whole batch and never write to it again: after a failed fsync the system may
        have dropped any of its pages."""
        file, name = self._own, self._own_name
        self._own, self._own_name = None, ""
        try:
            os.ftruncate(file.fileno(), end)
            os.fsync(file.fileno())
            if not end:
                os.unlink(self.folder / name)
        except OSError:
            logger.warning("%s could not be cut back; a reader skips its torn end", self.folder / name)
        finally:
            file.close()

    def _after_fork(self) -> None:
        """A forked child has its parent's files; two writers in one segment would tear each other's lines."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self.close()

"""One worker of the sandbox: runs SQL that nobody trusts, compares the results, and may be killed at any moment.

Started by `t2s_pref.pool` as `python -I -S worker.py`, with the standard library only: it has to start in milliseconds
and to hold nothing worth stealing. It reads one job a line and answers a line for each gold and each candidate
([`t2s_pref.judge`]); the parent holds the watch and kills it where an answer is late. What each defence here is for:

- the file is opened read-only and `immutable`, which leaves no `-wal` or `-shm` beside it;
- the authorizer lets a statement select, read, recurse and call functions: no write, no ATTACH, no PRAGMA;
- a progress handler ends what runs too long inside SQLite's virtual machine, limits on length and heap what grows;
- limits on address space, file size (0: nothing can be written at all) and open files hold for the whole process;
- what none of these stops (a `printf` of a gigabyte, an `instr` of megabytes) ends with the process.

Not covered: a hole in SQLite itself that runs machine code. It would run as the user, without files to write to, but
with a network. Where PDEATHSIG is missing (not Linux) a worker outlives a killed parent until its statement ends.
"""

import contextlib
import re
import sqlite3
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

if __name__ == "__main__":  # -I keeps even the script's own folder from the path; last, for nothing there is to shadow
    sys.path.append(str(Path(__file__).resolve().parent.parent))

from t2s_pref import verdicts
from t2s_pref.compare import Rows
from t2s_pref.judge import CHUNK, Failed, Limits, serve, size_of

MEMORY = 768 << 20  # bytes of address space
HEAP = 256 << 20  # bytes that SQLite may hold
LONGEST_VALUE = 8 << 20
TICK = 1000  # virtual machine instructions between two looks at the clock

ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
DENIED_FUNCTIONS = {"load_extension", "fts3_tokenizer", "readfile", "writefile", "edit", "fsdir", "sqlite_log"}

# sqlite3 in Python 3.11 says SQLITE_ERROR for all of them: the message tells.
_MESSAGES = tuple(
    (re.compile(pattern), verdict)
    for pattern, verdict in (
        (r"not authorized|authorization denied|is prohibited|may not be modified", verdicts.BLOCKED),
        (r"unsafe use|readonly database|vtable constructor failed", verdicts.BLOCKED),
        (r"^interrupted", verdicts.TIMEOUT),
        (r"too big|out of memory|too large|too many|stack overflow|disk is full", verdicts.RESOURCE),
        (r"too complex|at most \d+ tables", verdicts.RESOURCE),
        (r"no such collation sequence|no such module", verdicts.RESOURCE),  # the database's own program has them
        (r"disk I/O|is locked|unable to open|image is malformed|is not a database", verdicts.RESOURCE),
        (r"syntax error|incomplete input|unrecognized token", verdicts.SYNTAX_ERROR),
        (r"no such table", verdicts.MISSING_TABLE),
        (r"no such column|has no column named", verdicts.MISSING_COLUMN),
        (r"no such function", verdicts.MISSING_FUNCTION),
    )
)

_QUOTED = re.compile(r"""'(?:[^']|'')*'|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/|"(?P<name>(?:[^"]|"")*)\"""", re.S)

# What in a view may change with time or chance, or come from ties.
_UNSTEADY = re.compile(
    r"\b(?:random|randomblob|now|current_\w+|limit|group_concat|json_group_\w+)\b"
    r"|\b(?:date|time|datetime|julianday|unixepoch)\s*\(\s*\)",
    re.I,
)

_COMPARED = re.compile(r"(?:[=<>]|\b(?:like|glob|between|in\s*\())\s*\Z", re.I)


class SqliteDatabase:
    """One SQLite file, which nothing that is run can change.

    Raises [`Failed`] with `no_database` where the file is none, and with `unreachable` where it cannot be opened: it
    was there when the run began.
    """

    version = f"SQLite {sqlite3.sqlite_version}"

    def __init__(self, path: str, limits: Limits) -> None:
        self.path, self.limits = path, limits
        self._connections: dict[bool, sqlite3.Connection] = {}
        self._unsteady: list[str] = []  # views
        self._deadline, self._random = 0.0, Random(0)
        self._connect(reverse=False)

    def _connect(self, reverse: bool) -> sqlite3.Connection:
        # as a URI: `?`, `#` and `%` in a file name would name another file
        address = f"{Path(self.path).absolute().as_uri()}?mode=ro&immutable=1"
        try:
            connection = sqlite3.connect(address, uri=True, isolation_level=None, cached_statements=0)
            connection.text_factory = _text
            for pragma in ("temp_store=MEMORY", "query_only=ON", "trusted_schema=OFF", f"hard_heap_limit={HEAP}"):
                connection.execute(f"PRAGMA {pragma}").fetchall()
            if reverse:
                connection.execute("PRAGMA reverse_unordered_selects=ON").fetchall()
            _open_virtual_tables(connection)
            self._unsteady = _unsteady_views(connection)
        except sqlite3.Error as error:
            if "unable to open" in str(error):
                raise Failed(verdicts.UNREACHABLE, f"{self.path}: {error}") from error
            raise Failed(verdicts.NO_DATABASE, str(error)) from error
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_VALUE)
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        connection.create_function("random", 0, lambda: self._random.getrandbits(62))
        connection.create_function("randomblob", 1, self._random_blob)
        connection.set_authorizer(_authorize)
        connection.set_progress_handler(self._late, TICK)
        self._connections[reverse] = connection
        return connection

    def _random_blob(self, size: Any) -> bytes:
        # one byte more than is allowed, and SQLite itself says that it is too much
        wanted = int(size) if isinstance(size, int | float) and size == size and abs(size) < HEAP else LONGEST_VALUE + 1
        return self._random.randbytes(max(1, min(wanted, LONGEST_VALUE + 1)))

    def _late(self) -> bool:
        return time.monotonic() > self._deadline

    def run(self, sql: str, seconds: float, reverse: bool = False, seed: int = 0) -> Rows:
        """The result of one statement, or [`Failed`]. With `reverse`, what has no order comes in the opposite one.

        `random()` starts at `seed`, for equal verdicts each time.
        """
        self._deadline, self._random = time.monotonic() + seconds, Random(seed)
        connection = self._connections.get(reverse) or self._connect(reverse)
        try:
            cursor = connection.execute(sql)
            try:
                return self._fetch(cursor)
            finally:
                cursor.close()
        except MemoryError as error:
            raise Failed(verdicts.RESOURCE, "out of memory") from error
        except (sqlite3.Error, sqlite3.Warning) as error:
            raise Failed(_verdict_of(str(error), sql), str(error)) from error
        except (ValueError, OverflowError) as error:  # a NUL character, a lone surrogate
            raise Failed(verdicts.NOT_SQL, str(error)) from error

    def _fetch(self, cursor: sqlite3.Cursor) -> Rows:
        if cursor.description is None:
            raise Failed(verdicts.EMPTY, "no statement")
        rows: list[tuple] = []
        size = 0
        while chunk := cursor.fetchmany(CHUNK):
            rows += chunk
            size += sum(map(size_of, chunk))
            self.limits.check(len(rows), size)
        return Rows(len(cursor.description), rows)

    def string_columns(self, sql: str) -> str:
        """The first name in double quotes that SQLite, finding no such column, reads as a string, or `""`.

        One that something is compared with is left out: datasets like Spider write their values so.
        """
        if '"' not in sql:
            return ""
        names = _as_names(sql)
        for text in (sql, names):
            try:
                self._deadline = time.monotonic() + 1
                self._connections[False].execute(f"EXPLAIN {text}").close()
            except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
                missing = re.match(r"no such column: (.*)", str(error))
                return missing[1] if missing and text is names else ""
        return ""

    def unsteady(self, sql: str) -> str:
        """A view, named in a query, that may return something else another time; or `""`."""
        lowered = sql.lower() if self._unsteady else ""
        return next((f"the view {name}" for name in self._unsteady if name.lower() in lowered), "")

    def close(self) -> None:
        """Close the file."""
        for connection in self._connections.values():
            connection.close()


def _as_names(sql: str) -> str:
    """The text with what stands in double quotes, where no value is expected, in backticks: names only."""
    parts, end, is_value = [], 0, False
    for part in _QUOTED.finditer(sql):
        between = sql[end : part.start()]
        is_value = bool(_COMPARED.search(between)) or (is_value and between.strip().lower() in (",", "and"))
        parts += [between, part[0] if part["name"] is None or is_value else f"`{part['name']}`"]
        end = part.end()
    return "".join([*parts, sql[end:]])


def _open_virtual_tables(connection: sqlite3.Connection) -> None:
    """Open what needs more than reading to be opened, while nothing is forbidden yet: JSON's tables, full-text ones."""
    own = connection.execute("SELECT name FROM sqlite_master WHERE sql LIKE 'CREATE VIRTUAL TABLE%'").fetchall()
    quoted = ['"' + name.replace('"', '""') + '"' for (name,) in own]
    for table in ("json_each('[]')", "json_tree('[]')", *quoted):
        with contextlib.suppress(sqlite3.Error):  # a module that this SQLite lacks
            connection.execute(f"SELECT * FROM {table} LIMIT 0").fetchall()


def _unsteady_views(connection: sqlite3.Connection) -> list[str]:
    """The views that may return something else another time, those that read such ones included."""
    views = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'view' ORDER BY name").fetchall()
    found = {name for name, sql in views if _UNSTEADY.search(sql or "")}
    while more := {name for name, sql in views if any(each.lower() in (sql or "").lower() for each in found)} - found:
        found |= more
    return sorted(found)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")  # invalid UTF-8 is data too, and must not be an error


def _authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    if action == sqlite3.SQLITE_PRAGMA and first == "data_version":  # full-text search asks it before each query
        return sqlite3.SQLITE_OK
    if action not in ALLOWED or (action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in DENIED_FUNCTIONS):
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def _verdict_of(message: str, sql: str) -> str:
    if "one statement at a time" in message:
        return verdicts.MULTI_STATEMENT
    if "null character" in message:
        return verdicts.NOT_SQL
    missing = re.match(r"no such function: (\w+)", message)
    if missing and missing[1].lower() not in sql.lower():  # a view calls it
        return verdicts.RESOURCE
    return next((verdict for pattern, verdict in _MESSAGES if pattern.search(message)), verdicts.OTHER_ERROR)


if __name__ == "__main__":
    serve(SqliteDatabase, MEMORY)

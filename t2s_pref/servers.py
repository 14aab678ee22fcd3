"""One worker of the sandbox for databases on a server: PostgreSQL, MySQL, MariaDB, through SQLAlchemy.

Started by `t2s_pref.pool` like `t2s_pref.worker`, and speaks as it does. The SQL runs on the server, so the server is
the boundary: give a role that may only read. On top of that, a statement is looked at before it is sent (one query,
nothing else), runs in a read-only transaction under the server's own time limit, and is read row by row up to a cap.
What it set in its session is gone before the next.

Not covered: a role that may do more than read (functions with side effects outside of transactions: files, other
sessions), other servers.
"""

import contextlib
import datetime
import decimal
import json
import re
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # -P keeps the script's own folder from the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sqlalchemy import URL, create_engine, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool
from sqlglot.dialects.dialect import Dialect
from sqlglot.tokens import TokenType

from t2s_pref import verdicts
from t2s_pref.compare import Rows
from t2s_pref.judge import CHUNK, Failed, Limits, serve, size_of
from t2s_pref.statements import words

MEMORY = 1 << 30  # bytes of address space: SQLAlchemy, sqlglot and a driver take a third of it
CONNECT = 10  # seconds
DRIVERS = {"postgresql": "psycopg", "mysql": "pymysql", "mariadb": "pymysql"}
INSTALL = "pip install 't2s_pref[servers]'"
EXACT = 2**53  # integers up to it are floats without loss
LARGEST = 300  # digits of an integer that a float can still be compared with
ABSENT = (1044, 1049)  # MySQL's: access denied to a database, unknown database
PASSING = words("init_command sql_mode")  # options of MySQL's driver that a reset session has lost
RAND_MAX = 0x3FFFFFFF  # of MySQL's generator
RESET = 0x1F  # COM_RESET_CONNECTION: variables, locks, temporary tables, prepared statements of a session

# The first word of what may be sent, after comments and parentheses.
QUERIES = words("select with values table")
# Of statements, and of what WITH may begin with beside a query.
ACTIONS = words(
    "insert update delete merge replace drop alter create truncate grant revoke set reset show begin start commit "
    "rollback savepoint release abort end copy call do execute prepare deallocate declare fetch close lock unlock "
    "vacuum analyze cluster reindex refresh comment listen notify unlisten load import security discard checkpoint "
    "explain describe desc use kill flush handler rename optimize repair install uninstall shutdown change purge "
    "binlog xa move reassign repack wait backup cache check checksum clone get help resignal restart signal slave "
    "stop if loop while repeat case for"
)
ENDING = words("pg_terminate_backend pg_cancel_backend")  # which any role may do to its own
WRITES = words("insert update delete merge replace")
# What a quotation mark opens, whatever stands in it: never a keyword.
QUOTED = {kind for kind in TokenType if kind.name.endswith("_STRING")} | {TokenType.STRING, TokenType.IDENTIFIER}
# MySQL runs what stands in such a comment, and lets a hint lift the time limit; a tokenizer sees neither.
LIVE_COMMENT = re.compile(r"/\*M?!|/\*\+[^*]*(?:max_execution_time|set_var)", re.I)

# https://www.postgresql.org/docs/current/errcodes-appendix.html, by code or class
POSTGRES = {
    "42601": verdicts.SYNTAX_ERROR,
    "42P01": verdicts.MISSING_TABLE,
    "3F000": verdicts.MISSING_TABLE,
    "42703": verdicts.MISSING_COLUMN,
    "42883": verdicts.MISSING_FUNCTION,
    "08P01": verdicts.OTHER_ERROR,  # a parameter that nobody gives a value
    "57014": verdicts.TIMEOUT,
    "25006": verdicts.BLOCKED,
    "42501": verdicts.BLOCKED,
    "0A000": verdicts.BLOCKED,
    "55P03": verdicts.RESOURCE,
    "40001": verdicts.RESOURCE,
    "40P01": verdicts.RESOURCE,
    "53": verdicts.RESOURCE,
    "54": verdicts.RESOURCE,
    "58": verdicts.RESOURCE,
    "XX": verdicts.RESOURCE,
    "08": verdicts.WORKER_DIED,
    "57": verdicts.WORKER_DIED,
}
# https://mariadb.com/kb/en/mariadb-error-code-reference/ and MySQL's
MYSQL = {
    **dict.fromkeys((1064, 1149), verdicts.SYNTAX_ERROR),
    **dict.fromkeys((1146, 1051, 1109), verdicts.MISSING_TABLE),
    1054: verdicts.MISSING_COLUMN,
    **dict.fromkeys((1305, 1630, 1128), verdicts.MISSING_FUNCTION),
    **dict.fromkeys((3024, 1969, 1317, 1028), verdicts.TIMEOUT),
    **dict.fromkeys((1044, 1142, 1143, 1227, 1290, 1370, 1410, 1792, 1235), verdicts.BLOCKED),
    **dict.fromkeys((3, 5, 28, 1021, 1037, 1038, 1041, 1114, 1205, 1213, 1226), verdicts.RESOURCE),
    **dict.fromkeys((1104, 1119, 1153, 1436), verdicts.RESOURCE),
    **dict.fromkeys((2006, 2013, 2055, 1053, 1927), verdicts.WORKER_DIED),
}


class ServerDatabase:
    """One database on a server, read only.

    Raises [`Failed`] with `no_database` where the server has none of this name, and with `unreachable` where it cannot
    be reached, refuses the role, or its driver is missing.
    """

    def __init__(self, url: str, limits: Limits) -> None:
        self.limits = limits
        try:
            address = _with_driver(make_url(url))
        except Exception as error:  # what it quotes of a URL that is none may be a part of the password
            raise Failed(verdicts.UNREACHABLE, "no URL like dialect://user:password@host/database") from error
        if "@" in f"{address.host}{address.database}":  # where it ends, a password may have begun
            raise Failed(verdicts.UNREACHABLE, "the URL has an @ too many; in a password write %40, and %2F for a /")
        if lasting := sorted(PASSING & set(address.query)):
            raise Failed(
                verdicts.UNREACHABLE, f"{lasting[0]} in the URL would hold for one statement only; leave it out"
            )
        hidden = [value for name, value in address.query.items() if "pass" in name]
        self._secrets = [str(part) for part in (address.password, *hidden) if part]
        try:
            self.postgres = address.get_backend_name() == "postgresql"
            options: dict[str, Any] = {"connect_timeout": CONNECT}
            options |= _postgres_options() if self.postgres else _mysql_options()
            self._engine = create_engine(address, poolclass=NullPool, connect_args=options)
            self._connect()
            with contextlib.closing(self._connection.cursor()) as cursor:
                cursor.execute("SHOW server_version" if self.postgres else "SELECT version()")
                number = str(cursor.fetchone()[0])
        except ModuleNotFoundError as error:
            raise Failed(verdicts.UNREACHABLE, f"{error.name} is not installed: {INSTALL}") from error
        except Exception as error:  # SQLAlchemy's for a URL that is none, and each driver's own
            if self._is_absent(error, address):  # a detail that becomes a column, and may be published: no host in it
                raise Failed(verdicts.NO_DATABASE, f"no database {address.database!r} for this role") from error
            raise Failed(verdicts.UNREACHABLE, self._message(error)) from error
        self.maria = "mariadb" in number.lower()
        name = "PostgreSQL" if self.postgres else "MariaDB" if self.maria else "MySQL"
        self.version = f"{name} {re.match(r'[0-9.]*', number)[0]}"

    def _connect(self) -> None:
        pooled = self._engine.raw_connection()
        self._connection = pooled.driver_connection
        pooled.detach()  # ours to close
        if self.postgres:
            _load_as_text(self._connection)

    def run(self, sql: str, seconds: float, reverse: bool = False, seed: int = 0) -> Rows:
        """The result of one query, or [`Failed`]; its random numbers start at `seed`.

        A server cannot be asked for the opposite order: `reverse` is not.
        """
        if reverse:
            raise Failed(verdicts.RESOURCE, "only SQLite reverses rows without an order")
        _check(sql, "postgres" if self.postgres else "mysql")
        try:
            return self._run(sql, seconds, seed)
        except Failed as failed:
            if failed.verdict != verdicts.WORKER_DIED:
                raise
        return self._run(sql, seconds, seed)  # its session was ended from outside: only a second time it is to blame

    def _run(self, sql: str, seconds: float, seed: int) -> Rows:
        try:
            milliseconds = max(1, int(seconds * 1000))
            self._begin(milliseconds, seed)
            deadline = time.monotonic() + milliseconds / 1000  # no later than the server's
            width, rows = self._stream(sql, deadline)
            return Rows(width, self._fetch(rows, deadline))
        except Failed:
            raise
        except Exception as error:  # the drivers' exceptions have no ancestor in common but this
            raise Failed(self._verdict_of(error), self._message(error)) from error
        finally:
            self._reset()

    def string_columns(self, sql: str) -> str:
        """Servers read what stands in double quotes in one way only: never a doubt."""
        return ""

    def unsteady(self, sql: str) -> str:
        """Views are not looked into on servers."""
        return ""

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(Exception):  # whatever state it is in
            self._connection.close()

    def _say(self, statement: str) -> None:
        with contextlib.closing(self._connection.cursor()) as cursor:
            cursor.execute(statement)

    def _begin(self, milliseconds: int, seed: int) -> None:
        """Begin a transaction, on a new connection where the old one was lost: no fault of this statement."""
        try:
            self._say_begin(milliseconds, seed)
        except Exception:
            self._replace()
            try:
                self._say_begin(milliseconds, seed)
            except Exception as error:
                raise Failed(verdicts.UNREACHABLE, f"the connection was lost: {self._message(error)}") from error

    def _say_begin(self, milliseconds: int, seed: int) -> None:
        if self.postgres:
            limits = f"SET LOCAL statement_timeout = {milliseconds}; SET LOCAL seed = {seed / 100}"
            self._say(f"BEGIN READ ONLY; {limits}")
            return
        limit = f"max_statement_time = {milliseconds / 1000}" if self.maria else f"max_execution_time = {milliseconds}"
        seeds = ((seed + 1) * 0x10001 + 55_555_555, (seed + 1) * 0x10000001)  # as RAND(n) makes them
        self._say(f"SET SESSION {limit}, rand_seed1 = {seeds[0] % RAND_MAX}, rand_seed2 = {seeds[1] % RAND_MAX}")
        self._say("START TRANSACTION READ ONLY")

    def _stream(self, sql: str, deadline: float) -> tuple[int, Iterator[tuple]]:
        """How many columns, and the rows one by one as the server sends them."""
        if self.postgres:
            cursor = self._connection.cursor()
            # `binary` asks for the extended protocol, which takes one statement only
            cursor.execute(f"DECLARE result NO SCROLL CURSOR FOR {sql}", binary=True)
            cursor.execute(f"FETCH {CHUNK} FROM result")
            return len(cursor.description), self._fetched(cursor, deadline)
        from pymysql.cursors import SSCursor

        cursor = self._connection.cursor(SSCursor)
        cursor.execute(sql)
        return len(cursor.description or ()), iter(cursor.fetchone, None)

    def _fetched(self, cursor: Any, deadline: float) -> Iterator[tuple]:
        while chunk := cursor.fetchall():
            yield from chunk
            # the limit holds for each FETCH anew, and the statement may have lifted it
            left = max(1, int(1000 * (deadline - time.monotonic())))
            self._say(f"SET LOCAL statement_timeout = {left}")
            cursor.execute(f"FETCH {CHUNK} FROM result")

    def _fetch(self, rows: Iterator[tuple], deadline: float) -> list[tuple]:
        fetched: list[tuple] = []
        size = 0
        for row in rows:
            # PostgreSQL's limit holds for each FETCH; benchmark(), and MySQL's sleep(), return a row when interrupted
            if time.monotonic() > deadline:
                raise Failed(verdicts.TIMEOUT, "took too long to read")
            cells = tuple(_plain(cell) for cell in row)
            fetched.append(cells)
            size += size_of(cells)
            self.limits.check(len(fetched), size)
        return fetched

    def _reset(self) -> None:
        """End the transaction and forget what the statement set; a connection that cannot is replaced."""
        unread = getattr(self._connection, "_result", None)  # PyMySQL's
        if unread is not None and unread.unbuffered_active:
            unread.unbuffered_active = False  # or all the rest of it would be read first
            self._replace()
            return
        try:
            if self.postgres:
                self._say("ROLLBACK")
                self._say("DISCARD ALL")
            else:  # rolls back too; a new connection takes a hundred times as long
                self._connection._execute_command(RESET, b"")
                self._connection._read_ok_packet()
                self._connection.set_character_set("utf8mb4")
        except Exception:
            self._replace()

    def _replace(self) -> None:
        with contextlib.suppress(Exception):
            getattr(self._connection, "_force_close", self._connection.close)()
        with contextlib.suppress(Exception):  # a server that is gone says so to the next statement
            self._connect()

    def _is_absent(self, error: Exception, address: URL) -> bool:
        """Whether the server was reached and has no such database, or none that this role may see."""
        cause = error.orig if isinstance(error, DBAPIError) else error
        if not self.postgres:
            return bool(cause.args) and cause.args[0] in ABSENT
        # no code comes with it; in other languages than English it is taken for a server out of reach
        name = re.escape(str(address.database))
        return bool(re.search(rf'database "{name}" does not exist|permission denied for database "{name}"', str(cause)))

    def _verdict_of(self, error: Exception) -> str:
        if self.postgres:
            code = getattr(error, "sqlstate", None) or ""
            if code == "42883" and "operator" in str(error):
                return verdicts.OTHER_ERROR
            if "memory exhausted" in str(error):
                return verdicts.RESOURCE
            if not code:
                return verdicts.WORKER_DIED if type(error).__name__ == "OperationalError" else verdicts.RESOURCE
            return POSTGRES.get(code) or POSTGRES.get(code[:2]) or verdicts.OTHER_ERROR
        number = error.args[0] if error.args and isinstance(error.args[0], int) else None
        if number is None or number == 0:
            return verdicts.WORKER_DIED if type(error).__name__ == "InterfaceError" else verdicts.RESOURCE
        return MYSQL.get(number, verdicts.OTHER_ERROR)

    def _message(self, error: Exception) -> str:
        """What the server says, in one line, without what a URL may hold."""
        cause = error.orig if isinstance(error, DBAPIError) else error
        text = str(cause.args[1]) if len(cause.args) > 1 and isinstance(cause.args[0], int) else str(cause)
        text = next((line for line in text.splitlines() if line.strip()), type(cause).__name__)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def _with_driver(address: URL) -> URL:
    """The URL with the driver that comes with `t2s_pref[servers]`: what is promised here rests on its protocol."""
    backend = address.get_backend_name()
    if backend not in DRIVERS:
        raise ValueError(f"{backend} is not known")
    return address.set(drivername=f"{backend}+{DRIVERS[backend]}")


def _postgres_options() -> dict[str, Any]:
    return {"autocommit": True, "prepare_threshold": None, "client_encoding": "utf8"}


def _mysql_options() -> dict[str, Any]:
    from pymysql.constants import FIELD_TYPE
    from pymysql.converters import conversions

    kinds = ("DATE", "TIME", "DATETIME", "TIMESTAMP", "NEWDATE")
    as_text = {getattr(FIELD_TYPE, kind) for kind in kinds}  # as the server writes them, 0000-00-00 and 26:03:04 too
    convert = {kind: convert for kind, convert in conversions.items() if kind not in as_text}
    convert[FIELD_TYPE.BIT] = lambda data: int.from_bytes(data, "big")  # where it is compared, it is a number
    return {"charset": "utf8mb4", "local_infile": False, "conv": convert}


def _load_as_text(connection: Any) -> None:
    """Everything but numbers, booleans and bytes as the server writes it.

    Python has no year 10000, no infinite day, no month as a length of time, in an array or a range neither.
    """
    from psycopg.adapt import Loader

    class Text(Loader):
        def load(self, data: Any) -> str:
            # invalid UTF-8, which a database without an encoding may hold, is data too
            return bytes(data).decode("utf-8", "surrogateescape")

    class Json(Text):
        def load(self, data: Any) -> str:
            text = super().load(data)
            try:
                return json.dumps(json.loads(text), sort_keys=True, ensure_ascii=False)
            except (ValueError, RecursionError):
                return text

    kept = {"bool", "bytea", "float4", "float8", "int2", "int4", "int8", "numeric", "oid"}
    for kind in connection.adapters.types:
        if kind.name not in kept:
            connection.adapters.register_loader(kind.oid, Json if kind.name in ("json", "jsonb") else Text)
        if kind.array_oid:
            connection.adapters.register_loader(kind.array_oid, Text)
    connection.adapters.register_loader(0, Text)  # any other


def _check(sql: str, dialect: str) -> None:
    """Raise [`Failed`] on whatever is not one query."""
    if "\0" in sql or (not sql.isascii() and sql != sql.encode("utf-8", "replace").decode()):
        raise Failed(verdicts.NOT_SQL, "a NUL character or a lone surrogate")  # PostgreSQL's driver would end there
    try:
        tokens = Dialect.get_or_raise(dialect).tokenize(sql)
    except Exception as error:  # sqlglot raises what it likes; what it cannot read is not sent
        raise Failed(verdicts.NOT_SQL, f"not taken apart: {error}") from error
    while tokens and tokens[-1].token_type == TokenType.SEMICOLON:
        tokens.pop()
    if not tokens:
        raise Failed(verdicts.EMPTY, "no statement")
    if any(token.token_type == TokenType.SEMICOLON for token in tokens):
        raise Failed(verdicts.MULTI_STATEMENT, "several statements")
    # a string of any kind stands for itself, and is no word
    names = [
        part for token in tokens for part in (token.text.lower().split() if token.token_type not in QUOTED else ("''",))
    ]
    first = next((name for name in names if name != "("), "")
    if first in ACTIONS:
        raise Failed(verdicts.BLOCKED, f"{first} is no query")
    if first not in QUERIES:
        raise Failed(verdicts.SYNTAX_ERROR, f"syntax error at or near {first!r}")
    # `(delete ...`, `) delete ...`; but replace(...) and insert(...) are functions too
    following = zip(names, names[1:], [*names[2:], ""], strict=False)
    if first == "with" and any(a in ("(", ")") and b in WRITES and c != "(" for a, b, c in following):
        raise Failed(verdicts.BLOCKED, "WITH changes data")
    if "into" in names or not {("for", "update"), ("for", "share")}.isdisjoint(pairwise(names)):
        raise Failed(verdicts.BLOCKED, "writes or locks")
    if not ENDING.isdisjoint(names):
        raise Failed(verdicts.BLOCKED, "ends other sessions")
    if ("lock", "in") in pairwise(names) or (dialect == "mysql" and LIVE_COMMENT.search(sql)):
        raise Failed(verdicts.BLOCKED, "locks, or hides SQL in a comment")


def _plain(cell: Any) -> Any:
    """A value as one of SQLite's five kinds."""
    if cell is None or type(cell) in (str, int, float, bytes):
        return cell
    if isinstance(cell, bool):
        return int(cell)
    if isinstance(cell, decimal.Decimal):
        whole = cell.is_finite() and cell == cell.to_integral_value()
        exact = whole and abs(cell) > EXACT and cell.adjusted() < LARGEST
        return int(cell) if exact else float(cell)
    if isinstance(cell, bytearray | memoryview):
        return bytes(cell)
    if isinstance(cell, datetime.datetime):
        return cell.isoformat(" ")
    return json.dumps(cell, sort_keys=True, default=str) if isinstance(cell, list | dict) else str(cell)


if __name__ == "__main__":
    serve(ServerDatabase, MEMORY)

"""Where the databases of the rows are: folders, files, mappings, servers; and what identifies their content."""

import logging
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import NamedTuple
from urllib.parse import quote

from t2s_pref.errors import UserError, one_line
from t2s_pref.files import own_prefix
from t2s_pref.weights import hash_file, hash_parts, remembered_hashes, stamp

logger = logging.getLogger(__name__)

DatabasesLike = str | os.PathLike[str] | Mapping[str, str | os.PathLike[str] | list[str]]

SUFFIXES = (".sqlite", ".sqlite3", ".db")
PLACEHOLDER = "{db_id}"
EXPECTED = "databases are a folder of <db_id>/<db_id>.sqlite, a SQLite file, a mapping from db_id, or a URL"
HEADER = b"SQLite format 3\0"
SUPER = bytes.fromhex("d9d505f920a163d7")  # the end of a journal that names a super-journal
SHOWN = 10  # names in an error
# A file with one of these beside it, not empty, holds changes that the file itself lacks.
LIVE = ("-wal", "-journal")

LONGEST_NAME = 255 - max(map(len, SUFFIXES))  # bytes; longer is no name on any file system in use

# SQLAlchemy's names of backends, and sqlglot's of their dialects.
DIALECTS = {"postgresql": "postgres", "mysql": "mysql", "mariadb": "mysql"}


class Instance(NamedTuple):
    """One database to run SQL on: a path or a URL, and a hash of its content where that is known."""

    address: str
    content: str | None
    server: bool = False


class Databases:
    """The databases of a dataset's rows, found and hashed; a context manager, for it may hold temporary copies.

    Args:
        given: a folder in the layout of Spider and BIRD (`<db_id>/<db_id>.sqlite`; further files in a database's folder
            are further instances of it), or with `<db_id>.sqlite` in it; one SQLite file for all rows; a mapping from
            `db_id` to a file, a list of files or a URL; or a SQLAlchemy URL, with `{db_id}` where each has its own.
        db_ids: which are needed; `None` for rows that name none.
        version: what a server's content is called; without it, nothing run there is cached.
        memo: JSON file of hashes by path, size and time.

    Raises:
        [`UserError`]: where nothing is found at all, or a file is being written to.
    """

    def __init__(
        self,
        given: DatabasesLike,
        db_ids: Iterable[str | None],
        *,
        version: str | None = None,
        memo: Path | None = None,
    ) -> None:
        self._copies: Path | None = None
        self._stamps: dict[Path, str] = {}
        self._hashes: dict[Path, str] = {}
        self._found: dict[str | None, tuple[Instance, ...]] = {}
        self._dialects: dict[str | None, str] = {}
        self.version = version
        try:
            self._find(given, sorted(set(db_ids), key=lambda name: (name is not None, name)), memo)
        except BaseException:
            self._clean_up()
            raise

    def __enter__(self) -> "Databases":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clean_up()

    def _clean_up(self) -> None:
        if self._copies is not None:
            shutil.rmtree(self._copies, ignore_errors=True)

    def __getitem__(self, db_id: str | None) -> tuple[Instance, ...]:
        """The instances of a database; none where it does not exist."""
        return self._found.get(db_id, ())

    def dialect(self, db_id: str | None) -> str:
        """The sqlglot name of the SQL that a database's engine runs."""
        return self._dialects.get(db_id, "sqlite")

    @property
    def dialects(self) -> list[str]:
        """Those of all databases that are there."""
        return sorted({self._dialects[db_id] for db_id, found in self._found.items() if found})

    @property
    def contents(self) -> dict[str, list[str]] | None:
        """Hashes by db_id, for a key; `None` where a server's content is not known, so that nothing may be cached."""
        hashes = {str(db_id): [each.content for each in found] for db_id, found in self._found.items()}
        return None if any(None in of for of in hashes.values()) else hashes

    def check_unchanged(self) -> None:
        """Raise [`UserError`] where a file is not the one any more that was hashed."""
        for file, before in self._stamps.items():
            try:
                if (now := stamp(file)) == before:
                    continue
                same = hash_file(file) == self._hashes[file]
            except OSError:
                same = False
            if not same:
                raise UserError(f"{str(file)!r} has changed since the run began; start again when it stays as it is.")
            self._stamps[file] = now  # touched, and not to be read again for that

    def _find(self, given: DatabasesLike, db_ids: list[str | None], memo: Path | None) -> None:
        try:
            places = {db_id: _places(given, db_id) for db_id in db_ids}
        except OSError as error:
            raise UserError(f"The databases cannot be read: {one_line(error)}.") from error
        urls = {place for of in places.values() for place in of if _is_url(place)}
        missing = [db_id for db_id, of in places.items() if not of]
        if missing and len(missing) == len(places):
            raise UserError(_nothing_found(given, missing[0]))
        if missing:
            example = next((repr(db_id) for db_id in missing if db_id is not None), "rows without a db_id")
            logger.warning(
                "%d of %d databases were not found (%s); their rows cannot be judged.",
                *(len(missing), len(places), example),
            )
        self._dialects = {db_id: _dialect(db_id, of) for db_id, of in places.items()}
        if not urls and self.version is not None:
            raise UserError("database_version is for servers; the content of SQLite files is hashed.")
        try:
            files = {place: self._settled(Path(place)) for of in places.values() for place in of if place not in urls}
            others = [place for place, file in files.items() if not _is_sqlite(file)]
        except OSError as error:
            raise UserError(f"A database cannot be read: {one_line(error)}.") from error
        if others and len(others) == len(files):
            more = f", and neither are {len(others) - 1} others" if len(others) > 1 else ""
            raise UserError(f"{others[0]!r} is no SQLite database{more}; {EXPECTED}.")
        copies = {file for file in files.values() if self._copies and file.is_relative_to(self._copies)}
        self._stamps = {file: stamp(file) for file in set(files.values()) - copies}  # before it is read
        self._hashes = remembered_hashes(self._stamps, memo) | remembered_hashes(copies, None)
        for db_id, of in places.items():
            self._found[db_id] = tuple(
                Instance(place, _server_content(place, self.version), server=True)
                if place in urls
                else Instance(str(files[place]), self._hashes[files[place]])
                for place in of
            )

    def _settled(self, path: Path) -> Path:
        """The file itself, or, where a log beside it holds what it lacks, a copy with that put in.

        Workers open files as immutable, which is how nothing is written beside them; but then a log is not read.
        """
        path = path.resolve()
        logs = [log for suffix in LIVE if (log := path.with_name(path.name + suffix)).exists() and log.stat().st_size]
        if not logs:
            return path
        for log in logs:
            with open(log, "rb") as opened:
                opened.seek(-len(SUPER), os.SEEK_END) if log.stat().st_size > len(SUPER) else None
                if opened.read() == SUPER:  # rolling it back deletes the file that it names, whatever that is
                    raise UserError(
                        f"{str(log)!r} is of several databases at once; let the program that made it end it."
                    )
        if self._copies is None:
            temporary = Path(tempfile.gettempdir())
            self._copies = Path(tempfile.mkdtemp(dir=temporary, prefix=own_prefix(temporary, "t2s_pref-databases-")))
        folder = Path(tempfile.mkdtemp(dir=self._copies))
        before = remembered_hashes([path, *logs], None)
        for file in (path, *logs):
            shutil.copyfile(file, folder / file.name)  # not its mode: a copy is to be written to
        if {folder / file.name: known for file, known in before.items()} != remembered_hashes(
            [folder / file.name for file in (path, *logs)], None
        ) or before != remembered_hashes([path, *logs], None):
            raise UserError(f"{str(path)!r} is being written to; try again when its writer has ended.")
        copy = folder / path.name
        try:
            with closing(sqlite3.connect(copy, isolation_level=None)) as connection:
                connection.execute("PRAGMA journal_mode=DELETE").fetchall()
                connection.execute("PRAGMA schema_version").fetchall()
        except sqlite3.Error as error:
            raise UserError(f"{str(path)!r} has a log beside it that cannot be read: {one_line(error)}.") from error
        return copy


def _places(given: DatabasesLike, db_id: str | None) -> list[str]:
    """Paths or URLs of the instances of a database, the one of its own name first."""
    if isinstance(given, Mapping):
        value = given.get(db_id) if db_id is not None else None
        values = [] if value is None else value if isinstance(value, list | tuple) else [value]
        return [place for each in values for place in _in_place(each, db_id, None)]
    # A db_id comes with the data, from anywhere: it names a folder in this one and nothing else.
    odd = not db_id or db_id in (".", "..") or set(db_id) & set("/\\\0") or len(db_id.encode()) > LONGEST_NAME
    return _in_place(given, db_id, "" if odd else db_id)


def _in_place(place: str | os.PathLike[str], db_id: str | None, name: str | None) -> list[str]:
    """What a file, a URL or a folder holds of a database: in a folder what has that name, or all where it is `None`."""
    if not isinstance(place, str | os.PathLike):
        raise UserError(f"databases is {place!r}; {EXPECTED}.")
    text = os.fspath(place)
    if _is_url(text):
        if PLACEHOLDER not in text:
            return [text]
        return [text.replace(PLACEHOLDER, quote(db_id, safe=""))] if db_id else []
    path = Path(text).expanduser()
    if path.is_file():
        return [str(path)]
    if not path.is_dir():
        shown = "what was given" if ":" in text and "@" in text else repr(text)  # a URL with one slash, and a password
        raise UserError(f"{shown} is neither a file nor a folder; {EXPECTED}.")
    inside = path if name is None else path / name
    if name == "":
        files = []
    elif inside.is_dir():
        files = sorted(file for file in inside.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
        files.sort(key=lambda file: file.stem != db_id)
    else:
        files = [file for suffix in SUFFIXES if (file := path / f"{name}{suffix}").is_file()]
    return [str(file) for file in files]


def _nothing_found(given: DatabasesLike, db_id: str | None) -> str:
    if isinstance(given, Mapping):
        return f"No database for {db_id!r}; the mapping has {sorted(map(str, given))[:SHOWN]}."
    if _is_url(os.fspath(given)):  # not shown: it may hold a password
        return "The rows have no column 'db_id', and the URL wants one; add the column, or write a name into the URL."
    folder = Path(os.fspath(given)).expanduser()
    if not db_id:
        return f"The rows have no column 'db_id' to choose among what {str(folder)!r} holds; add it, or name one file."
    children = sorted(child for child in folder.iterdir() if child.is_dir() or child.suffix.lower() in SUFFIXES)
    found = f"No database for {db_id!r} in {str(folder)!r}; expected {db_id}/{db_id}.sqlite in it"
    if deeper := next((child for child in children if child.is_dir() and _in_place(child, db_id, db_id)), None):
        return f"{found}, and found that in {str(deeper)!r}."
    return f"{found}, and found {[child.name for child in children][:SHOWN] or 'nothing'}."


def _is_sqlite(file: Path) -> bool:
    """Whether a file begins as a database does; an empty one is a database without tables."""
    with open(file, "rb") as opened:
        return opened.read(len(HEADER)) in (HEADER, b"")


def _is_url(text: str) -> bool:
    return "://" in text


def _dialect(db_id: str | None, places: list[str]) -> str:
    """The dialect of a database's engine, checked to be one for all its instances, and to have what it needs."""
    backends = {place.partition("://")[0].partition("+")[0] if _is_url(place) else None for place in places}
    if backends <= {None}:
        return "sqlite"
    if "sqlite" in backends:
        raise UserError(f"SQLite files are given by their paths, without sqlite://; {EXPECTED}.")
    if len(backends) > 1:
        kinds = ", ".join(sorted(backend or "files" for backend in backends))
        raise UserError(f"The instances of {db_id!r} are {kinds}; one engine must run all.")
    (backend,) = backends
    if backend not in DIALECTS:
        raise UserError(f"{backend!r} is not a server known here; use one of {', '.join(DIALECTS)}, or a SQLite file.")
    try:
        import sqlalchemy  # noqa: F401 - the workers import it, and could not say so well
    except ImportError as error:
        raise UserError(f"{backend} needs SQLAlchemy and a driver: pip install 't2s_pref[servers]'.") from error
    return DIALECTS[backend]


def _server_content(url: str, version: str | None) -> str | None:
    """A name for a server's content: its address without the password, and the version that the user vouches for."""
    if version is None:
        return None
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        address = make_url(url)
    except (ArgumentError, ValueError) as error:  # what it quotes may be a part of the password
        raise UserError("The URL of the databases is none; expected dialect://user:password@host/database.") from error
    known = (address.get_backend_name(), address.username, address.host, address.port, address.database)
    # `passwd` and `sslpassword` are passwords too
    options = sorted((name, value) for name, value in address.query.items() if "pass" not in name)
    # what its client library takes from the environment, where the URL does not say it
    outside = sorted((name, value) for name, value in os.environ.items() if name[:2] == "PG" and "PASS" not in name)
    return hash_parts([repr((known, options, outside, version)).encode()])

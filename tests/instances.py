"""What decides, apart from the package, which SQL is right: more data, a plain judge and a generous one.

Nothing here imports the package's comparator: what is told apart here is what it is measured against. For the same
reason all of it is simple and slow, and fit for small databases only.
"""

import itertools
import json
import math
import os
import random
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

DEMO = Path(__file__).resolve().parents[1] / "t2s_pref" / "demo_data"
GEOQUERY = Path(os.environ.get("GEOQUERY") or Path(__file__).resolve().parents[2] / "shared" / "data" / "geoquery")

Row = tuple[Any, ...]
NUMERIC = ("INTEGER", "REAL", "NUMERIC")
MAX_ROWS = 20_000


# What databases declare


class Column(NamedTuple):
    """A column: its name as written, its declared type, SQLite's affinity for that, and whether it may hold NULL."""

    name: str
    declared: str
    affinity: str
    nullable: bool


@dataclass(frozen=True)
class Table:
    """A table. Its columns go by their names in lower case."""

    name: str
    columns: dict[str, Column]
    primary: tuple[str, ...]
    references: dict[str, tuple[str, str]]

    @property
    def unique(self) -> str | None:
        """The column of which no two values are equal; several rows may have NULL in it."""
        return self.primary[0] if len(self.primary) == 1 else None

    @property
    def key(self) -> str | None:
        """The unique column which is never NULL: SQLite promises that for INTEGER PRIMARY KEY, not for TEXT."""
        return self.unique if self.unique and not self.columns[self.unique].nullable else None


@dataclass(frozen=True)
class Schema:
    """What a database declares, by lower-case names, and its values, from which mutants take other literals."""

    path: Path
    tables: dict[str, Table] = field(hash=False)

    @classmethod
    def read(cls, path: Path) -> "Schema":
        with closing(connect(path)) as base:
            names = base.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
            return cls(path, {name.lower(): _table(base, name) for (name,) in names.fetchall()})

    @cached_property
    def values(self) -> dict[tuple[str, str], list[Any]]:
        """The distinct values, without NULL, of each column."""
        found = {}
        with closing(connect(self.path)) as base:
            for table in self.tables.values():
                for column in table.columns.values():
                    query = f'SELECT DISTINCT "{column.name}" FROM "{table.name}" WHERE "{column.name}" IS NOT NULL'
                    found[table.name.lower(), column.name.lower()] = [
                        value for (value,) in base.execute(f"{query} ORDER BY 1")
                    ]
        return found


def _table(base: sqlite3.Connection, name: str) -> Table:
    columns, primary = {}, {}
    for _, column, declared, not_null, _, place in base.execute(f'PRAGMA table_info("{name}")').fetchall():
        rowid = place and declared.upper() == "INTEGER"
        columns[column.lower()] = Column(column, declared, _affinity(declared), not (not_null or rowid))
        if place:
            primary[place] = column.lower()
    references = {
        row[3].lower(): (row[2].lower(), row[4].lower()) for row in base.execute(f'PRAGMA foreign_key_list("{name}")')
    }
    return Table(name, columns, tuple(primary[place] for place in sorted(primary)), references)


def _affinity(declared: str) -> str:
    """SQLite's five rules, in its order."""
    declared = declared.upper()
    for affinity, parts in {
        "INTEGER": ("INT",),
        "TEXT": ("CHAR", "CLOB", "TEXT"),
        "BLOB": ("BLOB",),
        "REAL": ("REAL", "FLOA", "DOUB"),
    }.items():
        if any(part in declared for part in parts):
            return affinity
    return "NUMERIC" if declared else "BLOB"


# Golds


class Gold(NamedTuple):
    """A gold SQL and the name of its database."""

    db_id: str
    sql: str


def _golds(files: Iterable[Path]) -> list[Gold]:
    rows = itertools.chain.from_iterable(json.loads(file.read_text("utf-8")) for file in files)
    return list(dict.fromkeys(Gold(row["db_id"], row["output"]) for row in rows))


def demo_golds() -> list[Gold]:
    """The distinct golds that ship with the package."""
    return _golds([DEMO / "train.json", DEMO / "heldout.json"])


def geoquery_golds() -> list[Gold]:
    """The distinct golds of GeoQuery's training rows."""
    return _golds([GEOQUERY / "train.json"])


# More data for the same schema


def make_instances(
    databases: Path, folder: Path, seeds: Sequence[int] = (2, 3), keep: float = 0.85, nulls: float = 0.06
) -> dict[str, list[Path]]:
    """Copy each `<db_id>/<db_id>.sqlite` to `folder`; beside it, `<db_id>_<seed>.sqlite` has other rows.

    Of the rows there a share `keep` is left, and of the values that may be NULL a share `nulls` is.
    """
    made = {}
    for source in sorted(databases.glob("*/*.sqlite")):
        place = folder / source.parent.name
        place.mkdir(parents=True)
        made[place.name] = [place / source.name, *(place / f"{source.stem}_{seed}.sqlite" for seed in seeds)]
        with closing(connect(source)) as old:
            for path, seed in zip(made[place.name], (None, *seeds), strict=True):
                with closing(sqlite3.connect(path)) as new:
                    old.backup(new)
                    if seed is not None:
                        _other_rows(new, Schema.read(source), random.Random(seed), keep, nulls)
                        new.commit()
                        assert not new.execute("PRAGMA foreign_key_check").fetchall()
    return made


def _other_rows(base: sqlite3.Connection, schema: Schema, rng: random.Random, keep: float, nulls: float) -> None:
    kept: dict[str, list[dict[str, Any]]] = {}
    for name in _parents_first(schema):
        table = schema.tables[name]
        names = list(table.columns)
        rows = [dict(zip(names, row, strict=True)) for row in base.execute(f'SELECT * FROM "{table.name}"')]
        rows = [row for row in rows if rng.random() < keep]
        for column in names:
            if column in table.primary:
                continue
            values = [row[column] for row in rows]
            if column in table.references:
                parent, key = table.references[column]
                values = [rng.choice(kept[parent])[key] if kept[parent] else None for _ in rows]
            elif rng.random() < 0.6:
                rng.shuffle(values)
            for row, value in zip(rows, values, strict=True):
                row[column] = None if table.columns[column].nullable and rng.random() < nulls else value
        rows += list(_more(table, rows, rng))
        kept[name] = rows
        base.execute(f'DELETE FROM "{table.name}"')
        places = ", ".join("?" * len(names))
        base.executemany(f'INSERT INTO "{table.name}" VALUES ({places})', [list(row.values()) for row in rows])


def _more(table: Table, rows: list[dict[str, Any]], rng: random.Random) -> Iterator[dict[str, Any]]:
    """Some rows once more, with new keys; none where a new key would have to be made up."""
    if table.primary and table.key is None:
        return
    for number, row in enumerate(rng.sample(rows, len(rows) // 8), 1):
        yield row | ({table.key: max(each[table.key] for each in rows) + number} if table.key else {})


def _parents_first(schema: Schema) -> list[str]:
    order: list[str] = []
    while len(order) < len(schema.tables):
        for name, table in schema.tables.items():
            if name not in order and all(parent in order for parent, _ in table.references.values()):
                order.append(name)
    return order


def shuffled_copy(source: Path, target: Path, seed: int) -> Path:
    """Write the same rows in another order, into tables without keys: so no key decides the order of a scan."""
    rng, schema = random.Random(seed), Schema.read(source)
    with closing(connect(source)) as old, closing(sqlite3.connect(target)) as new:
        for table in schema.tables.values():
            columns = ", ".join(f'"{column.name}" {column.declared}' for column in table.columns.values())
            new.execute(f'CREATE TABLE "{table.name}" ({columns})')
            rows = old.execute(f'SELECT * FROM "{table.name}"').fetchall()
            rng.shuffle(rows)
            places = ", ".join("?" * len(table.columns))
            new.executemany(f'INSERT INTO "{table.name}" VALUES ({places})', rows)
        new.commit()
    return target


# The plain judge


def connect(path: Path) -> sqlite3.Connection:
    """Open a database to read from it."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)


class Result(NamedTuple):
    """What a statement returned: rows, or why there are none."""

    rows: tuple[Row, ...] = ()
    error: str = ""
    late: bool = False


@lru_cache(maxsize=200_000)
def run(path: Path, sql: str, reverse: bool = False, seconds: float = 2.0) -> Result:
    """Run one statement; what takes longer than `seconds` or returns too much is `late`: nothing is known about it."""
    with closing(connect(path)) as base:
        deadline = time.monotonic() + seconds
        base.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
        if reverse:
            base.execute("PRAGMA reverse_unordered_selects = ON")
        try:
            rows = tuple(base.execute(sql).fetchmany(MAX_ROWS + 1))
        except (sqlite3.Error, sqlite3.Warning) as error:
            return Result(error=str(error), late="interrupted" in str(error))
    return Result(late=True) if len(rows) > MAX_ROWS else Result(rows)


def is_ordered(sql: str) -> bool:
    """Whether ORDER BY stands outside all parentheses. Good enough where no literal holds a parenthesis."""
    depth = 0
    for part in sql.upper().replace("(", " ( ").replace(")", " ) ").replace("ORDER BY", "ORDER_BY").split():
        depth += {"(": 1, ")": -1}.get(part, 0)
        if part == "ORDER_BY" and depth == 0:
            return True
    return False


def _cell(value: Any) -> tuple[str, Any]:
    """Type class and value: 1 is 1.0, '1' is not. The last digits of a float depend on the order of a sum."""
    if isinstance(value, int | float):
        return "number", float(f"{value:.12g}") if isinstance(value, float) else value
    return type(value).__name__, value


def same(one: Sequence[Row], other: Sequence[Row], ordered: bool, by_position: bool = True) -> bool:
    """Whether two results are the same bag of rows, or the same rows in order; else each row is a bag of cells."""
    left, right = ([tuple(map(_cell, row)) for row in rows] for rows in (one, other))
    if not by_position:
        left, right = ([tuple(sorted(row, key=repr)) for row in rows] for rows in (left, right))
    return left == right if ordered else Counter(left) == Counter(right)


def differs(gold: str, candidate: str, path: Path) -> bool | None:
    """Whether the two return something else on one instance; an error differs; `None`: one of them is too slow."""
    expected, got = run(path, gold), run(path, candidate)
    if expected.late or got.late:
        return None
    return bool(got.error) or not same(expected.rows, got.rows, is_ordered(gold))


LIMITED = re.compile(r"(ORDER BY(?:(?!ORDER BY).)*?)(\sLIMIT\s)", re.IGNORECASE | re.DOTALL)
TIES = 12


def is_determined(sql: str, path: Path, shuffled: Iterable[Path]) -> bool:
    """Whether a statement runs, and returns the same on the same rows stored and scanned in other orders.

    An index that SQLite makes for a join sorts by values, however they are stored: so ties before LIMIT are drawn, too.
    """
    first = run(path, sql)
    drawn = (LIMITED.sub(rf"\1, RANDOM() + {number}\2", sql) for number in range(TIES if LIMITED.search(sql) else 0))
    others = [run(path, sql, True), *(run(other, sql) for other in shuffled)]
    others += [result for each in drawn if not (result := run(path, each)).error]
    return not any(result.error or result.late for result in (first, *others)) and all(
        same(first.rows, result.rows, is_ordered(sql)) for result in others
    )


# The generous judge


def _plain(value: Any) -> Any:
    """A cell without what a lenient reading overlooks: a number where it can be read as one, else folded text."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        text = value.strip().casefold()
        try:
            number = float(text)
        except ValueError:
            return text
        return number if math.isfinite(number) else text
    return float(value)


def _decimals(number: float) -> int:
    return len(repr(number).partition(".")[2].rstrip("0")) if "e" not in repr(number) else 0


def _near(one: float, other: float) -> bool:
    """Equal to 6 significant digits, or to the decimals of the coarser; a whole number has none."""
    if math.isclose(one, other, rel_tol=1e-5):
        return True
    return abs(one - other) <= 0.5 * 10.0 ** -min(_decimals(one), _decimals(other)) * (1 + 1e-9)


@lru_cache(maxsize=500_000)
def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        if one.is_integer() and other.is_integer() and max(abs(one), abs(other)) < 1e5:
            return one == other or (min(abs(one), abs(other)) <= 1 and (one == 100 * other or other == 100 * one))
        return _near(one, other) or _near(one, 100 * other) or _near(100 * one, other)
    return bool(one == other)


def leniently_same(gold: Sequence[Row], candidate: Sequence[Row]) -> bool:
    """Whether some lenient reading takes the candidate's result for the gold's: every reading at once, at its widest.

    Order and duplicates do not count, the gold's columns may be any of the candidate's, and cells are the same where
    they are `_alike`. What has no rows, and one row of NULLs or zeros, may be meant as the same.
    """
    if all(len(rows) < 2 and all(cell in (None, 0) for row in rows for cell in row) for rows in (gold, candidate)):
        return True
    if not gold or not candidate:
        return False
    wide, wanted = len(candidate[0]), len(gold[0])
    golds = list(dict.fromkeys(tuple(map(_plain, row)) for row in gold))
    rows = list(dict.fromkeys(tuple(map(_plain, row)) for row in candidate))
    for chosen in itertools.permutations(range(wide), wanted):
        others = list(dict.fromkeys(tuple(row[place] for place in chosen) for row in rows))
        if _covered(golds, others) and _covered(others, golds):
            return True
    return False


def _covered(rows: list[Row], others: list[Row]) -> bool:
    exact = set(others)
    return all(row in exact or any(all(map(_alike, row, other)) for other in others) for row in rows)

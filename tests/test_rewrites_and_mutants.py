"""What the verdicts promise, measured: no rewrite of a gold is called wrong, and mutants that differ are caught.

Both are judged by `instances.py` first, which knows nothing of the package. The tables are printed: `pytest -rP`.
"""

import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pytest
from datasets import Dataset
from instances import (
    DEMO,
    GEOQUERY,
    Gold,
    Schema,
    connect,
    demo_golds,
    differs,
    geoquery_golds,
    is_determined,
    is_ordered,
    leniently_same,
    make_instances,
    run,
    same,
    shuffled_copy,
)
from mutants import mutants
from rewrites import ADDED, PERMUTED, rewrites

from t2s_pref import verify_rejected
from t2s_pref.verdicts import AMBIGUOUS, GOLD_USABLE, VERDICTS, WRONG, WRONG_RESULT

MOST = 50  # of a kind that are verified
SHUFFLES = 6


class Case(NamedTuple):
    """One rewrite or mutant."""

    gold: Gold
    kind: str
    sql: str


class Judged(NamedTuple):
    """A case, and what the package says."""

    case: Case
    verdict: str
    detail: str
    gold_verdict: str


class Bench:
    """Golds with several instances of their databases, and what is made of them."""

    def __init__(self, golds: list[Gold], databases: Path, folder: Path) -> None:
        self.folder = folder / "databases"
        self.instances = make_instances(databases, self.folder)
        # Harsher ones, where results say little: they are for the rewrites alone, not for the package.
        nulls = make_instances(databases, folder / "nulls", seeds=(4,), keep=0.5, nulls=0.5)
        empty = make_instances(databases, folder / "empty", seeds=(5,), keep=0)
        self.harsh = {db_id: [nulls[db_id][1], empty[db_id][1]] for db_id in self.instances}
        self.shuffled = {
            path: [shuffled_copy(path, folder / f"{path.stem}-{seed}.sqlite", seed) for seed in range(SHUFFLES)]
            for paths in [*self.instances.values(), *self.harsh.values()]
            for path in paths
        }
        self.schemas = {db_id: Schema.read(paths[0]) for db_id, paths in self.instances.items()}
        self.golds = [
            gold for gold in golds if all(self.determined(gold.sql, path) for path in self.instances[gold.db_id])
        ]
        print(f"{len(golds)} distinct golds; {len(golds) - len(self.golds)} left out: they fail, or ties decide them")

    @cached_property
    def rewrites(self) -> list[Case]:
        return self._cases(rewrites)

    @cached_property
    def mutants(self) -> list[Case]:
        return self._cases(mutants)

    def _cases(self, make: Callable[[str, Schema], Iterable[tuple[str, str]]]) -> list[Case]:
        return [Case(gold, *made) for gold in self.golds for made in make(gold.sql, self.schemas[gold.db_id])]

    def determined(self, sql: str, path: Path) -> bool:
        return is_determined(sql, path, self.shuffled[path])

    def results(self, case: Case) -> list[tuple[Path, bool | None]]:
        """For each instance whether the case returns something else there than its gold."""
        return [(path, differs(case.gold.sql, case.sql, path)) for path in self.instances[case.gold.db_id]]

    def clearly_differs(self, case: Case) -> bool:
        """Whether no lenient reading on some instance, and no other order of its rows, makes it the gold's result."""
        for path, different in self.results(case):
            expected, got = run(path, case.gold.sql), run(path, case.sql)
            if not different:
                continue
            if got.error or (not leniently_same(expected.rows, got.rows) and self.determined(case.sql, path)):
                return True
        return False


def some(cases: list[Case], most: int = MOST) -> list[Case]:
    """Up to `most` of each kind, the same ones every time."""
    rng = random.Random(0)
    kinds: dict[str, list[Case]] = {}
    for case in cases:
        kinds.setdefault(case.kind, []).append(case)
    return [case for of_kind in kinds.values() for case in rng.sample(of_kind, min(most, len(of_kind)))]


def verify(
    cases: list[Case], bench: Bench, cache_dir: Path, databases: dict[str, list[str]] | None = None
) -> list[Judged]:
    """What the package says about each case, a row for each gold."""
    rows: dict[Gold, list[Case]] = {}
    for case in cases:
        rows.setdefault(case.gold, []).append(case)
    dataset = Dataset.from_dict(
        {
            "output": [gold.sql for gold in rows],
            "db_id": [gold.db_id for gold in rows],
            "rejected": [[case.sql for case in row] for row in rows.values()],
        }
    )
    verified = verify_rejected(dataset, databases=databases or bench.folder, cache_dir=cache_dir)
    return [
        Judged(case, verdict, detail, row["gold_verdict"])
        for row, row_cases in zip(verified, rows.values(), strict=True)
        for case, verdict, detail in zip(row_cases, row["verdict"], row["verdict_detail"], strict=True)
    ]


def print_table(title: str, counts: dict[str, Counter[str]]) -> None:
    """Print one line a kind, and the sum."""
    names = sorted({name for counter in counts.values() for name in counter})
    print(f"\n{title:26}" + "".join(f"{name:>18}" for name in ["all", *names]))
    for kind, counter in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        print(f"{kind:26}" + "".join(f"{count:18}" for count in [counter.total(), *(counter[name] for name in names)]))


def by_kind(judged: Iterable[Judged]) -> dict[str, Counter[str]]:
    """How many of each kind have which verdict."""
    counts: dict[str, Counter[str]] = {}
    for each in judged:
        counts.setdefault(each.case.kind, Counter())[each.verdict] += 1
    return counts


NEEDS_GEOQUERY = pytest.mark.skipif(not GEOQUERY.is_dir(), reason=f"GeoQuery is not at {GEOQUERY}")


@pytest.fixture(scope="module", params=["demo", pytest.param("geoquery", marks=[pytest.mark.slow, NEEDS_GEOQUERY])])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "demo":
        return Bench(demo_golds(), DEMO / "databases", folder)
    return Bench(geoquery_golds(), GEOQUERY / "databases", folder)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench([], DEMO / "databases", tmp_path_factory.mktemp("instances"))


@pytest.fixture(scope="module")
def judged_mutants(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> list[Judged]:
    """The verdicts on mutants; of rows whose gold proves nothing there are none."""
    judged = verify(some(bench.mutants), bench, tmp_path_factory.mktemp("cache"))
    usable = [each for each in judged if each.gold_verdict in GOLD_USABLE]
    assert len(usable) > 0.95 * len(judged)
    return usable


def returns_the_same(case: Case, path: Path) -> bool | None:
    """By the plain judge; for columns in another order or twice, as those kinds promise."""
    expected, got = run(path, case.gold.sql), run(path, case.sql)
    if expected.late or got.late:
        return None
    rows = [row[:-1] for row in got.rows] if case.kind == ADDED else got.rows
    return not got.error and same(expected.rows, rows, is_ordered(case.gold.sql), case.kind != PERMUTED)


def test_every_rewrite_returns_what_its_gold_returns_on_every_instance(bench):
    found = {}
    for case in bench.rewrites:
        harsh = [path for path in bench.harsh[case.gold.db_id] if bench.determined(case.gold.sql, path)]
        for path in bench.instances[case.gold.db_id] + harsh:
            found[case, path] = returns_the_same(case, path)
    assert not [pair for pair, right in found.items() if right is False]
    assert sum(right is None for right in found.values()) <= 0.001 * len(found)  # too slow to tell
    counts = Counter(case.kind for case in bench.rewrites)
    print_table("rewrites made", {kind: Counter(golds=count) for kind, count in counts.most_common()})
    assert sum(count >= 30 for count in counts.values()) >= 10


def test_no_rewrite_of_a_gold_is_called_wrong(bench, tmp_path):
    judged = verify(some(bench.rewrites), bench, tmp_path / "cache")
    counts = by_kind(judged)
    print_table("verdicts on rewrites", counts)
    assert [each for each in judged if each.verdict in WRONG] == []
    assert sum(counter.total() >= 30 for counter in counts.values()) >= 10
    assert {each.verdict for each in judged} <= set(VERDICTS)


@pytest.mark.parametrize("place", [0, 1], ids=["half of all values NULL", "no rows at all"])
def test_no_rewrite_is_called_wrong_where_the_data_say_little(bench, place, tmp_path):
    harsh = {db_id: [str(paths[place])] for db_id, paths in bench.harsh.items()}
    judged = verify(some(bench.rewrites), bench, tmp_path / "cache", harsh)
    print_table("verdicts on rewrites", by_kind(judged))
    assert [each for each in judged if each.verdict in WRONG] == []
    assert sum(each.gold_verdict in GOLD_USABLE for each in judged) > 0.9 * len(judged)


def test_another_order_of_the_columns_or_one_more_is_ambiguous(bench, tmp_path):
    cases = [case for case in bench.rewrites if case.kind in (PERMUTED, ADDED)]
    judged = verify([case for case in some(cases) if any(found for _, found in bench.results(case))], bench, tmp_path)
    assert {each.verdict for each in judged if each.gold_verdict in GOLD_USABLE} == {AMBIGUOUS}


def test_mutants_that_return_something_else_are_caught(bench, judged_mutants):
    differing = [each for each in judged_mutants if any(different for _, different in bench.results(each.case))]
    caught = [each for each in differing if each.verdict in WRONG]
    missed = [each for each in differing if each.verdict not in WRONG]
    print_table("mutants that differ", by_kind(differing))
    for (kind, verdict, detail), count in Counter(
        (each.case.kind, each.verdict, each.detail) for each in missed
    ).most_common():
        print(f"{count:5}  {kind:24}{verdict:16}{detail}")
    clear = [each for each in differing if bench.clearly_differs(each.case)]
    overlooked = [each for each in clear if each.verdict not in WRONG]
    print(f"{len(judged_mutants)} mutants, {len(differing)} differ, {len(caught)} of them caught")
    print(f"{len(clear)} differ in every reading, {len(clear) - len(overlooked)} of them caught", *overlooked, sep="\n")
    assert len({each.case.kind for each in differing}) >= 10
    assert len(caught) >= 0.9 * len(differing)
    ran = [each for each in differing if each.verdict not in set(WRONG) - {WRONG_RESULT}]
    by_result = sum(each.verdict == WRONG_RESULT for each in ran)
    print(f"{len(ran)} of those that differ run, {by_result} of them are {WRONG_RESULT}")
    assert by_result >= 0.9 * len(ran)
    assert len(overlooked) <= 0.01 * len(clear)


def test_no_mutant_that_returns_the_same_everywhere_is_called_wrong(bench, judged_mutants):
    harmless = [each for each in judged_mutants if all(different is False for _, different in bench.results(each.case))]
    print_table("mutants that are the same", by_kind(harmless))
    assert harmless
    assert [each for each in harmless if each.verdict in WRONG] == []


def test_rewrites_and_mutants_are_the_same_every_time(demo):
    gold = "SELECT name FROM author WHERE country = 'Norway' AND birth_year < 1941"
    for make in (rewrites, mutants):
        assert list(make(gold, demo.schemas["library"])) == list(make(gold, demo.schemas["library"]))


def test_instances_have_other_rows_and_the_same_constraints(demo):
    for paths in demo.instances.values():
        assert len(paths) >= 3
        tables = Schema.read(paths[0]).tables
        contents = []
        for path in paths:
            assert Schema.read(path).tables == tables
            with closing(connect(path)) as base:
                assert base.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
                assert not base.execute("PRAGMA foreign_key_check").fetchall()
                contents.append([base.execute(f'SELECT * FROM "{table}"').fetchall() for table in tables])
        for number, content in enumerate(contents):
            assert all(content)
            assert not any(content == other for other in contents[:number])


def test_a_tie_before_limit_is_noticed(tmp_path):
    path = tmp_path / "ties.sqlite"
    with closing(sqlite3.connect(path)) as base:
        base.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, x INTEGER)")
        base.executemany("INSERT INTO t (x) VALUES (?)", [(1,), (2,), (2,)])
        base.commit()
    shuffled = [shuffled_copy(path, tmp_path / f"{seed}.sqlite", seed) for seed in range(SHUFFLES)]
    assert not is_determined("SELECT id FROM t ORDER BY x DESC LIMIT 1", path, shuffled)
    assert not is_determined("SELECT id FROM t LIMIT 2", path, shuffled)
    assert is_determined("SELECT id FROM t ORDER BY x LIMIT 1", path, shuffled)
    assert is_determined("SELECT x FROM t ORDER BY x DESC LIMIT 1", path, shuffled)
    assert is_determined("SELECT id FROM t", path, shuffled)


@pytest.mark.parametrize(
    ("gold", "candidate"),
    [
        ([(1,), (1,), (2,)], [(2,), (1,)]),
        ([(1, "a")], [("a", 1)]),
        ([("a",)], [(5, "a")]),
        ([(1.0000001,)], [(1.0,)]),
        ([(3.14159,)], [(3.14,)]),
        ([("12",)], [(12,)]),
        ([(" Abc",)], [("abc",)]),
        ([(None,)], [("",)]),
        ([(0.25,)], [(25.0,)]),
        ([(0.25, " Abc", None)], [("", 7, "abc", 25)]),
        ([], []),
    ],
)
def test_the_generous_judge_takes_each_lenient_reading(gold, candidate):
    assert leniently_same(gold, candidate)


@pytest.mark.parametrize(
    ("gold", "candidate"),
    [
        ([(1,)], [(2,)]),
        ([(1, 2)], [(1,)]),
        ([(1,), (2,)], [(1,)]),
        ([(1, "a"), (2, "b")], [(1, "b"), (2, "a")]),
        ([("a",)], []),
        ([(2,)], [(200,)]),
        ([(1981,)], [(1980,)]),
    ],
)
def test_the_generous_judge_still_tells_results_apart(gold, candidate):
    assert not leniently_same(gold, candidate)

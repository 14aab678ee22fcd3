"""How many queries a second the sandbox runs and compares, against Python's own sqlite3 without any of it.

python benchmarks/execution.py [--golds 1500] [--candidates 4] [--workers 2] [--repeats 3]

Small queries on the bundled databases; all ways alternate in one run, and the median is shown. Counted are golds, their
second runs in the opposite order and candidates; the baselines run the same statements.
"""

import argparse
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from statistics import median

from datasets import Dataset, disable_progress_bars

from t2s_pref import demo_files, verify_rejected
from t2s_pref.pool import Candidate, Gold, Job, WorkerPool

LIBRARY = f"{demo_files().databases}/library/library.sqlite"
SPAWNED = 40  # queries of the baseline that starts a process for each


def statements(golds: int, candidates: int) -> list[tuple[str, list[str]]]:
    """Golds with their candidates, all different, some equal in their results, some not."""
    return [
        (
            f"SELECT title, pages FROM book WHERE pages > {number % 400} AND book_id <> {number}",
            [
                f"SELECT title, pages FROM book WHERE NOT pages <= {number % 400 + (other % 2)} AND book_id <> {number}"
                f" AND {other} = {other}"
                for other in range(candidates)
            ],
        )
        for number in range(golds)
    ]


def in_process(work: list[tuple[str, list[str]]]) -> int:
    """Python's sqlite3: no sandbox, no comparison."""
    count = 0
    with closing(sqlite3.connect(LIBRARY)) as connection:
        for gold, candidates in work:
            for sql in (gold, gold, *candidates):
                connection.execute(sql).fetchall()
                count += 1
    return count


def sandboxed(work: list[tuple[str, list[str]]], workers: int) -> int:
    """The worker pool: sandbox, deadlines, comparison."""

    def task(gold: str, candidates: list[str]):
        return (yield Job(LIBRARY, (Gold(gold),), tuple(map(Candidate, candidates))))

    with WorkerPool(workers) as pool:
        return sum(2 + len(outcome.candidates) for _, outcome in pool.run(task(*each) for each in work))


def spawned(work: list[tuple[str, list[str]]]) -> int:
    """A process for each query, as sandboxes often have it."""
    code = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute(sys.argv[2]).fetchall()"
    for gold, _ in work[:SPAWNED]:
        subprocess.run([sys.executable, "-I", "-S", "-c", code, LIBRARY, gold], check=True)
    return min(SPAWNED, len(work))


def verified(work: list[tuple[str, list[str]]], workers: int) -> int:
    """verify_rejected on a fresh cache: reading SQL, distances, the store and the Arrow file included."""
    golds, rejects = zip(*work, strict=True)
    rows = Dataset.from_dict({"output": golds, "rejected": rejects})
    with tempfile.TemporaryDirectory() as cache:
        found = verify_rejected(rows, LIBRARY, workers=workers, cache_dir=cache)
        return sum(2 + len(verdicts) for verdicts in found["verdict"])


def respawn() -> float:
    """Seconds that a killed process costs: its end seen, a new one ready, the gold run again."""

    def task():
        outcome = yield Job(LIBRARY, (Gold("SELECT 1"),))
        start = time.perf_counter()
        os.kill(pool._idle[0].process.pid, signal.SIGKILL)
        outcome = yield Job(LIBRARY, (Gold("SELECT 1"),))
        return time.perf_counter() - start, outcome

    with WorkerPool(1) as pool:
        ((_, (seconds, _)),) = pool.run([task()])
    return seconds


def main() -> None:
    """Print queries a second and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golds", type=int, default=1500)
    parser.add_argument("--candidates", type=int, default=4, help="for each gold (default: 4)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    disable_progress_bars()
    work = statements(arguments.golds, arguments.candidates)
    ways: dict[str, Callable[[], int]] = {
        "sqlite3 in process, nothing compared": lambda: in_process(work),
        "a process for each query": lambda: spawned(work),
        f"worker pool, {arguments.workers} workers, compared": lambda: sandboxed(work, arguments.workers),
        f"verify_rejected, {arguments.workers} workers, whole": lambda: verified(work, arguments.workers),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            count = way()
            speeds[name].append(count / (time.perf_counter() - start))
    baseline = median(speeds["sqlite3 in process, nothing compared"])
    print(f"{'':42}{'queries a second':>18}{'ratio':>8}")
    for name, found in speeds.items():
        print(f"{name:42}{median(found):>18,.0f}{median(found) / baseline:>8.2f}")
    print(f"a killed process costs {1000 * median(respawn() for _ in range(5)):.0f} ms")


if __name__ == "__main__":
    main()

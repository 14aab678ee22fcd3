"""What a worker process does with a job: runs the golds, then the candidates, and says what each of them is.

Standard library only, like all that SQL on files is run with. The engine is the caller's: SQLite in
[`t2s_pref.worker`], a server in `t2s_pref.servers`.
"""

import contextlib
import json
import re
import resource
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from t2s_pref import verdicts
from t2s_pref.compare import Rows, bird_equal, compare, digest, spider_equal, strict_equal

OPEN_FILES = 64
OPEN_DATABASES = 8
CHUNK = 256  # rows fetched between two looks at their size
CELL = 64  # bytes that any cell takes in memory, whatever is in it

MIXED_SECONDS = 1.0  # that all queries over mixed tables together may take at least
GOLD_MARGIN = 10  # a candidate may take as many times as long as its gold


class Limits(NamedTuple):
    """The largest result that is looked at: rows, and bytes of its cells."""

    rows: int
    size: int

    def check(self, rows: int, size: int) -> None:
        """Raise [`Failed`] where a result has grown larger than that."""
        if rows > self.rows:
            raise Failed(verdicts.RESOURCE, f"more than {self.rows} rows")
        if size > self.size:
            raise Failed(verdicts.RESOURCE, f"more than {self.size} bytes of rows")


def size_of(row: tuple) -> int:
    """Bytes that the cells of a row take in memory, roughly."""
    return sum(CELL + (len(cell) if type(cell) in (str, bytes) else 0) for cell in row)


class Failed(Exception):  # noqa: N818 - an outcome, not a mistake of this program
    """A statement gave no result: the verdict on it, and the engine's message."""

    def __init__(self, verdict: str, message: str) -> None:
        super().__init__(message)
        self.verdict, self.message = verdict, " ".join(message.split())[:500]


_TOGETHER = re.compile(r"\b(?:group_concat|string_agg|array_agg|json\w*_(?:group_|agg|array|object)\w*)\b", re.I)
_NOT_RUN = {
    verdicts.TIMEOUT: verdicts.GOLD_TIMEOUT,
    verdicts.NO_DATABASE: verdicts.NO_DATABASE,
    # golds crash no server: who lost the connection was somebody else, and may find it again
    **dict.fromkeys((verdicts.UNREACHABLE, verdicts.WORKER_DIED), verdicts.UNREACHABLE),
}
_ENDS = (verdicts.TIMEOUT, verdicts.UNREACHABLE)  # what a probe that fails says of more than itself
_TOO_MANY = re.compile(r"more than \d+ (rows|bytes)")
_BEST_FIRST = (verdicts.EQUIVALENT, verdicts.WEAK, verdicts.AMBIGUOUS, verdicts.WRONG_RESULT)


class Judge:
    """Runs the golds of a job, then its candidates, and says what each of them is."""

    def __init__(self, database: Any, job: dict[str, Any]) -> None:
        self.database, self.job = database, job
        self.golds: list[tuple[Rows, bool]] = []
        self.suspect = ""  # what in a gold looks misspelt
        self.slowest = 0.0

    @property
    def allowed(self) -> float:
        """Seconds that a candidate may take."""
        return max(self.job["timeout"], GOLD_MARGIN * self.slowest)

    def gold(self, gold: dict[str, Any]) -> dict[str, Any]:
        """Run an accepted gold; a verdict that is not usable ends the job, for it condemns nobody."""
        deadline = time.monotonic() + self.job["gold_timeout"]
        try:
            start = time.monotonic()
            rows = self.database.run(gold["sql"], self.job["gold_timeout"])
            self.slowest = max(self.slowest, time.monotonic() - start)
            self.golds.append((rows, gold["ordered"]))
            verdict, detail = (verdicts.GOLD_OK if rows.rows else verdicts.GOLD_EMPTY), ""
            why = gold["volatile"] or self.database.unsteady(gold["sql"]) or self._undetermined(rows, gold, deadline)
            if why:
                verdict, detail = verdicts.GOLD_NONDETERMINISTIC, why
            elif text := self.database.string_columns(gold["sql"]):
                detail = self.suspect = f'"{text}" is no column: read as a string'
            return {"verdict": verdict, "detail": detail, "digest": digest(rows)}
        except Failed as failed:
            verdict = _NOT_RUN.get(failed.verdict, verdicts.GOLD_ERROR)
            if failed.verdict == verdicts.RESOURCE and _TOO_MANY.match(failed.message):
                verdict = verdicts.GOLD_TRUNCATED
            return {"verdict": verdict, "detail": failed.message, "digest": ""}

    def _undetermined(self, rows: Rows, gold: dict[str, Any], deadline: float) -> str:
        """Why the data do not determine the gold's result, or the empty string where they do."""
        if gold["proven"]:
            return ""
        for again, is_reversed in self._again(gold, deadline):
            verdict, reason = compare(rows, again, False)
            if verdict not in (verdicts.EQUIVALENT, verdicts.WEAK) and reason != "rounding":
                unordered, tied = "rows without an order", "ties, or columns outside of GROUP BY,"
                return f"{unordered if is_reversed else tied} decide the result"
        return ""

    def _again(self, statement: dict[str, Any], deadline: float) -> Iterator[tuple[Rows, bool]]:
        """Other results that a statement may have as well, and whether its unordered rows were reversed for that.

        A timeout on the way is raised; anything else that fails is our probe, not the statement, and says nothing.
        Neither do those over mixed tables that take much longer than the statement.
        """
        start = time.monotonic()
        tries = [(statement["sql"], True, 0)]
        # probes come in pairs, of the same random numbers
        tries += [(probe, False, number // 2) for number, probe in enumerate(statement["probes"])]
        for sql, reverse, seed in tries:
            try:
                yield self.database.run(sql, max(0.0, deadline - time.monotonic()), reverse, seed), reverse
            except Failed as failed:
                if failed.verdict in _ENDS:
                    raise
        now = time.monotonic()
        deadline = min(deadline, now + max(MIXED_SECONDS, GOLD_MARGIN * (now - start) / len(tries)))
        for number, probe in enumerate(statement["mixed"]):
            try:
                yield self.database.run(probe, max(0.0, deadline - time.monotonic()), False, number // 2), False
            except Failed as failed:
                if failed.verdict == verdicts.UNREACHABLE:
                    raise
                return

    def candidate(self, candidate: dict[str, Any]) -> dict[str, Any]:
        """Run a candidate and compare it with every accepted gold."""
        deadline = time.monotonic() + self.allowed
        scores = {"strict": False, "bird": False, "spider": False}
        try:
            rows = self.database.run(candidate["sql"], self.allowed)
            verdict, detail = self._against_golds(rows)
            if self.job["scores"]:
                scores = {
                    "strict": any(strict_equal(gold, rows, ordered) for gold, ordered in self.golds),
                    "bird": any(bird_equal(gold, rows) for gold, _ in self.golds),
                    "spider": any(spider_equal(gold, rows, ordered) for gold, ordered in self.golds),
                }
            if verdict == verdicts.WRONG_RESULT and (why := self._doubt(candidate, rows, deadline)):
                verdict, detail = verdicts.AMBIGUOUS, why
            if verdict == verdicts.WRONG_RESULT and self.suspect:
                verdict, detail = verdicts.AMBIGUOUS, f"the gold's {self.suspect}"
            return {"verdict": verdict, "detail": detail, "digest": digest(rows), **scores}
        except Failed as failed:
            verdict = verdicts.RESOURCE if failed.verdict == verdicts.NO_DATABASE else failed.verdict
            return {"verdict": verdict, "detail": failed.message, "digest": "", **scores}

    def _against_golds(self, rows: Rows) -> tuple[str, str]:
        found = [compare(gold, rows, ordered) for gold, ordered in self.golds]
        return min(found, key=lambda each: _BEST_FIRST.index(each[0]))

    def _doubt(self, candidate: dict[str, Any], rows: Rows, deadline: float) -> str:
        """Why a candidate whose result differs may return the gold's another time; a timeout on the way is raised."""
        if why := candidate["volatile"] or self.database.unsteady(candidate["sql"]):
            return why
        # nobody asks for an order in which parts are put together: that it differs is enough there
        strict = _TOGETHER.search(candidate["sql"]) is None
        for again, _ in self._again(candidate, deadline):
            if self._against_golds(again)[0] != verdicts.WRONG_RESULT or not (
                strict or strict_equal(rows, again, False)
            ):
                return "the data do not determine its result"
        return ""


# The loop


def serve(open_database: Callable[[str, Limits], Any], memory: int) -> None:
    """Confine this process, then answer jobs from standard input until it ends."""
    _confine(memory)
    databases: OrderedDict[tuple[str, Limits], Any] = OrderedDict()
    _say({"ready": True})
    for line in sys.stdin.buffer:
        job = json.loads(line)
        _say(*_answers(open_database, databases, job), {"done": True})


def _answers(open_database: Callable[[str, Limits], Any], databases: OrderedDict, job: dict[str, Any]) -> tuple:
    """Say all answers to a job but the last, and return that: it goes out together with the end."""
    place = (job["database"], Limits(*job["limits"]))
    try:
        if place not in databases:
            databases[place] = open_database(*place)
            if len(databases) > OPEN_DATABASES:
                databases.popitem(last=False)[1].close()
        databases.move_to_end(place)
    except Failed as failed:
        return ({"gold": 0, "verdict": failed.verdict, "detail": failed.message, "digest": ""},)
    judge = Judge(databases[place], job)
    steps: list[tuple[str, int, Callable, dict[str, Any]]] = []
    steps += [("gold", place, judge.gold, gold) for place, gold in enumerate(job["golds"])]
    steps += [("candidate", place, judge.candidate, candidate) for place, candidate in enumerate(job["candidates"])]
    for step, (kind, number, look, statement) in enumerate(steps):
        answer = {kind: number, **look(statement), "version": databases[place].version}
        if kind == "gold" and answer["verdict"] not in verdicts.GOLD_USABLE:
            return (answer,)
        if step == len(steps) - 1:
            return (answer,)
        _say({**answer, "next": judge.allowed if steps[step + 1][0] == "candidate" else job["gold_timeout"]})
    return ()


def _say(*messages: dict[str, Any]) -> None:
    sys.stdout.buffer.write(b"".join(json.dumps(message).encode() + b"\n" for message in messages))
    sys.stdout.buffer.flush()


def _confine(memory: int) -> None:
    with contextlib.suppress(OSError, AttributeError, ImportError):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no worker outlives its parent
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for limit, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (value, value))

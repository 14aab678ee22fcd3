"""The parent's side of the sandbox: persistent worker processes, a watch on each, and a kill where an answer is late.

A task is a generator that yields jobs and is sent an outcome for each; many tasks run at once, each job on the first
idle worker. The parent holds the clock: a worker that has not answered half a second after its deadline is killed and
replaced, and the job goes on behind the statement that cost it.

Not covered: Windows (pipes in `selectors`, and the limits that a worker sets itself).
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from t2s_pref import verdicts
from t2s_pref.errors import UserError, one_line
from t2s_pref.settings import GOLD_TIMEOUT, TIMEOUT

Result = TypeVar("Result")

GRACE = 0.5  # seconds after a deadline until the process is killed
LONGEST = 86_400  # seconds that a statement may be given
END = 5.0  # seconds to wait for a process that was killed
START = 60.0  # seconds for a process to say that it is ready, imports included
LONGEST_ANSWER = 1 << 20
READ = 1 << 16
MOST_WORKERS = 16  # each may take most of a gigabyte
KEPT = ("LD_LIBRARY_PATH",)  # of the environment: some Pythons do not start without


@dataclass(frozen=True)
class Bounds:
    """What a statement may take.

    Args:
        timeout: seconds of a candidate, comparison included; ten times its gold's time where that is more.
        gold_timeout: seconds of a gold, the proof that the data determine its result included.
        rows: the largest result that is looked at.
        size: its largest size in bytes.
    """

    timeout: float = TIMEOUT
    gold_timeout: float = GOLD_TIMEOUT
    rows: int = 100_000
    size: int = 64 << 20

    def __post_init__(self) -> None:
        for name in ("timeout", "gold_timeout", "rows", "size"):
            if not isinstance(getattr(self, name), int | float) or not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be above 0.")
        for name in ("timeout", "gold_timeout"):
            if getattr(self, name) > LONGEST:
                raise UserError(f"{name} is {getattr(self, name)!r} seconds; it must be at most {LONGEST}, a day.")


class Gold(NamedTuple):
    """An accepted gold: its SQL, whether its top level is ordered, and how to find out whether the data determine it.

    `volatile` says why it may change with time or chance. A gold that is `proven` is not probed again.
    """

    sql: str
    ordered: bool = False
    probes: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()
    volatile: str = ""
    proven: bool = False


class Candidate(NamedTuple):
    """SQL that nobody trusts, and how to find out whether the data determine its result."""

    sql: str
    probes: tuple[str, ...] = ()
    mixed: tuple[str, ...] = ()
    volatile: str = ""


class Job(NamedTuple):
    """Candidates to be judged by golds on one database: a path, or a URL where a server holds it."""

    database: str
    golds: tuple[Gold, ...]
    candidates: tuple[Candidate, ...] = ()
    server: bool = False
    scores: bool = False


@dataclass
class Outcome:
    """What became of a job: an answer for each gold that was run, and one for each candidate.

    The candidates' answers are absent where a gold is not usable. `version` names the engine.
    """

    golds: list[dict[str, Any]] = field(default_factory=list)
    candidates: list[dict[str, Any]] = field(default_factory=list)
    version: str = ""


Task = Generator[Job, Outcome, Result]


class _Worker:
    """One process and its pipes."""

    def __init__(self, server: bool) -> None:
        self.server = server
        # SQL on a file runs in this process: nothing but the standard library, nothing of the user's environment. SQL
        # on a server runs there, and its driver may want both. A session of its own: Ctrl-C in a terminal is for the
        # parent, which then stops all of them.
        script, flags = ("servers.py", ["-P"]) if server else ("worker.py", ["-I", "-S"])
        self.command = [sys.executable, *flags, str(Path(__file__).with_name(script))]
        self.environment = None if server else {name: os.environ[name] for name in KEPT if name in os.environ}
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=self.environment,
            cwd="/",
            start_new_session=True,
            bufsize=0,
        )
        for pipe in (self.process.stdin, self.process.stdout):
            os.set_blocking(pipe.fileno(), False)
        self.unsent, self.unread = memoryview(b""), b""
        self.seconds = 0.0  # that it has for an answer once all is sent
        self.ready = False
        self.deadline = time.monotonic() + START

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in a read from a dead disk, it ends with that
            self.process.wait(END)

    def send(self, message: dict[str, Any], seconds: float) -> None:
        # a lone surrogate has no UTF-8, and JSON's escapes do have it
        self.unsent = memoryview(json.dumps(message).encode() + b"\n")
        self.seconds = seconds
        self.write()

    def write(self) -> None:
        """Send as much as the pipe takes; the time for an answer begins when all is sent."""
        try:
            self.unsent = self.unsent[os.write(self.process.stdin.fileno(), self.unsent) :]
        except BlockingIOError:
            return
        except OSError:  # it has died: reading will tell
            self.unsent = memoryview(b"")
        self.deadline = time.monotonic() + (START if self.unsent else self.seconds + GRACE)

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """The whole answers that have come, and whether the process still lives."""
        try:
            data = os.read(self.process.stdout.fileno(), READ)
        except BlockingIOError:
            return [], True
        *lines, self.unread = (self.unread + data).split(b"\n")
        try:
            return [json.loads(line) for line in lines], bool(data) and len(self.unread) < LONGEST_ANSWER
        except ValueError:  # whoever writes this is not our worker any more
            return [], False


@dataclass
class _Running:
    """A job under way: whose it is, and how far it has come."""

    task: int
    job: Job
    outcome: Outcome
    died_at: int = -1  # how many answers there were when a process died under it
    repeated: int = 0  # how many golds the present process has answered for

    def message(self, bounds: Bounds) -> dict[str, Any]:
        done = len(self.outcome.candidates)
        proven = len(self.outcome.golds) == len(self.job.golds)
        return {
            "database": self.job.database,
            "golds": [{**gold._asdict(), "proven": gold.proven or proven} for gold in self.job.golds],
            "candidates": [candidate._asdict() for candidate in self.job.candidates[done:]],
            "timeout": bounds.timeout,
            "gold_timeout": bounds.gold_timeout,
            "limits": [bounds.rows, bounds.size],
            "scores": self.job.scores,
        }


class WorkerPool:
    """Worker processes that judge SQL; a context manager that leaves no process behind.

    Args:
        workers: how many processes; by default one a core that this process may use, 16 at most.
        bounds: what a statement may take.
    """

    def __init__(self, workers: int | None = None, bounds: Bounds | None = None) -> None:
        check_workers(workers)
        self.size = workers or min(MOST_WORKERS, _cores())
        self.bounds = bounds or Bounds()
        self._idle: list[_Worker] = []
        self._busy: dict[_Worker, _Running] = {}
        self._pending: deque[_Running] = deque()
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill all processes and wait for their end."""
        for worker in [*self._busy, *self._idle]:
            worker.stop()
        self._busy.clear()
        self._idle.clear()
        self._pending.clear()
        self._selector.close()

    def run(self, tasks: Iterable[Task[Result]]) -> Iterator[tuple[int, Result]]:
        """Drive all tasks to their ends; yields (number of the task, what it returned) in the order of ending."""
        fresh = enumerate(tasks)
        unfinished: dict[int, Task[Result]] = {}

        def advance(number: int, outcome: Outcome | None) -> Iterator[tuple[int, Result]]:
            try:
                job = unfinished[number].send(outcome)
            except StopIteration as end:
                del unfinished[number]
                yield number, end.value
            else:
                self._pending.append(_Running(number, job, Outcome()))

        try:
            while True:
                # no more tasks are begun than there are workers to serve them: what is open is held in memory
                while len(self._pending) + len(self._busy) < self.size and (begun := next(fresh, None)):
                    number, unfinished[number] = begun
                    yield from advance(number, None)
                while self._pending and len(self._busy) < self.size:
                    self._assign(self._pending.popleft())
                if not self._busy:
                    return
                for running in self._watch():
                    yield from advance(running.task, running.outcome)
        finally:
            # a caller that stops early leaves workers in the middle of jobs that nobody waits for
            self._pending.clear()
            for worker in list(self._busy):
                self._release(worker)
                worker.stop()

    def _assign(self, running: _Running) -> None:
        """Give a job to an idle process of its kind, or to a new one in the place of one of another kind."""
        worker = None
        while self._idle and worker is None:
            worker = self._idle.pop()
            if worker.server is not running.job.server or worker.process.poll() is not None:
                worker.stop()
                worker = None
        with _uninterrupted():  # or a process that nobody knows of would be left
            worker = worker or _Worker(running.job.server)
            self._busy[worker] = running
        running.repeated = 0
        self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        if worker.ready:
            self._send(worker)

    def _send(self, worker: _Worker) -> None:
        worker.send(self._busy[worker].message(self.bounds), self.bounds.gold_timeout)
        if worker.unsent:
            self._selector.register(worker.process.stdin, selectors.EVENT_WRITE, worker)

    def _release(self, worker: _Worker) -> _Running:
        for pipe in (worker.process.stdin, worker.process.stdout):
            with contextlib.suppress(KeyError):
                self._selector.unregister(pipe)
        return self._busy.pop(worker)

    def _watch(self) -> list[_Running]:
        """Wait for answers or for the next deadline; returns the jobs that have come to their end."""
        ended: list[_Running] = []
        patience = min(worker.deadline for worker in self._busy) - time.monotonic()
        for key, events in self._selector.select(max(0.0, patience)):
            worker: _Worker = key.data
            if events & selectors.EVENT_WRITE and worker in self._busy:
                worker.write()
                if not worker.unsent:
                    self._selector.unregister(worker.process.stdin)
            elif worker in self._busy:
                answers, alive = worker.read()
                for answer in answers:
                    if running := self._take(worker, answer):
                        ended.append(running)
                if not alive and worker in self._busy:
                    ended += self._lose(worker, verdicts.WORKER_DIED)
        # What has been read counts: an answer that lay there while this process was kept from looking is in time.
        now = time.monotonic()
        for worker in [worker for worker in self._busy if worker.deadline < now]:
            ended += self._lose(worker, verdicts.TIMEOUT)
        return ended

    def _take(self, worker: _Worker, answer: dict[str, Any]) -> _Running | None:
        """Note an answer; returns the job where this was its end."""
        running = self._busy[worker]
        golds, candidates = running.outcome.golds, running.outcome.candidates
        if "ready" in answer:
            worker.ready = True
            self._send(worker)
        elif "done" in answer:
            self._idle.append(worker)
            return self._release(worker)
        else:
            if answer["verdict"] == verdicts.UNREACHABLE:
                raise UserError(f"A database cannot be reached: {answer['detail']}; what was found is kept.")
            running.outcome.version = answer.pop("version", "")
            worker.deadline = time.monotonic() + answer.pop("next", 0.0) + GRACE
            if answer.pop("candidate", None) is not None:
                candidates.append(answer)
            elif (place := answer.pop("gold")) >= len(golds):
                golds.append(answer)
                running.repeated = place + 1
            else:
                running.repeated = place + 1
                if answer["verdict"] not in verdicts.GOLD_USABLE:
                    # a candidate cost the first process, and in a second one the gold that ran before does not
                    doubt = _lost(verdicts.UNVERIFIED, f"its gold could not be run again: {answer['detail']}")
                    candidates += [doubt] * (len(running.job.candidates) - len(candidates))
        return None

    def _lose(self, worker: _Worker, verdict: str) -> list[_Running]:
        """Stop a process that is dead or late; its job goes on behind the statement that it was at, or has ended."""
        running = self._release(worker)
        worker.stop()
        if not worker.ready:
            raise UserError(f"A process to run SQL in could not be started: {_why(worker)}")
        late = verdict == verdicts.TIMEOUT
        answers = len(running.outcome.golds) + len(running.outcome.candidates)
        if not late and running.died_at != answers:
            # The system may have killed it, for want of memory: only who costs a second process is to blame.
            running.died_at = answers
            self._pending.appendleft(running)
            return []
        detail = "stopped after its time limit" if late else "the process that ran it died"
        if len(running.outcome.golds) < len(running.job.golds):
            running.outcome.golds.append(_lost(verdicts.GOLD_TIMEOUT if late else verdicts.GOLD_ERROR, detail))
            return [running]
        if running.repeated < len(running.job.golds):  # it was at a gold that had run before, at no candidate
            verdict, detail = verdicts.UNVERIFIED, f"its gold could not be run again: {detail}"
        if len(running.outcome.candidates) < len(running.job.candidates):
            running.outcome.candidates.append(_lost(verdict, detail))
        if len(running.outcome.candidates) == len(running.job.candidates):
            return [running]
        self._pending.appendleft(running)
        return []


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back for a moment."""
    held: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)


def check_workers(workers: int | None) -> None:
    """Raise [`UserError`] where this is no number of processes."""
    if workers is not None and not (isinstance(workers, int) and workers > 0):
        raise UserError(f"workers is {workers!r}; it must be 1 or more.")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _lost(verdict: str, detail: str) -> dict[str, Any]:
    return {"verdict": verdict, "detail": detail, "digest": "", "strict": False, "bird": False, "spider": False}


def _why(worker: _Worker) -> str:
    """What Python says where a worker does not start: the last line of a second try with an open stderr."""
    try:
        done = subprocess.run(
            worker.command, input=b"", capture_output=True, timeout=START, env=worker.environment, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return one_line(error)
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"

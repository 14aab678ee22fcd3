"""What the pool of workers promises its user: no process is left behind, whatever happens, and the run goes on."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from t2s_pref import UserError, demo_files, verdicts
from t2s_pref.pool import Bounds, Candidate, Gold, Job, WorkerPool

LIBRARY = f"{demo_files().databases}/library/library.sqlite"
SLOW = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"


# nothing but a kill ends it
INSTR = "SELECT instr(hex(zeroblob(4000000)), hex(zeroblob(2000000)) || '1')"


def job(*candidates, gold="SELECT count(*) FROM book"):
    return Job(LIBRARY, (Gold(gold),), tuple(map(Candidate, candidates)))


def task(*jobs):
    found = []
    for each in jobs:
        outcome = yield each
        found.append([answer["verdict"] for answer in outcome.candidates])
    return found


def children(pid=None):
    """Process ids of the workers that a process has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            command = (status.parent / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue
        if parent == (pid or os.getpid()) and b"worker.py" in command:
            found.append(int(status.parent.name))
    return found


def eventually(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def gone(pids):
    def alive(pid):
        try:
            return b"worker.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False

    return eventually(lambda: not any(map(alive, pids)))


# -- the tasks -------------------------------------------------------------------------------------------------------


def test_each_task_gets_the_outcomes_of_its_own_jobs_in_order():
    gold = "SELECT 7"
    tasks = [
        task(job(f"SELECT {number}", gold=gold), job("SELECT nope", "SELECT 7.0", gold=gold)) for number in range(20)
    ]
    with WorkerPool(2) as pool:
        found = dict(pool.run(tasks))
        assert len(children()) == 2
    assert sorted(found) == list(range(20))
    assert [number for number in found if found[number][0] == ["equivalent"]] == [7]
    assert all(later == ["missing_column", "equivalent"] for _, later in found.values())
    assert children() == []


def test_a_task_may_ask_for_nothing_and_an_empty_run_ends():
    with WorkerPool(1) as pool:
        assert list(pool.run([task()])) == [(0, [])]
        assert list(pool.run([])) == []
        assert children() == []


def test_what_a_task_or_its_user_raises_leaves_no_process():
    def failing():
        yield job("SELECT 1")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), WorkerPool(2) as pool:
        list(pool.run([failing(), task(job(SLOW))]))
    assert children() == []
    with WorkerPool(2) as pool:
        next(pool.run([task(job("SELECT 1")), task(job(SLOW))]))  # and no more: a statement is still running
    assert children() == []


def test_a_run_that_is_left_early_does_not_disturb_the_next():
    with WorkerPool(2) as pool:
        for _ in pool.run([task(job("SELECT 1")), task(job(SLOW)), task(job(SLOW))]):
            break
        assert list(pool.run([task(job("SELECT 1"))])) == [(0, [["wrong_result"]])]


def test_texts_of_megabytes_pass_both_ways():
    text = "SELECT '" + "x" * 900_000 + "'"
    with WorkerPool(1) as pool:
        ((_, (found,)),) = pool.run([task(job(*[text] * 5, gold=text))])
    assert found == ["equivalent"] * 5


def test_a_large_job_is_sent_before_its_time_begins_and_a_busy_parent_costs_nobody():
    large = task(job(*["SELECT 'é" + "x" * 900_000 + "'"] * 40))

    def slow():
        yield job("SELECT 1")
        time.sleep(3)
        return []

    with WorkerPool(2, Bounds(gold_timeout=2, timeout=2)) as pool:
        found = dict(pool.run([large, slow()]))
    assert found[0] == [["wrong_result"] * 40]


def test_a_candidate_is_not_blamed_for_what_happens_to_the_gold_before_it():
    gold = f"{SLOW.replace('FROM c)', 'FROM c WHERE x < 2000000)')}"
    stopped = []

    def stop_the_second():
        assert eventually(lambda: bool(children()))
        first = children()
        assert eventually(lambda: bool(set(children()) - set(first)))
        (other,) = set(children()) - set(first)
        time.sleep(0.25)
        stopped.append(other)
        os.kill(other, signal.SIGSTOP)

    thread = threading.Thread(target=stop_the_second)
    thread.start()
    with WorkerPool(1, Bounds(timeout=1, gold_timeout=6)) as pool:
        ((_, (found,)),) = pool.run([task(job(INSTR, "SELECT 2000000", gold=gold))])
    thread.join()
    assert found[0] == verdicts.TIMEOUT
    assert found[1] == (verdicts.UNVERIFIED if stopped else "equivalent")


def test_an_interrupt_at_any_moment_leaves_no_process():
    code = f"""
import os, random, signal, sys, threading, time
from t2s_pref.pool import Candidate, Gold, Job, WorkerPool
def task():
    yield Job({LIBRARY!r}, (Gold("SELECT 1"),), (Candidate("SELECT 2"),))
for number in range(60):
    try:
        threading.Timer(random.Random(number).uniform(0.0002, 0.008), os.kill, (os.getpid(), signal.SIGINT)).start()
        with WorkerPool(2) as pool:
            for _ in range(9):
                list(pool.run([task(), task()]))
            time.sleep(1)
    except KeyboardInterrupt:
        pass
print("go", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"go\n"
        assert eventually(lambda: not children(process.pid), 5)
        process.stdin.close()


def test_two_pools_work_at_once_and_in_threads():
    results = []

    def work():
        with WorkerPool(1) as pool:
            results.append(dict(pool.run([task(job("SELECT 1", "SELECT nope"))])))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [{0: [["wrong_result", "missing_column"]]}] * 3


@pytest.mark.parametrize("bad", [{"timeout": 0}, {"gold_timeout": -1.0}, {"rows": 0}, {"size": float("nan")}])
def test_bounds_must_be_positive(bad):
    with pytest.raises(UserError, match="must be above 0"):
        Bounds(**bad)


def test_a_pool_needs_a_worker():
    with pytest.raises(UserError, match="workers is 0"):
        WorkerPool(0)


# -- processes that die or hang --------------------------------------------------------------------------------------


def disturbed(act):
    """The outcome of a job whose process is acted upon while it runs the second of three candidates."""
    with WorkerPool(1, Bounds(timeout=2)) as pool:

        def disturb():
            assert eventually(lambda: bool(children()))
            time.sleep(0.5)
            act(children()[0])

        thread = threading.Thread(target=disturb)
        thread.start()
        ((_, (found,)),) = pool.run([task(job("SELECT 1", SLOW, "SELECT nope"))])
        thread.join()
    assert children() == []
    return found


def test_a_statement_whose_worker_is_killed_is_run_again():
    found = disturbed(lambda pid: os.kill(pid, signal.SIGKILL))
    assert found == ["wrong_result", verdicts.TIMEOUT, "missing_column"]


def test_a_statement_that_costs_two_workers_is_to_blame_and_no_other():
    def kill_twice(pid):
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: bool(set(children()) - {pid}))
        time.sleep(0.5)
        (other,) = set(children()) - {pid}
        os.kill(other, signal.SIGKILL)

    assert disturbed(kill_twice) == ["wrong_result", verdicts.WORKER_DIED, "missing_column"]


def test_a_worker_that_is_stopped_is_replaced_at_its_deadline():
    found = disturbed(lambda pid: os.kill(pid, signal.SIGSTOP))
    assert found == ["wrong_result", verdicts.TIMEOUT, "missing_column"]


def test_an_idle_worker_that_died_is_replaced():
    with WorkerPool(1) as pool:
        list(pool.run([task(job("SELECT 1"))]))
        (pid,) = children()
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
        assert list(pool.run([task(job("SELECT 1"))])) == [(0, [["wrong_result"]])]


def test_a_python_that_does_not_start_is_an_error_that_says_why(tmp_path, monkeypatch):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'no room on this machine' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(UserError, match="could not be started: no room on this machine"), WorkerPool(1) as pool:
        list(pool.run([task(job("SELECT 1"))]))


# -- the world outside -----------------------------------------------------------------------------------------------

RUN = f"""
import sys
from datasets import Dataset
from t2s_pref import verify_rejected
slow = {SLOW!r}
rows = Dataset.from_dict({{"output": [f"SELECT {{n}}" for n in range(8)], "rejected": [[slow]] * 8}})
print("go", flush=True)
verify_rejected(rows, {LIBRARY!r}, timeout=60, workers=2, cache_dir=sys.argv[1])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_interrupted_or_killed_leaves_no_process(number, tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"go\n"
        assert eventually(lambda: len(children(process.pid)) == 2)
        workers = children(process.pid)
        time.sleep(0.2)
        process.send_signal(number)
        process.communicate(timeout=30)
        assert process.returncode != 0
    assert gone(workers)


def test_a_worker_sees_nothing_of_the_users_environment_and_may_write_nothing(monkeypatch):
    monkeypatch.setenv("T2S_PREF_SECRET", "s3cret")
    seen = []

    def looking():
        yield job("SELECT 1")
        (pid,) = children()
        home = Path(f"/proc/{pid}")
        limits = {line[:25].strip(): line[25:].split()[0] for line in (home / "limits").read_text().splitlines()}
        seen.append(((home / "environ").read_bytes(), limits, os.readlink(home / "cwd")))

    with WorkerPool(1) as pool:
        list(pool.run([looking()]))
    ((environment, limits, folder),) = seen
    assert b"SECRET" not in environment
    assert limits["Max file size"] == "0"
    assert int(limits["Max address space"]) <= 1 << 30
    assert limits["Max core file size"] == "0"
    assert folder == "/"


def test_it_works_after_torch_has_used_its_threads():
    code = f"""
import torch
torch.set_num_threads(4)
(torch.ones(700, 700) @ torch.ones(700, 700)).sum()
from datasets import Dataset
from t2s_pref import verify_rejected
import tempfile
rows = Dataset.from_dict({{"output": ["SELECT 1"], "rejected": [["SELECT 2"]]}})
print(verify_rejected(rows, {LIBRARY!r}, cache_dir=tempfile.mkdtemp())["verdict"][:])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert "[['wrong_result']]" in done.stdout, done.stderr


def test_it_works_in_jupyter(tmp_path):
    code = f"""
from datasets import Dataset
from t2s_pref import verify_rejected
rows = Dataset.from_dict({{"output": ["SELECT 1"], "rejected": [["SELECT 2", "SELECT 1.0"]]}})
verify_rejected(rows, {LIBRARY!r}, cache_dir={str(tmp_path)!r})["verdict"][:]
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=120).execute()
    assert notebook.cells[0].outputs[-1]["data"]["text/plain"] == "[['wrong_result', 'equivalent']]"

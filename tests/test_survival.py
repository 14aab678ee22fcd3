"""Runs that are killed, interrupted or shared by several processes end with the file of one that was not."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from t2s_pref import demo_files
from t2s_pref.store import SampleStore

MODEL, TRAIN = demo_files().model, demo_files().train
ROWS = 150  # three pages of the plan: something to kill in, something to share


def command(folder, output):
    arguments = ["--base-model", MODEL, "--sft-data", TRAIN, "--max-samples", ROWS, "--max-new-tokens", 64]
    arguments += ["--output", folder / output, "--cache-dir", folder / "cache"]
    return ["-m", "t2s_pref", "reject", *map(str, arguments)]


def start(arguments, **kwargs):
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


def samples(folder):
    """How many candidates are safe in the store."""
    count = 0
    for store in (folder / "cache" / "samples").glob("*"):
        with SampleStore(store) as opened:
            count += len(opened)
    return count


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The file of a run in one process that nothing disturbs."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = start(command(folder, "dpo.json"))
    errors = done.communicate()[1]
    assert done.returncode == 0, errors
    return (folder / "dpo.json").read_bytes()


def kill_and_go_on(tmp_path, uninterrupted, kills, chance):
    kept = [0]
    for _ in range(kills):
        process = start(command(tmp_path, "dpo.json"))
        # sometimes in the middle of sampling, sometimes before it or while results are written
        time.sleep(chance.uniform(0, 1))
        deadline = time.monotonic() + 60
        while samples(tmp_path) <= kept[-1] and process.poll() is None and time.monotonic() < deadline:
            time.sleep(chance.uniform(0.01, 0.4))
        process.kill()  # SIGKILL; nothing where it has ended by itself meanwhile
        process.communicate()
        kept.append(samples(tmp_path))
        assert kept[-1] >= kept[-2]  # nothing that was safe is lost
        output = tmp_path / "dpo.json"
        assert not output.exists() or output.read_bytes() == uninterrupted
        if process.returncode == 0:
            break
    assert len(set(kept)) > 2, kept  # they were killed while they sampled
    last = start(command(tmp_path, "dpo.json"))
    errors = last.communicate()[1]
    assert last.returncode == 0, errors
    assert (tmp_path / "dpo.json").read_bytes() == uninterrupted
    assert samples(tmp_path) == 3 * ROWS
    assert not list((tmp_path / "cache" / "rejected").glob(".draft*"))


def test_a_killed_run_loses_nothing_that_was_sampled_and_ends_with_the_same_file(tmp_path, uninterrupted):
    kill_and_go_on(tmp_path, uninterrupted, kills=3, chance=random.Random(1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_again_and_again_ends_with_the_same_file(tmp_path, uninterrupted, seed):
    kill_and_go_on(tmp_path, uninterrupted, kills=8, chance=random.Random(seed))


def test_ctrl_c_ends_with_code_130_and_says_how_to_go_on(tmp_path, uninterrupted):
    process = start(command(tmp_path, "dpo.json"))
    while not samples(tmp_path):
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "run the same command again" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert not (tmp_path / "dpo.json").exists()
    assert subprocess.run([sys.executable, *command(tmp_path, "dpo.json")], capture_output=True).returncode == 0
    assert (tmp_path / "dpo.json").read_bytes() == uninterrupted


def launch(folder, output, *how):
    # without GPUs, accelerate starts several processes only where it is told that there are several devices
    launcher = ["-m", "accelerate.commands.launch", *(how or ["--multi_gpu"]), "--num_processes", "2"]
    return start([*launcher, *command(folder, output)], env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_ranks_write_the_file_of_one_process(tmp_path, uninterrupted):
    process = launch(tmp_path, "dpo.json")
    shown, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    assert (tmp_path / "dpo.json").read_bytes() == uninterrupted
    assert shown.count("wrote ") == 1
    segments = list((tmp_path / "cache" / "samples").glob("*/segment*"))
    assert len(segments) == 2  # both sampled
    assert samples(tmp_path) == 3 * ROWS


@pytest.mark.slow
def test_two_ranks_find_what_one_process_cached(tmp_path, uninterrupted):
    assert subprocess.run([sys.executable, *command(tmp_path, "a.json")], capture_output=True).returncode == 0
    process = launch(tmp_path, "b.json")
    errors = process.communicate(timeout=280)[1]
    assert process.returncode == 0, errors
    assert (tmp_path / "b.json").read_bytes() == uninterrupted
    assert len(list((tmp_path / "cache" / "samples").glob("*/segment*"))) == 1


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs, accelerate starts all that are asked for")
def test_where_accelerate_starts_one_process_of_two_that_is_said_and_the_file_is_the_same(tmp_path, uninterrupted):
    process = launch(tmp_path, "dpo.json", "--cpu")
    errors = process.communicate(timeout=280)[1]
    assert process.returncode == 0, errors
    assert "accelerate started a single process" in errors
    assert "--multi_gpu" in errors
    assert (tmp_path / "dpo.json").read_bytes() == uninterrupted


def test_a_mistake_under_accelerate_ends_all_ranks_with_a_non_zero_code(tmp_path):
    process = launch(tmp_path, "dpo.csv")
    errors = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    assert ".jsonl" in errors


@pytest.mark.slow
def test_a_killed_rank_ends_the_launch_and_the_next_one_goes_on(tmp_path, uninterrupted):
    process = launch(tmp_path, "dpo.json")
    while samples(tmp_path) < 60:
        time.sleep(0.2)
        assert process.poll() is None
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not (tmp_path / "dpo.json").exists()
    process = launch(tmp_path, "dpo.json")
    errors = process.communicate(timeout=280)[1]
    assert process.returncode == 0, errors
    assert (tmp_path / "dpo.json").read_bytes() == uninterrupted


def test_a_full_disk_is_told_in_one_line_and_the_next_run_goes_on(tmp_path, uninterrupted):
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); "
        "from t2s_pref.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = command(tmp_path, "dpo.json")[2:]
    done = subprocess.run([sys.executable, "-c", limited, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr.splitlines()[-1]
    assert subprocess.run([sys.executable, *command(tmp_path, "dpo.json")], capture_output=True).returncode == 0
    assert (tmp_path / "dpo.json").read_bytes() == uninterrupted

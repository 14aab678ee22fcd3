"""What is kept is found again, and never by half: damage, kills and races cost a computation, not a wrong result."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from datasets import Dataset, Features, Value

import t2s_pref
from t2s_pref import UserError
from t2s_pref.cache import cache_folder, cached_map, find

REPOSITORY = Path(t2s_pref.__file__).parents[1]
FEATURES = Features({"number": Value("int64"), "square": Value("int64")})


def rows(count=5):
    return Dataset.from_dict({"number": list(range(count))})


def squares(cache_dir, dataset=None, key=None, *, calls=None, **map_kwargs):
    """The mapped dataset; `calls` counts how often the function was called."""

    def square(batch):
        if calls is not None:
            calls.append(len(batch["number"]))
        return {"square": [number**2 for number in batch["number"]]}

    return cached_map(
        rows() if dataset is None else dataset,
        square,
        step="squares",
        key=key or {"version": 1},
        features=FEATURES,
        cache_dir=cache_dir,
        map_kwargs=map_kwargs,
    )


def kept(cache_dir):
    (file,) = (cache_dir / "squares").glob("*.arrow")
    return file


# -- found again -----------------------------------------------------------------------------------------------------


def test_a_result_is_computed_once_and_then_found(cache_dir):
    calls = []
    first = squares(cache_dir, calls=calls)
    second = squares(cache_dir, calls=calls)
    assert len(calls) == 1
    assert second[:] == first[:] == {"number": [0, 1, 2, 3, 4], "square": [0, 1, 4, 9, 16]}
    assert second._fingerprint == first._fingerprint
    assert second.features == first.features == FEATURES


def test_other_rows_another_key_or_step_is_another_result(cache_dir):
    results = [
        squares(cache_dir),
        squares(cache_dir, key={"version": 2}),
        squares(cache_dir, rows(6)),
        squares(cache_dir, rows().select([4, 3, 2, 1, 0])),
    ]
    assert len({result._fingerprint for result in results}) == 4
    assert results[3]["square"][:] == [16, 9, 4, 1, 0]
    assert find(rows(), "cubes", {"version": 1}, cache_dir) is None
    assert find(rows(), "squares", {"version": 1}, cache_dir) is not None


def test_the_order_in_which_a_key_is_written_does_not_matter(cache_dir):
    first = squares(cache_dir, key={"a": 1, "b": {"c": 2, "d": 3}})
    assert squares(cache_dir, key={"b": {"d": 3, "c": 2}, "a": 1})._fingerprint == first._fingerprint


def test_a_result_found_keeps_its_split_and_what_is_said_of_its_source(cache_dir):
    source = Dataset.from_dict({"number": [1]}, split="train")
    source.info.description = "where it is from"
    for result in (squares(cache_dir, source), squares(cache_dir, source)):
        assert result.split == "train"
        assert result.info.description == "where it is from"


def test_a_result_is_still_readable_when_another_run_computes_it_again(cache_dir):
    first = squares(cache_dir)
    squares(cache_dir, load_from_cache_file=False)
    kept(cache_dir).unlink()
    assert first["square"][:] == [0, 1, 4, 9, 16]


def test_results_and_samples_lie_under_hf_home_unless_a_folder_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(None) == Path(os.environ["HF_HOME"]) / "t2s_pref"
    assert cache_folder("~/kept") == tmp_path / "kept"


def test_nothing_but_the_result_and_its_seal_is_left_in_the_folder(cache_dir):
    squares(cache_dir)
    names = sorted(path.suffix for path in (cache_dir / "squares").iterdir())
    assert names == [".arrow", ".json"]


def test_an_error_in_the_function_leaves_nothing_behind(cache_dir):
    with pytest.raises(KeyError):
        squares(cache_dir, Dataset.from_dict({"other": [1]}))
    assert list((cache_dir / "squares").iterdir()) == []


# -- damage ----------------------------------------------------------------------------------------------------------


def cut(file):
    file.write_bytes(file.read_bytes()[:-40])


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def seal_of(file):
    return file.with_suffix(".json")


DAMAGE = {
    "a file that was cut": cut,
    "a file of no bytes": lambda file: file.write_bytes(b""),
    "a flipped bit": flip,
    "a longer file": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "a file that is gone": Path.unlink,
    "another result's file in its place": lambda file: shutil.copy(other_result(file), file),
    "a seal that is gone": lambda file: seal_of(file).unlink(),
    "a seal that was cut": lambda file: seal_of(file).write_text('{"size": 1'),
    "an empty seal": lambda file: seal_of(file).write_text(""),
    "a seal of another shape": lambda file: seal_of(file).write_text("[1, 2]"),
    "a seal without its hash": lambda file: seal_of(file).write_text(json.dumps({"size": file.stat().st_size})),
    "a seal that is not text": lambda file: seal_of(file).write_bytes(b"\xff\xfe"),
    "another result's seal": lambda file: shutil.copy(seal_of(other_result(file)), seal_of(file)),
}
SILENT = {"a file that is gone", "a seal that is gone"}  # that is what a result never made looks like


def other_result(file):
    squares(file.parents[1], rows().select([4, 3, 2, 1, 0]))
    return next(other for other in file.parent.glob("*.arrow") if other != file)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_result_is_computed_again_with_a_warning(cache_dir, caplog, damage):
    calls = []
    good = squares(cache_dir, calls=calls)[:]
    DAMAGE[damage](kept(cache_dir))
    caplog.clear()
    assert squares(cache_dir, calls=calls)[:] == good
    assert len(calls) == 2
    assert ("is damaged; computing it again" in caplog.text) == (damage not in SILENT)
    assert squares(cache_dir, calls=calls)[:] == good
    assert len(calls) == 2


# -- kills and races -------------------------------------------------------------------------------------------------

SLOW = """
    import sys, time
    from pathlib import Path
    from datasets import Dataset, Features, Value
    from t2s_pref.cache import cached_map

    folder, me, wait_for = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

    def square(batch):
        if batch["number"][0] == 2000:
            (folder / f"{me} is in the middle").touch()
            while not (folder / wait_for).exists():
                time.sleep(0.01)
        return {"square": [number**2 for number in batch["number"]]}

    result = cached_map(
        Dataset.from_dict({"number": list(range(3000))}),
        square,
        step="squares",
        key={"version": 1},
        features=Features({"number": Value("int64"), "square": Value("int64")}),
        cache_dir=folder / "cache",
        map_kwargs={"writer_batch_size": 100},
    )
    assert result["square"][:] == [number**2 for number in range(3000)]
    print(result._fingerprint)
"""


@pytest.fixture
def start(tmp_path):
    """Start a process that computes 3000 squares and waits in their middle; kill those that are left at the end."""
    started = []

    def run(name, wait_for):
        command = [sys.executable, "-c", textwrap.dedent(SLOW), str(tmp_path), name, wait_for]
        started.append(subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_until_in_the_middle(folder, *names):
    end = time.monotonic() + 60
    while not all((folder / f"{name} is in the middle").exists() for name in names):
        assert time.monotonic() < end
        time.sleep(0.01)


def drafts(cache_dir):
    return list((cache_dir / "squares").glob(".draft-*"))


def test_a_killed_computation_leaves_nothing_that_is_found_and_its_draft_goes_with_the_next(tmp_path, start, caplog):
    cache_dir = tmp_path / "cache"
    process = start("victim", "never")
    wait_until_in_the_middle(tmp_path, "victim")
    (draft,) = drafts(cache_dir)
    assert list(draft.rglob("*"))  # it had begun to write
    squares(cache_dir, rows(7))
    assert drafts(cache_dir) == [draft]  # what is being written is left alone
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert find(rows(3000), "squares", {"version": 1}, cache_dir) is None
    calls = []
    assert squares(cache_dir, rows(3000), calls=calls)["square"][:] == [number**2 for number in range(3000)]
    assert sum(calls) == 3000
    assert drafts(cache_dir) == []
    assert "damaged" not in caplog.text


def test_the_draft_of_a_process_on_another_machine_is_left_alone(cache_dir):
    draft = cache_dir / "squares" / ".draft-another-machine-1-abcdefgh"
    draft.mkdir(parents=True)
    squares(cache_dir)
    assert draft.exists()


def test_two_processes_that_compute_the_same_at_once_both_get_it_right(tmp_path, start, caplog):
    cache_dir = tmp_path / "cache"
    both = [start("one", "go"), start("other", "go")]
    wait_until_in_the_middle(tmp_path, "one", "other")
    assert len(drafts(cache_dir)) == 2
    (tmp_path / "go").touch()
    told = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert told[0] == told[1]
    calls = []
    assert squares(cache_dir, rows(3000), calls=calls)._fingerprint == told[0].strip()
    assert calls == []
    assert "damaged" not in caplog.text
    assert len(list((cache_dir / "squares").iterdir())) == 2


# -- arguments of map ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "refused",
    ["batched", "batch_size", "cache_file_name", "features", "fn_kwargs", "keep_in_memory", "new_fingerprint", "typo"],
)
def test_an_argument_of_map_that_would_break_the_result_is_refused_with_those_that_are_not(cache_dir, refused):
    with pytest.raises(UserError, match=rf"'{refused}' is not known here; .*'desc', 'load_from_cache_file'") as error:
        squares(cache_dir, **{refused: None})
    assert "\n" not in str(error.value)
    assert not cache_dir.exists()


def test_several_processes_are_refused_with_the_way_out(cache_dir):
    for number in (None, 1, 4):
        with pytest.raises(UserError, match="accelerate launch --num_processes"):
            squares(cache_dir, num_proc=number)

"""What sampling with databases promises: only proven rejects, as many as wanted, no token for what cannot be proven."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from datasets import Dataset, DatasetDict

from t2s_pref import (
    WRONG,
    SamplingSettings,
    TransformersEngine,
    UserError,
    demo_files,
    explode_rejected,
    generate_rejected,
    load_sft,
    summary,
    verify_rejected,
)
from t2s_pref.sql import normalize_sql
from t2s_pref.store import SampleStore

FILES = demo_files()
SETTINGS = SamplingSettings(num_rejects=2, max_new_tokens=64)
MOST = 6


@pytest.fixture(scope="module")
def few():
    return load_sft(FILES.train).select(range(30))


@pytest.fixture(scope="module")
def engine():
    return TransformersEngine(FILES.model, device="cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("adaptive")


def prove(rows, engine, cache, settings=SETTINGS, **kwargs):
    chosen = {"databases": FILES.databases, "max_candidates": MOST, "cache_dir": cache, **kwargs}
    return generate_rejected(rows, engine, settings, **chosen)


@pytest.fixture(scope="module")
def proven(few, engine, cache):
    return prove(few, engine, cache)


@pytest.fixture(scope="module")
def fixed(few, engine, cache):
    """All the candidates that a row may cost, sampled without a look at any."""
    settings = SamplingSettings(num_rejects=MOST, max_new_tokens=64)
    return verify_rejected(generate_rejected(few, engine, settings, cache_dir=cache), FILES.databases, cache_dir=cache)


def plain(dataset):
    return dataset.remove_columns("generation_seconds")[:]


def test_every_pair_is_proven_wrong_and_distinct_and_no_row_has_more_than_were_wanted(proven, cache):
    pairs = explode_rejected(proven, dedup="normalized", cache_dir=cache)
    assert len(pairs) > 10
    assert set(pairs["verdict"]) <= set(WRONG)
    texts = {}
    for pair in pairs:
        texts.setdefault(pair["source_index"], []).append(normalize_sql(pair["rejected"]))
    assert all(len(of) == len(set(of)) <= SETTINGS.num_rejects for of in texts.values())
    for row in proven:
        enough = len(texts.get(row["source_index"], [])) == SETTINGS.num_rejects
        assert enough or len(row["candidate_status"]) == MOST


def test_candidates_are_those_of_a_fixed_run_and_each_row_has_as_many_as_it_needs(proven, fixed):
    for row, other in zip(proven, fixed, strict=True):
        count = len(row["candidate_status"])
        assert SETTINGS.num_rejects <= count <= MOST
        assert row["candidate_status"] == other["candidate_status"][:count]
        assert row["rejected"] == other["rejected"][: len(row["rejected"])]
        assert row["verdict"] == other["verdict"][: len(row["verdict"])]


def test_it_finds_the_pairs_of_many_candidates_for_fewer_tokens(proven, fixed, cache):
    found = [
        explode_rejected(rows, dedup="normalized", max_per_row=SETTINGS.num_rejects, cache_dir=cache)
        for rows in (proven, fixed)
    ]
    assert found[0]["rejected"][:] == found[1]["rejected"][:]
    spent, other = (sum(map(sum, rows["generated_tokens"])) for rows in (proven, fixed))
    assert spent < other


def test_rows_that_the_model_masters_are_reported_and_not_padded(proven, cache):
    counts = summary(proven, dedup="normalized", cache_dir=cache)
    right = [row for row in proven if set(row["verdict"]) <= {"equivalent", "same_text", "same_ast"}]
    assert counts.mastered == len(right) > 3
    assert counts.rows_without_pair[("mastered",)] == len(right)
    assert counts.pairs + sum(counts.drops.values()) == counts.candidates
    assert "mastered: every candidate is right" in str(counts)


def test_a_row_whose_gold_proves_nothing_costs_no_token(few, engine, tmp_path):
    golds = ["SELECT nope", few[1]["output"], "SELECT name FROM sqlite_master LIMIT 1"]
    rows = few.select(range(3)).remove_columns("output").add_column("output", golds)
    found = prove(rows, engine, tmp_path)
    assert found["gold_verdict"][:] == ["gold_error", "ok", "gold_nondeterministic"]
    assert found["candidate_status"][0] == found["generated_tokens"][2] == found["verdict"][0] == []
    assert len(found["candidate_status"][1]) >= SETTINGS.num_rejects
    assert summary(found, cache_dir=tmp_path).rows_without_pair[("gold_error",)] == 1


def test_the_same_input_gives_the_same_output_in_any_order_of_the_rows(few, engine, proven, tmp_path):
    mixed = few.shuffle(seed=3)
    found = prove(mixed, engine, tmp_path, workers=1).sort("source_index")
    assert plain(found) == plain(proven)


def test_a_second_call_is_found_and_another_number_or_another_content_is_not(few, engine, proven, cache, tmp_path):
    again = prove(few, TransformersEngine(FILES.model, device="cpu"), cache)
    assert again._fingerprint == proven._fingerprint
    assert prove(few, engine, cache, max_candidates=MOST + 1)._fingerprint != proven._fingerprint
    assert prove(few, engine, cache, timeout=9)._fingerprint != proven._fingerprint


def test_a_prompt_that_does_not_fit_is_asked_for_once(few, engine, tmp_path):
    long = few.select(range(2)).map(lambda row, at: {"input": row["input"] * (1 + 99 * at)}, with_indices=True)
    found = prove(long, engine, tmp_path)
    assert found["candidate_status"][1] == ["prompt_too_long"] * SETTINGS.num_rejects
    assert set(found["candidate_status"][0]) == {"sampled"}


def test_greedy_decoding_has_one_candidate_to_give(few, engine, tmp_path):
    found = prove(few.select(range(4)), engine, tmp_path, SamplingSettings(temperature=0, max_new_tokens=64))
    assert [len(each) for each in found["candidate_status"]] == [1] * 4


def test_splits_and_empty_datasets_are_taken(few, engine, cache):
    found = prove(DatasetDict(train=few.select(range(2)), test=few.select([])), engine, cache)
    assert found["train"].column_names == found["test"].column_names
    assert len(found["test"]) == 0


def test_what_makes_no_sense_is_refused(few, engine, tmp_path):
    with pytest.raises(UserError, match="max_candidates is 1; it must be num_rejects"):
        prove(few, engine, tmp_path, max_candidates=1)
    with pytest.raises(UserError, match="it needs databases"):
        generate_rejected(few, engine, SETTINGS, max_candidates=4)
    with pytest.raises(UserError, match="is neither a file nor a folder"):
        prove(few, engine, tmp_path, databases=str(tmp_path / "none"))
    with pytest.raises(UserError, match="no column 'db_id'"):
        prove(few.remove_columns("db_id"), engine, tmp_path)
    with pytest.raises(UserError, match="Column 'instruction' not found"):
        prove(Dataset.from_dict({"a": [1]}), engine, tmp_path)


# -- processes -------------------------------------------------------------------------------------------------------


def command(folder):
    arguments = ["--base-model", FILES.model, "--sft-data", FILES.train, "--max-samples", 90, "--max-new-tokens", 64]
    arguments += ["--databases", FILES.databases, "--num-rejects", 2, "--max-candidates", 5, "--device", "cpu"]
    arguments += ["--output", folder / "dpo.json", "--cache-dir", folder / "cache"]
    return ["-m", "t2s_pref", "reject", *map(str, arguments)]


def workers():
    found = []
    for path in os.listdir("/proc"):
        if path.isdigit():
            try:
                with open(f"/proc/{path}/cmdline", "rb") as file:
                    if b"t2s_pref/worker.py" in file.read():
                        found.append(path)
            except OSError:
                pass
    return set(found)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    subprocess.run([sys.executable, *command(folder)], capture_output=True, check=True)
    return (folder / "dpo.json").read_bytes()


def known(folder):
    count = 0
    for kind in ("samples", "verdicts"):
        for store in (folder / "cache" / kind).glob("*"):
            with SampleStore(store) as opened:
                count += len(opened)
    return count


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_again_and_again_ends_with_the_same_file(number, undisturbed, tmp_path):
    chance, before = random.Random(int(number)), workers()
    seen = 0
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, *command(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            end = time.monotonic() + 60
            while known(tmp_path) <= seen and process.poll() is None and time.monotonic() < end:
                time.sleep(chance.uniform(0.05, 0.5))
            process.send_signal(number)
            process.wait()
        assert known(tmp_path) >= seen
        seen = known(tmp_path)
    done = subprocess.run([sys.executable, *command(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dpo.json").read_bytes() == undisturbed
    end = time.monotonic() + 20
    while workers() - before and time.monotonic() < end:
        time.sleep(0.1)
    assert not workers() - before


@pytest.mark.slow
def test_two_ranks_write_the_file_that_one_process_writes(undisturbed, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    before = workers()
    done = subprocess.run(
        [sys.executable, *launch, *command(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dpo.json").read_bytes() == undisturbed
    assert not workers() - before
    assert json.loads(undisturbed)

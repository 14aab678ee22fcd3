import json
import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.fingerprint import Hasher
from transformers import AutoModelForCausalLM, AutoTokenizer

from t2s_pref import (
    SamplingSettings,
    TransformersEngine,
    UserError,
    demo_files,
    explode_rejected,
    generate_rejected,
    load_sft,
    release_models,
)
from t2s_pref.plan import group_rows
from t2s_pref.prompts import messages
from t2s_pref.sampler import RejectSampler
from t2s_pref.store import SampleStore

SETTINGS = SamplingSettings(num_rejects=3, max_new_tokens=64, temperature=1.0, top_p=0.95)
MODEL = demo_files().model


class SmallBatches(TransformersEngine):
    """The real engine on a machine with room for little: a batch of one candidate or two."""

    def token_budget(self):
        return 300


def sampled(rows, cache_dir, settings=SETTINGS, engine=None, **kwargs):
    return generate_rejected(rows, engine or TransformersEngine(MODEL), settings, cache_dir=cache_dir, **kwargs)


def stored(cache_dir):
    """How many candidates lie in the stores under `cache_dir`."""
    count = 0
    for folder in (cache_dir / "samples").iterdir():
        with SampleStore(folder) as store:
            count += len(store)
    return count


def test_rejects_are_added_and_everything_else_stays_as_it_was(rows, cache_dir):
    before = rows[:]
    result = sampled(rows, cache_dir)
    assert rows[:] == before
    added = ["rejected", "candidate_status", "generated_tokens", "generation_seconds"]
    assert result.column_names == [*rows.column_names, *added]
    assert result.select_columns(rows.column_names)[:] == before
    assert all(len(statuses) == 3 for statuses in result["candidate_status"])
    assert all(
        r.count("sampled") == len(s) for r, s in zip(result["candidate_status"], result["rejected"], strict=True)
    )
    assert sum(map(len, result["rejected"])) > 2.9 * len(rows)
    assert all(sql.upper().startswith("SELECT") for row in result["rejected"] for sql in row)


def test_the_bundled_model_writes_real_sql_with_real_mistakes(rows, cache_dir):
    result = sampled(rows, cache_dir)
    rejects = [sql for row in result["rejected"] for sql in row]
    assert len(set(rejects)) > len(rejects) / 4
    same = sum(sql == row["output"] for row in result for sql in row["rejected"])
    assert 0 < same < len(rejects)


def test_rejects_do_not_depend_on_the_size_of_batches(rows, tmp_path):
    one = sampled(rows, tmp_path / "a")
    other = sampled(rows, tmp_path / "b", engine=SmallBatches(MODEL))
    assert one["rejected"][:] == other["rejected"][:]


def test_rejects_do_not_depend_on_the_order_of_rows(rows, tmp_path):
    straight = sampled(rows, tmp_path / "a")
    shuffled = sampled(rows.shuffle(seed=3), tmp_path / "b")
    assert dict(zip(straight["source_index"], straight["rejected"], strict=True)) == dict(
        zip(shuffled["source_index"], shuffled["rejected"], strict=True)
    )
    assert shuffled["source_index"][:] == rows.shuffle(seed=3)["source_index"][:]


def test_each_split_of_a_dict_is_sampled(rows, cache_dir):
    both = DatasetDict(train=rows.select(range(4)), test=rows.select(range(4, 6)))
    result = sampled(both, cache_dir)
    whole = sampled(rows.select(range(6)), cache_dir)
    assert result["train"]["rejected"][:] + result["test"]["rejected"][:] == whole["rejected"][:]


def test_without_a_source_index_the_position_seeds_a_row_and_that_is_said(rows, cache_dir, caplog):
    first = rows.select(range(4))
    result = sampled(first.remove_columns("source_index"), cache_dir)
    assert "source_index" in caplog.text
    assert result["rejected"][:] == sampled(first, cache_dir)["rejected"][:]


def test_the_result_chains_with_further_transforms(rows, cache_dir):
    result = sampled(rows, cache_dir).filter(lambda row: row["rejected"]).map(lambda row: {"n": len(row["rejected"])})
    halves = result.train_test_split(0.5, seed=1)
    pairs = explode_rejected(halves, cache_dir=cache_dir)
    assert set(pairs["train"]["source_index"]).isdisjoint(pairs["test"]["source_index"])


@pytest.mark.parametrize("how", ["torch", "numpy", "pandas"])
def test_a_dataset_with_a_format_gets_the_same_rejects(rows, cache_dir, how):
    few = rows.select(range(3))
    formatted = few.with_format(how, columns=["instruction"])
    assert sampled(formatted, cache_dir)["rejected"][:] == sampled(few, cache_dir)["rejected"][:]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda rows: IterableDataset.from_generator(lambda: iter(rows)), "materialise"),
        (lambda rows: rows.remove_columns("output"), "'output' not found"),
        (lambda rows: [{"instruction": "a"}], "load_sft"),
    ],
    ids=["iterable", "no gold", "a list"],
)
def test_what_cannot_be_sampled_is_refused_in_one_line_with_the_way_out(rows, cache_dir, wrong, message):
    with pytest.raises(UserError, match=message) as error:
        sampled(wrong(rows), cache_dir)
    assert "\n" not in str(error.value)


def test_num_proc_is_refused_with_the_way_out(rows, cache_dir):
    with pytest.raises(UserError, match="accelerate launch"):
        sampled(rows, cache_dir, num_proc=2)


def test_raw_answers_are_kept_where_asked(rows, cache_dir):
    result = sampled(rows.select(range(6)), cache_dir, keep_raw=True)
    assert all(len(answers) == 3 for answers in result["raw_answers"])
    assert "raw_answers" not in sampled(rows.select(range(6)), cache_dir).column_names
    pair = explode_rejected(result, cache_dir=cache_dir)[0]
    assert pair["rejected"] in pair["raw_answer"]


# -- length ----------------------------------------------------------------------------------------------------------


def test_a_candidate_that_reaches_the_length_cap_is_counted_and_never_a_reject(rows, cache_dir):
    result = sampled(rows, cache_dir, SamplingSettings(num_rejects=3, max_new_tokens=14, temperature=1.0))
    statuses = [status for row in result["candidate_status"] for status in row]
    assert {"truncated", "sampled"} == set(statuses)
    for row in result:
        for status, tokens in zip(row["candidate_status"], row["generated_tokens"], strict=True):
            assert tokens == 14 if status == "truncated" else tokens < 14
        assert len(row["rejected"]) == row["candidate_status"].count("sampled")


def test_a_prompt_that_does_not_fit_is_counted_and_never_cut(rows, cache_dir, short_context, caplog):
    long = rows.select(range(3)).map(
        lambda row, i: {"input": row["input"] + " and so on" * 400 * (i == 1)}, with_indices=True
    )
    result = sampled(long, cache_dir, engine=TransformersEngine(short_context))
    assert result["candidate_status"][1] == ["prompt_too_long"] * 3
    assert result["rejected"][1] == []
    assert result["rejected"][0] == sampled(rows.select(range(3)), cache_dir)["rejected"][0]


def test_the_answer_is_clamped_to_the_context_with_one_notice(rows, cache_dir, short_context, caplog):
    settings = SamplingSettings(num_rejects=1, max_new_tokens=4096)
    with caplog.at_level(logging.WARNING):
        sampled(rows, cache_dir, settings, engine=TransformersEngine(short_context))
    notices = [record for record in caplog.records if "clamped" in record.getMessage()]
    assert len(notices) == 1
    assert "400 tokens" in notices[0].getMessage()


@pytest.fixture(scope="session")
def short_context(tmp_path_factory):
    """The bundled model, said to have a context of 400 tokens."""
    folder = tmp_path_factory.mktemp("short") / "model"
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 400}))
    return str(folder)


def test_greedy_gives_one_candidate_with_a_notice(rows, cache_dir, caplog):
    result = sampled(rows.select(range(3)), cache_dir, SamplingSettings(temperature=0, max_new_tokens=64))
    assert [len(statuses) for statuses in result["candidate_status"]] == [1, 1, 1]
    assert "greedy" in caplog.text


# -- the store -------------------------------------------------------------------------------------------------------


def test_raising_num_rejects_samples_only_the_new_ones(rows, cache_dir):
    three = sampled(rows, cache_dir)
    assert stored(cache_dir) == 3 * len(rows)
    five = sampled(rows, cache_dir, SamplingSettings(num_rejects=5, max_new_tokens=64, temperature=1.0, top_p=0.95))
    assert stored(cache_dir) == 5 * len(rows)
    assert [row[: len(first)] for row, first in zip(five["rejected"], three["rejected"], strict=True)] == three[
        "rejected"
    ][:]
    assert five["generation_seconds"][0] > three["generation_seconds"][0]


def test_appended_rows_cost_only_themselves(rows, cache_dir):
    sampled(rows.select(range(10)), cache_dir)
    assert stored(cache_dir) == 30
    sampled(rows.select(range(12)), cache_dir)
    assert stored(cache_dir) == 36


def test_another_seed_model_or_way_of_drawing_is_sampled_anew(rows, cache_dir, tiny_model):
    few = rows.select(range(4))
    results = [
        sampled(few, cache_dir)["rejected"][:],
        sampled(few, cache_dir, SamplingSettings(3, 99, 64, 1.0, 0.95))["rejected"][:],
        sampled(few, cache_dir, SamplingSettings(3, 1234, 64, 1.3, 0.95))["rejected"][:],
        sampled(few, cache_dir, engine=TransformersEngine(tiny_model))["rejected"][:],
    ]
    assert len({json.dumps(result) for result in results}) == 4
    assert stored(cache_dir) == 4 * 12


def test_damaged_samples_are_detected_and_sampled_again(rows, cache_dir, caplog):
    good = sampled(rows, cache_dir)["rejected"][:]
    shutil.rmtree(cache_dir / "rejected")
    (segment,) = (cache_dir / "samples").glob("*/*segment*")
    damaged = bytearray(segment.read_bytes())
    for place in range(200, len(damaged), len(damaged) // 7):
        damaged[place] ^= 0x55
    segment.write_bytes(damaged[:-20])
    assert sampled(rows, cache_dir)["rejected"][:] == good
    assert "damaged" in caplog.text.lower() or "dropped" in caplog.text.lower()


def test_a_damaged_result_is_detected_and_rebuilt_from_the_store(rows, cache_dir, caplog):
    good = sampled(rows, cache_dir)
    columns, before = good[:], stored(cache_dir)
    (file,) = (cache_dir / "rejected").glob("*.arrow")
    for damage in (lambda data: data[: len(data) // 2], lambda data: data[:900] + b"\x00" + data[901:]):
        file.write_bytes(damage(file.read_bytes()))
        assert sampled(rows, cache_dir)[:] == columns
    assert caplog.text.count("is damaged;") == 2
    assert stored(cache_dir) == before


def test_a_cached_result_is_not_served_for_other_rows_of_the_same_number(rows, cache_dir):
    first, second = rows.select(range(4)), rows.select(range(4, 8))
    assert sampled(first, cache_dir)["source_index"][:] == [0, 1, 2, 3]
    assert sampled(second, cache_dir)["source_index"][:] == [4, 5, 6, 7]
    one, other = sorted((cache_dir / "rejected").glob("*.arrow"))
    shutil.copy(one, other)
    shutil.copy(one.with_suffix(".json"), other.with_suffix(".json"))
    assert sampled(first, cache_dir)["source_index"][:] == [0, 1, 2, 3]
    assert sampled(second, cache_dir)["source_index"][:] == [4, 5, 6, 7]


def test_no_working_files_are_left_behind(rows, cache_dir):
    sampled(rows.select(range(4)), cache_dir)
    assert sorted(path.suffix for path in (cache_dir / "rejected").iterdir()) == [".arrow", ".json"]


# -- the cache -------------------------------------------------------------------------------------------------------

IN_ANOTHER_PROCESS = """
    import json, sys, time
    opened = []
    sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
    from t2s_pref import SamplingSettings, TransformersEngine, generate_rejected, load_sft
    rows = load_sft(sys.argv[1]).select(range(24))
    engine = TransformersEngine(sys.argv[2], dtype="float32")
    import torch  # not part of the lookup
    start = time.perf_counter()
    settings = SamplingSettings(num_rejects=3, max_new_tokens=64, temperature=1.0, top_p=0.95)
    result = generate_rejected(rows, engine, settings, cache_dir=sys.argv[3])
    print(json.dumps({
        "seconds": time.perf_counter() - start,
        "rejected": result["rejected"][:],
        "weights opened": [name for name in opened if name.endswith(".safetensors")],
        "loaded": "transformers.modeling_utils" in sys.modules,
    }))
"""


def in_another_process(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(IN_ANOTHER_PROCESS), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_hit_in_another_process_neither_loads_nor_reads_the_weights(rows, cache_dir):
    here = sampled(rows, cache_dir, engine=TransformersEngine(MODEL, dtype="float32"))
    there = in_another_process(demo_files().train, MODEL, cache_dir)
    assert there["rejected"] == here["rejected"][:]
    assert there["weights opened"] == []
    assert not there["loaded"]
    print(f"found in {1000 * there['seconds']:.0f} ms")


def test_a_datasets_in_memory_is_cached_too(rows, cache_dir):
    held = Dataset.from_list(list(rows.select(range(3))))
    assert not held.cache_files
    first, second = sampled(held, cache_dir), sampled(held, cache_dir)
    assert first._fingerprint == second._fingerprint
    assert first.cache_files == second.cache_files != []


def test_the_size_of_batches_does_not_spoil_the_cache(rows, cache_dir):
    first = sampled(rows.select(range(4)), cache_dir)
    again = sampled(rows.select(range(4)), cache_dir, engine=SmallBatches(MODEL))
    assert again.cache_files == first.cache_files
    assert again._fingerprint == first._fingerprint


def test_a_later_run_uses_the_budget_that_the_first_one_measured(rows, cache_dir):
    sampled(rows.select(range(2)), cache_dir, engine=SmallBatches(MODEL))
    sampled(rows.select(range(4)), cache_dir)
    (run,) = (cache_dir / "samples").glob("*/run.json")
    assert json.loads(run.read_text())["token_budget"] == 300


def test_without_a_cache_dir_samples_and_results_lie_under_hf_home(rows):
    generate_rejected(rows.select(range(2)), MODEL, SETTINGS)
    home = Path(os.environ["HF_HOME"]) / "t2s_pref"
    assert list(home.glob("samples/*/segment*"))
    assert list(home.glob("rejected/*.arrow"))


def test_the_mapped_callable_hashes_the_same_whatever_it_has_loaded(rows, cache_dir):
    def sampler():
        engine = TransformersEngine(MODEL)
        return RejectSampler(engine, engine.identity(cache_dir / "memo.json"), SETTINGS, False)

    fresh = Hasher.hash(sampler())
    used = sampler()
    used.engine.count_tokens(["SELECT 1"])
    used.budget = 17
    assert Hasher.hash(used) == fresh
    assert Hasher.hash(RejectSampler(used.engine, used.identity, SamplingSettings(seed=5), False)) != fresh


def test_a_model_in_hand_gives_what_its_folder_gives(rows, cache_dir):
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").train()
    engine = TransformersEngine(model, tokenizer=AutoTokenizer.from_pretrained(MODEL))
    few = rows.select(range(6))
    assert sampled(few, cache_dir, engine=engine)["rejected"][:] == sampled(few, cache_dir)["rejected"][:]
    assert model.training


def test_caching_can_be_switched_off_for_a_call(rows, cache_dir):
    few = rows.select(range(3))
    first = sampled(few, cache_dir)
    (file,) = (cache_dir / "rejected").glob("*.arrow")
    written = file.stat().st_mtime_ns
    second = sampled(few, cache_dir, load_from_cache_file=False)
    assert file.stat().st_mtime_ns > written
    assert second["rejected"][:] == first["rejected"][:]


def test_the_run_says_which_model_and_adapter_it_sampled_from(rows, cache_dir):
    result = sampled(rows.select(range(3)), cache_dir, engine=TransformersEngine(MODEL, adapter_path="./not/there"))
    assert "no adapter: ./not/there was absent" in result.info.description
    assert os.path.basename(MODEL) in result.info.description


def test_a_dataset_without_rows_gets_the_columns(rows, cache_dir):
    result = sampled(rows.select([]), cache_dir)
    assert len(result) == 0
    assert result.features == sampled(rows.select([0]), cache_dir).features
    assert len(explode_rejected(result, cache_dir=cache_dir)) == 0


# -- memory and records ----------------------------------------------------------------------------------------------


def forgetful(most):
    """The bundled model where a batch of more than `most` sequences meets the end of memory."""
    import torch

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")

    def little_memory(module, args, kwargs):
        if kwargs["input_ids"].shape[0] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(little_memory, with_kwargs=True)
    return TransformersEngine(model, tokenizer=AutoTokenizer.from_pretrained(MODEL))


def test_where_memory_ends_the_recorded_budget_shrinks_and_the_candidates_stay_the_same(rows, cache_dir, tmp_path):
    few = rows.select(range(6))
    result = sampled(few, cache_dir, engine=forgetful(5))
    assert result["rejected"][:] == sampled(few, tmp_path / "other")["rejected"][:]
    budgets = [
        json.loads(file.read_text())["token_budget"]
        for folder in (cache_dir, tmp_path / "other")
        for file in (folder / "samples").glob("*/run.json")
    ]
    assert 0 < budgets[0] < budgets[1] // 4


def test_the_run_says_how_it_was_decoded_also_when_it_comes_from_the_cache(rows, cache_dir):
    for _ in range(2):
        result = sampled(rows.select(range(2)), cache_dir)
        assert result.info.description.endswith("no adapter; prompts' common beginnings held once")


def test_what_was_found_of_other_candidates_never_stands_beside_new_ones(rows, cache_dir):
    few = rows.select(range(4)).add_column("round", ["mine"] * 4)
    settings = SamplingSettings(num_rejects=3, max_new_tokens=64, round=2)
    first = generate_rejected(
        few.remove_columns("round"),
        MODEL,
        settings,
        keep_raw=True,
        databases=demo_files().databases,
        cache_dir=cache_dir,
    )
    second = generate_rejected(
        first, MODEL, SamplingSettings(num_rejects=3, max_new_tokens=64, seed=9), cache_dir=cache_dir
    )
    assert set(first.column_names) - set(second.column_names) == {
        *("verdict", "verdict_detail", "result_digest", "distance", "gold_verdict", "gold_detail"),
        *("raw_answers", "round", "adapter", "policy_hash"),
    }
    # a column of the user's own that is called like one of ours stays
    assert sampled(few, cache_dir)["round"][:] == ["mine"] * 4


def test_single_answers_are_recorded_as_they_end_in_float32_and_whole_batches_in_bfloat16(rows, cache_dir):
    class Interrupted(TransformersEngine):
        def sample(self, *arguments):
            for number, answer in enumerate(super().sample(*arguments)):
                if number == 20:
                    raise KeyboardInterrupt
                yield answer

    for dtype, kept in (("float32", 20), ("bfloat16", 0)):
        with pytest.raises(KeyboardInterrupt):
            sampled(rows, cache_dir / dtype, engine=Interrupted(MODEL, dtype=dtype))
        assert stored(cache_dir / dtype) == kept
        whole = sampled(rows, cache_dir / dtype, engine=TransformersEngine(MODEL, dtype=dtype))
        assert (
            whole["rejected"][:]
            == sampled(rows, cache_dir / f"{dtype}, new", engine=TransformersEngine(MODEL, dtype=dtype))["rejected"][:]
        )


def test_the_prompts_of_a_schema_are_read_once_for_all_pages_and_for_more_rejects(cache_dir):
    release_models()
    rows = load_sft(demo_files().train)
    engine = TransformersEngine(MODEL)
    sampled(rows, cache_dir, engine=engine)
    prompts = engine.encode_chats([messages(row) for row in rows], False)
    nodes = len({tuple(prompt[: end + 1]) for prompt in prompts for end in range(len(prompt))})
    first = engine.work.prompt_computed
    # pages cut groups, and a group's rows read what they have in common once a batch; all is counted, padding too
    assert nodes <= first <= 1.1 * nodes
    assert engine.work.prompt_asked == 3 * sum(map(len, prompts))
    sampled(rows, cache_dir, SamplingSettings(num_rejects=4, max_new_tokens=64, temperature=1.0, top_p=0.95), engine)
    assert engine.work.prompt_asked == 4 * sum(map(len, prompts))
    schemas = sum(group.shared for group in group_rows(prompts, [1] * len(prompts)))
    assert engine.work.prompt_computed - first <= first - 0.8 * schemas


def test_the_bar_shows_rows_candidates_speed_and_what_is_saved(cache_dir):
    code = (
        "import sys; from t2s_pref import *; files = demo_files(); rows = load_sft(files.train).select(range(24))\n"
        "generate_rejected(rows, files.model, SamplingSettings(max_new_tokens=64), cache_dir=sys.argv[1])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HF_DATASETS_DISABLE_PROGRESS_BARS"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(cache_dir)], capture_output=True, text=True, check=True, env=environment
    )
    bar = r"Sampling rejects: 100%.* 72/72 .* candidates/s, 24 rows, [\d,]+ tokens/s, \d\d% of prefill saved"
    assert re.search(bar, done.stderr), done.stderr

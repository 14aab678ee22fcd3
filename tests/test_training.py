"""The training file: what stands in it, how rows are measured, and what is refused. `test_train_config.py` runs it."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from loopback_hub import LoopbackHub
from transformers import AutoTokenizer

from t2s_pref import UserError, demo_files, load_sft, save_llamafactory, templates, write_dpo_config, write_sft_config
from t2s_pref.cli import main
from t2s_pref.prompts import messages
from t2s_pref.training import train_config

MODEL, REASONER = demo_files().model, demo_files().reasoner
THOUGHT = "<think>\nOne table is enough.\n</think>\n\n"
# As Qwen3's: thinking is off where an empty think block stands before the answer.
NO_THOUGHT = "{% if not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"


@pytest.fixture(scope="module")
def golds():
    return load_sft(demo_files().train).select(range(12))


@pytest.fixture(scope="module")
def pairs(golds):
    """Pairs whose rejected side is the gold of the row after."""
    outputs = golds["output"]
    rows = golds.rename_column("output", "chosen").add_column("rejected", [*outputs[1:], outputs[0]])
    return rows.remove_columns("source_index")


@pytest.fixture
def folder(pairs, golds, tmp_path):
    save_llamafactory(pairs, tmp_path / "my_dpo.json")
    save_llamafactory(golds, tmp_path / "my_sft.json")
    return tmp_path


@pytest.fixture
def adapter(tmp_path):
    path = tmp_path / "sft-adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    return path


@pytest.fixture
def hybrid(folder):
    """A model that thinks where it is told to, without its weights."""
    path = copy_of(REASONER, folder)
    with open(path / "chat_template.jinja", "a", encoding="utf-8") as file:
        file.write("{% if add_generation_prompt %}" + NO_THOUGHT + "{% endif %}")
    return path


def config(folder, datasets="my_dpo", output=None, **options):
    options = {"base_model": MODEL, "device": "cpu", "dataset_dir": folder, **options}
    return train_config(output or folder / "train.yaml", datasets, **options)


def note(folder, name="my_dpo", step="generate_rejected", **record):
    """Note in the entry how its data were sampled, as this package does."""
    path = folder / "dataset_info.json"
    info = json.loads(path.read_text())
    info[name]["t2s_pref"] = [*info[name].get("t2s_pref", ()), {"step": step, **record}]
    path.write_text(json.dumps(info))


def change(folder, name="my_dpo", **entry):
    path = folder / "dataset_info.json"
    info = json.loads(path.read_text())
    info[name] = {key: value for key, value in {**info.get(name, {}), **entry}.items() if value is not None}
    path.write_text(json.dumps(info))


# -- what stands in the file -----------------------------------------------------------------------------------------


def test_the_file_holds_the_keys_of_the_source_document_with_its_mistakes_mended(folder, adapter):
    path = write_dpo_config(
        folder / "dpo.yaml",
        "my_dpo",
        dataset_dir=folder,
        base_model=MODEL,
        adapter_path=adapter,
        device="cuda",
        output_dir="out",
    )
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == {
        "model_name_or_path": str(MODEL),
        "adapter_name_or_path": str(adapter),
        "template": "qwen3_nothink",
        "stage": "dpo",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 32,
        "lora_target": "all",
        "create_new_adapter": True,
        "pref_beta": 0.1,
        "pref_loss": "sigmoid",
        "dataset": "my_dpo",
        "dataset_dir": str(folder),
        "cutoff_len": 192,
        "overwrite_cache": True,
        "preprocessing_num_workers": 2,
        "output_dir": "out",
        "logging_steps": 10,
        "save_steps": 500,
        "plot_loss": True,
        "overwrite_output_dir": True,
        "report_to": "none",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "learning_rate": 5e-6,
        "num_train_epochs": 3.0,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "bf16": True,
        "ddp_timeout": 180000000,
    }
    assert "learning_rate: 5.0e-06\n" in path.read_text()  # without the dot YAML 1.1 reads a string


def test_supervised_rows_get_their_own_stage_and_learning_rate(folder):
    keys = yaml.safe_load(
        write_sft_config(folder / "sft.yml", "my_sft", dataset_dir=folder, base_model=MODEL).read_text()
    )
    assert (keys["stage"], keys["learning_rate"]) == ("sft", 1e-4)
    assert not {"pref_beta", "pref_loss", "create_new_adapter", "max_samples"} & set(keys)
    assert config(folder, "my_sft", finetuning="full").keys["learning_rate"] == 1e-5


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"max_samples": 0}, {"max_samples": None}),
        ({"max_samples": 5}, {"max_samples": 5}),
        ({"pref_loss": "simpo"}, {"pref_loss": "simpo", "pref_beta": 2.0}),
        ({"pref_loss": "orpo", "pref_beta": 1}, {"pref_loss": "orpo", "pref_beta": 1.0}),
        ({"device": "cpu"}, {"use_cpu": True, "bf16": False}),
        ({"device": "cuda"}, {"use_cpu": None, "bf16": True}),
        ({"finetuning": "full"}, {"finetuning_type": "full", "lora_rank": None, "lora_target": None}),
        (
            {"finetuning": "qlora", "device": "cuda"},
            {"finetuning_type": "lora", "quantization_bit": 4, "quantization_method": "bnb"},
        ),
        ({"trust_remote_code": True}, {"trust_remote_code": True}),
        ({"output_dir": None}, {"output_dir": "saves/model/lora/my_dpo"}),
        ({"mix": "interleave_over"}, {"mix_strategy": None}),  # of one dataset there is nothing to mix
        ({"epochs": 2, "learning_rate": 1e-5, "save_steps": 10}, {"num_train_epochs": 2.0, "learning_rate": 1e-5}),
    ],
)
def test_a_key_is_there_only_where_it_does_something(folder, options, keys):
    written = config(folder, **options)
    assert {name: written.keys.get(name) for name in keys} == keys
    assert yaml.safe_load(written.path.read_text()) == written.keys


def test_paths_are_absolute_wherever_the_command_was_run(folder, adapter, monkeypatch):
    monkeypatch.chdir(folder)
    keys = train_config(
        "train.yaml", "my_dpo", dataset_dir=".", base_model=os.path.relpath(MODEL), adapter_path="sft-adapter"
    ).keys
    assert keys["dataset_dir"] == str(folder)
    assert keys["model_name_or_path"] == str(MODEL)
    assert keys["adapter_name_or_path"] == str(adapter)


def test_names_that_omegaconf_reads_as_numbers_are_quoted(folder, pairs):
    save_llamafactory(pairs, folder / "x.json", name="12e3")
    assert re.search(r"^dataset: '12e3'$", config(folder, "12e3").path.read_text(), re.MULTILINE)


def test_several_datasets_are_joined_or_drawn_from_with_their_probabilities(folder, pairs):
    save_llamafactory(pairs.select(range(4)), folder / "other.json")
    both = ["my_dpo", "other"]
    assert "mix_strategy" not in config(folder, both).keys
    assert config(folder, both, mix="interleave_over").keys["mix_strategy"] == "interleave_over"
    keys = config(folder, both, probs=[0.7, 0.3]).keys
    assert (keys["dataset"], keys["mix_strategy"], keys["interleave_probs"]) == (
        *("my_dpo,other", "interleave_under", "0.7,0.3"),
    )
    assert len(config(folder, both, max_samples=3).lengths) == 6


# -- how long rows are -----------------------------------------------------------------------------------------------


def test_a_row_is_as_long_as_its_prompt_and_its_longer_answer(folder, pairs):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def tokens(row):
        prompt = tokenizer.apply_chat_template(messages(row), add_generation_prompt=True, return_dict=False)
        return len(prompt) + max(len(tokenizer(f"{row[side]}<|im_end|>\n")["input_ids"]) for side in SIDES)

    written = config(folder)
    assert list(written.lengths) == [tokens(row) for row in pairs]
    longest = max(written.lengths)
    assert longest <= written.keys["cutoff_len"] < longest + 64
    assert written.keys["cutoff_len"] % 64 == 0
    assert f"longest {longest} tokens" in str(written)


SIDES = ("chosen", "rejected")


def test_a_row_that_will_be_cut_is_warned_about(folder, caplog):
    lengths = config(folder).lengths
    assert not caplog.records
    limit = sorted(lengths)[-3]
    assert config(folder, cutoff_len=limit).keys["cutoff_len"] == limit
    (warning,) = caplog.messages
    over = [place for place, length in enumerate(lengths) if length > limit]
    assert warning.startswith(f"{len(over)} of 12 rows are longer than cutoff_len {limit} and will be cut")
    assert f"the longest has {max(lengths)} tokens, the first is row {over[0]} of 'my_dpo'" in warning


def test_the_warning_says_which_side_of_a_row_is_cut(folder, pairs, caplog):
    long, short = "SELECT 1; " * 40, {**pairs[0], "input": "How?"}
    rows = [{**short, "input": "How? " * 60}, {**short, "chosen": long}]
    rows += [{**short, "input": "How? " * 60, "rejected": long}, short]
    save_llamafactory(Dataset.from_list(rows), folder / "long.json")
    config(folder, "long", cutoff_len=160)
    assert (
        "3 of 4 rows are longer than cutoff_len 160 and will be cut (2 prompts lose their end, 2 answers lose"
        in caplog.text
    )
    caplog.clear()
    save_llamafactory(Dataset.from_list([rows[0], short]), folder / "long.json")
    config(folder, "long", cutoff_len=160)
    assert "(1 prompts lose their end)" in caplog.text
    caplog.clear()
    turns = [{"input": "How?", "output": "1", "history": [["How? " * 60, "1"]]}, {"input": "", "output": "1"}]
    save_llamafactory(
        Dataset.from_list([{"instruction": "", "history": [], **row} for row in turns]), folder / "s.json"
    )
    config(folder, "s", cutoff_len=160)
    assert "(1 rows with a history lose ends of its turns or of the answer)" in caplog.text


def test_all_rows_are_measured_where_llamafactory_draws_some_of_them(folder, pairs):
    change(folder, num_samples=5)
    assert len(config(folder, max_samples=3).lengths) == 12


def test_a_cutoff_that_holds_no_prompt_is_refused(folder):
    with pytest.raises(UserError, match="cutoff_len is 16, and not even the shortest prompt fits, of"):
        config(folder, cutoff_len=16)
    assert not (folder / "train.yaml").exists()


def test_the_cutoff_stays_within_the_models_positions(folder, caplog):
    model = copy_of(MODEL, folder, max_position_embeddings=150)
    assert config(folder, base_model=model).keys["cutoff_len"] == 150
    assert "rows are longer than the model's positions, 150 and will be cut" in caplog.text


def copy_of(model, folder, **changes):
    """The model's folder without its weights, with other values in its config."""
    path = folder / "copy"
    shutil.copytree(model, path, ignore=shutil.ignore_patterns("*.safetensors"))
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, **changes}))
    return path


# -- other layouts and places of data --------------------------------------------------------------------------------


def with_turns(row, index):
    turn = ["How many tables?", "SELECT count(*) FROM sqlite_master"]
    return {"system": "Write SQLite." if index % 2 else "", "history": [turn] if index % 3 else []}


@pytest.mark.parametrize("kind", ["pairs", "golds"])
def test_sharegpt_rows_are_measured_as_the_alpaca_rows_they_were(request, tmp_path, kind):
    rows = request.getfixturevalue(kind).map(with_turns, with_indices=True)
    save_llamafactory(rows, tmp_path / "alpaca.json")
    save_llamafactory(rows, tmp_path / "sharegpt.jsonl", formatting="sharegpt")
    assert config(tmp_path, "alpaca").lengths == config(tmp_path, "sharegpt").lengths


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_is_read_too(folder, pairs, suffix):
    getattr(pairs, f"to_{suffix}")(str(folder / f"table.{suffix}"))
    change(folder, file_name=f"table.{suffix}")
    assert len(config(folder).lengths) == 12


def test_a_folder_of_files_and_a_dataset_repository_on_disk_are_read(folder, pairs):
    for name in ("a", "b"):
        (folder / "many").mkdir(exist_ok=True)
        shutil.copy(folder / "my_dpo.json", folder / "many" / f"{name}.json")
    change(folder, file_name="many")
    assert len(config(folder).lengths) == 24
    change(folder, hf_hub_url=str(folder / "many"))
    assert len(config(folder).lengths) == 24


def test_what_a_row_lacks_and_others_have_is_null(folder, pairs):
    def lengths(row):
        (folder / "my_dpo.json").write_text(json.dumps([pairs[0], row]))
        return config(folder).lengths

    lacking = {name: text for name, text in pairs[1].items() if name != "input"}
    assert lengths(lacking) == lengths({**lacking, "input": None}) != lengths(pairs[1])


# -- thinking and template -------------------------------------------------------------------------------------------


def thinking(row):
    return {side: THOUGHT + row[side] for side in SIDES if side in row}


def test_answers_that_think_are_trained_in_thinking_mode_and_others_without(folder, pairs, hybrid, caplog):
    save_llamafactory(pairs.map(thinking), folder / "cot.json")
    for name, mode in (("cot", True), ("my_dpo", False)):
        keys = config(folder, name, base_model=hybrid).keys
        assert (keys["template"], keys["enable_thinking"]) == ("qwen3", mode)
    # a chat template that knows of no thinking has no mode, and think blocks are text
    assert "enable_thinking" not in config(folder, "cot", base_model=REASONER).keys
    assert not caplog.records


def test_thoughts_against_none_are_refused(folder, pairs):
    save_llamafactory(pairs.map(thinking), folder / "cot.json")
    with pytest.raises(UserError, match="row 0 of 'cot' has a think block, one in row 0 of 'my_dpo' has none"):
        config(folder, ["my_dpo", "cot"], base_model=REASONER)
    one = [{**row, "chosen": THOUGHT + row["chosen"]} if place == 3 else row for place, row in enumerate(pairs)]
    save_llamafactory(Dataset.from_list(one), folder / "one.json")
    with pytest.raises(UserError, match="row 3 of 'one' has a think block"):
        config(folder, "one", base_model=REASONER)


def test_sql_that_was_sampled_in_thinking_mode_is_trained_in_it(folder, hybrid, caplog):
    note(folder, settings={"answer_format": "sql", "enable_thinking": True})
    assert config(folder, base_model=hybrid).keys["enable_thinking"] is True
    assert "without their thoughts" in caplog.text


def test_data_of_both_thinking_modes_are_refused(folder, pairs):
    save_llamafactory(pairs, folder / "other.json")
    note(folder, settings={"enable_thinking": True})
    note(folder, "other", settings={"enable_thinking": False})
    with pytest.raises(UserError, match="sampled with thinking on, others with it off"):
        config(folder, ["my_dpo", "other"], base_model=REASONER)


def test_how_a_teacher_was_sampled_says_nothing_of_the_pairs(folder, hybrid):
    note(folder, step="generate_cot", settings={"enable_thinking": True})
    note(folder, settings={"enable_thinking": False})
    assert config(folder, base_model=hybrid).keys["enable_thinking"] is False


def test_a_history_gets_no_empty_thoughts_in_supervised_training(folder, golds, hybrid):
    rows = golds.map(with_turns, with_indices=True).map(lambda row: {"output": THOUGHT + row["output"]})
    save_llamafactory(rows, folder / "cot.json")
    assert config(folder, "cot", base_model=hybrid).keys["mask_history"] is True
    assert "mask_history" not in config(folder, "my_sft", base_model=hybrid).keys


def test_the_answers_of_a_history_are_trained_on_where_no_template_thinks(folder, golds):
    save_llamafactory(golds.map(with_turns, with_indices=True), folder / "turns.json")
    written = config(folder, "turns")
    assert (written.keys["template"], "mask_history" in written.keys) == ("qwen3_nothink", False)


def test_a_template_that_is_given_is_taken_and_what_is_wrong_with_it_is_said(folder, caplog):
    assert config(folder, template="qwen3").keys["enable_thinking"] is False
    assert "gives 12 of 12 rows another prompt" in caplog.text
    caplog.clear()
    written = config(folder, template="gemma")
    assert (written.keys["template"], written.keys["enable_thinking"]) == ("gemma", False)
    assert "'gemma' is none of" in caplog.text
    assert "LLaMA-Factory stops if it has none of this name" in caplog.text
    assert max(written.lengths) >= max(config(folder).lengths)


def test_an_unknown_template_leaves_room_in_each_row(folder):
    for most in range(1, 13):
        written = config(folder, template="gemma", max_samples=most)
        assert 64 <= written.keys["cutoff_len"] - max(written.lengths) < 128


def test_a_template_whose_tokens_are_missing_copies_no_tokenizer_for_each_row(folder, monkeypatch):
    copies = []
    monkeypatch.setattr(templates, "deepcopy", lambda tokenizer: copies.append(0) or deepcopy(tokenizer))
    assert config(folder, template="llama3").keys["template"] == "llama3"
    assert 0 < len(copies) <= 2


# -- what training starts from ---------------------------------------------------------------------------------------


def test_pairs_of_an_adapter_are_not_trained_without_one_unless_this_is_said(folder, adapter, caplog):
    note(folder, model={"name": "model", "content": "1"}, adapter={"name": "sft-adapter", "content": "2"})
    with pytest.raises(UserError, match=r"sampled with the adapter 'sft-adapter'; pass it, adapter_path=.*or \"\" to"):
        config(folder)
    assert "adapter_name_or_path" not in config(folder, adapter_path="").keys
    assert config(folder, adapter_path=adapter).keys["create_new_adapter"] is True
    assert not caplog.records


@pytest.mark.parametrize(
    ("record", "warning"),
    [
        ({"model": {"name": "other", "content": "1"}, "adapter": {"name": "sft-adapter"}}, "from the model other, but"),
        ({"model": {"name": "model"}, "adapter": {"name": "x/dpo1", "revision": "1"}}, "from the adapter x/dpo1, but"),
        ({"model": {"name": "model", "content": "1"}, "adapter": None}, "sampled without an adapter"),
    ],
)
def test_another_model_than_was_sampled_from_is_warned_about(folder, adapter, caplog, record, warning):
    note(folder, **record)
    config(folder, adapter_path=adapter)
    (message,) = caplog.messages
    assert warning in message


def test_a_teacher_is_not_what_is_trained(folder, caplog):
    settings = {"enable_thinking": False, "answer_format": "fenced"}
    note(folder, "my_sft", "generate_cot", model={"name": "x/big", "revision": "1"}, settings=settings)
    config(folder, "my_sft")
    assert not caplog.records
    with pytest.raises(UserError, match="base_model is not given, and none is noted"):
        config(folder, "my_sft", base_model=None)


def test_what_was_trained_on_an_adapter_is_said_to_need_it(folder, adapter):
    assert f"adapter_name_or_path: {adapter},saves/model/lora/my_dpo" in str(config(folder, adapter_path=adapter))
    assert "adapter_name_or_path" not in str(config(folder))


@pytest.mark.parametrize("model", [{"revision": "1"}, {"name": 5, "revision": "1"}, {"name": "x/y", "revision": 1}, 7])
def test_a_note_of_another_tool_that_names_no_model_says_nothing(folder, model):
    note(folder, model=model, adapter=model)
    with pytest.raises(UserError, match="base_model is not given, and none is noted"):
        config(folder, base_model=None)
    assert "adapter_name_or_path" not in config(folder).keys


@pytest.mark.parametrize("output", [None, "link", "./other/../saves/model/lora/my_dpo"])
def test_the_adapter_that_training_starts_from_is_not_overwritten(folder, monkeypatch, output):
    adapter = folder / "saves" / "model" / "lora" / "my_dpo"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    (folder / "link").symlink_to(adapter)
    monkeypatch.chdir(folder)
    named = re.escape(repr(output or "saves/model/lora/my_dpo"))
    with pytest.raises(UserError, match=f"output_dir is {named}, .* from the adapter there.*--output-dir"):
        config(folder, adapter_path="saves/model/lora/my_dpo", output_dir=output)
    shutil.copytree(adapter, adapter / "checkpoint-500")
    with pytest.raises(UserError, match=f"output_dir is {named}, .* from the adapter there"):
        config(folder, adapter_path=adapter / "checkpoint-500", output_dir=output)
    assert config(folder, adapter_path=adapter, output_dir="saves/other").keys["output_dir"] == "saves/other"


def test_the_base_model_is_not_overwritten(folder):
    model = copy_of(MODEL, folder)
    with pytest.raises(UserError, match=r"output_dir is .*copy', and training starts from the base model there"):
        config(folder, base_model=model, finetuning="full", output_dir=model)
    assert not (folder / "train.yaml").exists()


# -- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(folder):
    files = {name: Path(MODEL, name).read_bytes() for name in os.listdir(MODEL) if not name.endswith(".safetensors")}
    with LoopbackHub() as hub:
        hub.commit = hub.add("model", "user/base", files)
        hub.add("model", "user/base", {**files, "README.md": "a later commit"})
        hub.add("model", "user/sft", {"adapter_config.json": "{}"})
        note(folder, model={"name": "user/base", "revision": hub.commit}, adapter={"name": "user/sft", "revision": "1"})
        change(folder, hf_hub_url="user/data")
        info = (folder / "dataset_info.json").read_text()
        hub.add(
            "dataset", "user/data", {"dataset_info.json": info, "train.json": (folder / "my_dpo.json").read_bytes()}
        )
        yield hub


def on_hub(hub, folder, *more, **environment):
    command = [sys.executable, "-m", "t2s_pref", "train-config", "--dataset-dir", "REMOTE:user/data", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--dataset", "my_dpo", "--output", folder / "hub.yaml", *more],
        *(),
        capture_output=True,
        text=True,
        env={**hub.environment(folder / "home"), **environment},
        check=False,
    )
    return done, yaml.safe_load((folder / "hub.yaml").read_text()) if (folder / "hub.yaml").exists() else None


def test_pairs_of_the_hub_are_trained_at_the_commit_that_was_sampled_from(folder, hub, adapter):
    done, keys = on_hub(hub, folder, "--adapter-path", str(adapter))
    assert done.returncode == 0, done.stderr
    assert (keys["model_name_or_path"], keys["model_revision"]) == ("user/base", hub.commit)
    assert keys["dataset_dir"] == "REMOTE:user/data"
    assert "sampled from the adapter user/sft" in done.stderr


def test_a_commit_is_not_looked_for_in_an_adapter_of_the_hub(folder, hub):
    done, keys = on_hub(hub, folder, "--adapter-path", "user/sft")
    assert done.returncode == 0, done.stderr
    assert keys["adapter_name_or_path"] == "user/sft"
    assert "model_revision" not in keys
    assert f"model_revision {hub.commit} is left out" in done.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dataset-dir", "REMOTE:user/absent"], "dataset_info.json of the dataset 'user/absent' was not found"),
        (["--base-model", "user/absent"], "'user/absent'"),
        (["--adapter-path", "user/absent"], "Adapter 'user/absent' was found neither"),
        (["--revision", "absent"], "Revision 'absent'"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(folder, hub, more, message):
    done, keys = on_hub(hub, folder, "--adapter-path", "", *more)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert keys is None


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pref_loss": "hinge"}, "pref_loss is 'hinge'; it must be one of sigmoid, orpo, simpo"),
        ({"finetuning": "freeze"}, "finetuning is 'freeze'; it must be one of lora, qlora, full"),
        ({"mix": "zip"}, "mix is 'zip'; it must be one of concat, interleave_under, interleave_over"),
        ({"device": "tpu"}, "device is 'tpu'; it must be one of auto, cuda, cpu"),
        ({"report_to": "paper"}, "report_to is 'paper'; it must be one of none, wandb"),
        ({"lora_rank": 0}, "lora_rank is 0; it must be a whole number, 1 or more"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"gradient_accumulation": 0}, "gradient_accumulation is 0"),
        ({"save_steps": -1}, "save_steps is -1"),
        ({"max_samples": -1}, "max_samples is -1; it must be a whole number, 0 or more"),
        ({"cutoff_len": 0}, "cutoff_len is 0"),
        ({"learning_rate": 1}, "learning_rate is 1; it must be above 0 and below 1"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"epochs": 0}, "epochs is 0; it must be above 0"),
        ({"epochs": float("nan")}, "epochs is nan"),
        ({"pref_beta": -0.1}, "pref_beta is -0.1"),
        ({"probs": [0.5, 0.5]}, "probs are 2 numbers for 1 datasets"),
        ({"datasets": ["my_dpo", "my_dpo"]}, "'my_dpo' is given twice"),
        ({"datasets": ["my_dpo", "my_sft"]}, "'my_dpo' holds preference pairs and 'my_sft' does not"),
        ({"datasets": "absent"}, "'absent' is not in .*; there are my_dpo, my_sft, a,b"),
        ({"datasets": "a,b"}, "'a,b' has a comma or a blank at an end; .* rename it"),
        ({"datasets": " lead"}, "' lead' has a comma or a blank at an end"),
        ({"template": ""}, "template is ''; give the name of one, or leave it out"),
        ({"template": " "}, "template is ' '; give the name of one, or leave it out"),
        ({"datasets": []}, "No dataset is named; .* has my_dpo, my_sft, a,b"),
        ({"datasets": "my_sft", "pref_loss": "orpo"}, "pref_loss and pref_beta are for preference pairs"),
        ({"datasets": "my_sft", "stage": "dpo"}, "'my_sft' has no preference pairs .*; write_sft_config is for it"),
        ({"base_model": None}, "base_model is not given, and none is noted"),
        ({"base_model": "./absent"}, "'./absent' does not exist"),
        ({"base_model": "user/absent"}, "'user/absent' is neither a folder here nor in the Hub cache"),
        ({"base_model": MODEL, "revision": "main"}, "revision is for a model from the Hub"),
        ({"base_model": "~nosuchuser/m"}, "'~nosuchuser/m' does not exist"),
        ({"dataset_dir": "~nosuchuser/d"}, "'~nosuchuser/d' has no dataset_info.json"),
        ({"output": "~nosuchuser/x.yaml"}, "'~nosuchuser/x.yaml' is in the home of a user who is not known here"),
        ({"adapter_path": "./absent"}, "Adapter './absent' has no adapter_config.json"),
        ({"adapter_path": "one,two"}, "it must be one adapter, without commas; of several, merge it first"),
        ({"finetuning": "qlora"}, "qlora, which needs CUDA"),
    ],
)
def test_a_bad_value_is_refused_with_what_is_allowed(folder, options, message):
    for name in ("a,b", " lead"):
        change(folder, name, file_name="my_dpo.json", ranking=True)
    with pytest.raises(UserError, match=message):
        config(folder, **options)
    assert not (folder / "train.yaml").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probs": [0.7, 0.7]}, "probs are .0.7, 0.7.; they must be above 0 and sum to 1"),
        ({"probs": [1.0, 0.0]}, "must be above 0 and sum to 1"),
        ({"probs": [0.5, 0.3, 0.2]}, "probs are 3 numbers for 2 datasets"),
        ({"probs": [0.5, 0.5], "mix": "concat"}, "probs needs an interleaved mix"),
    ],
)
def test_probabilities_are_one_each_and_sum_to_one(folder, pairs, options, message):
    save_llamafactory(pairs, folder / "other.json")
    with pytest.raises(UserError, match=message):
        config(folder, ["my_dpo", "other"], **options)


@pytest.mark.parametrize("finetuning", ["full", "qlora"])
def test_an_adapter_is_for_lora_and_the_way_out_is_said(folder, adapter, finetuning):
    with pytest.raises(UserError, match=f"finetuning is {finetuning}.*merge it first"):
        config(folder, finetuning=finetuning, adapter_path=adapter, device="cuda")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"file_name": "absent.json"}, "names '.*absent.json', which does not exist"),
        ({"file_name": "my_dpo.txt"}, "one of .json, .jsonl"),
        ({"file_name": None}, "it has neither file_name nor hf_hub_url"),
        ({"file_name": None, "script_url": "load.py"}, "has script_url; only file_name and hf_hub_url"),
        ({"hf_hub_url": "./absent"}, "cannot be loaded"),
        ({"formatting": "openai"}, "formatting 'openai'; it must be alpaca or sharegpt"),
        ({"columns": {"prompt": "question", "chosen": "chosen", "rejected": "rejected"}}, "row 0 lacks 'question'"),
        ({"columns": {"prompt": "instruction", "chosen": "chosen"}}, "row 0 lacks 'rejected'"),
        ({"columns": 5}, "has 5 for columns; it must be an object of strings"),
        ({"columns": {"prompt": 5}}, "has {'prompt': 5} for columns"),
        ({"formatting": "sharegpt", "tags": [1]}, ".1. for tags; it must be an object of strings"),
        ({"ranking": 1}, "has the ranking 1; it must be true or false"),
        ({"ranking": "false"}, "has the ranking 'false'"),
        ({"columns": {"tools": "tools"}}, "has a column for 'tools'"),
        ({"columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "many"}}, "row 0 has no answer"),
        ({"formatting": "sharegpt", "columns": {"messages": "input"}}, "row 0 is not sharegpt data"),
    ],
)
def test_an_entry_that_cannot_be_trained_on_is_one_line(folder, pairs, entry, message):
    (folder / "my_dpo.txt").touch()
    rows = [{**row, "many": [row["rejected"]]} for row in pairs]
    (folder / "my_dpo.json").write_text(json.dumps(rows), encoding="utf-8")
    change(folder, **entry)
    with pytest.raises(UserError, match=f"^Dataset 'my_dpo' .*{message}") as error:
        config(folder)
    assert "\n" not in str(error.value)


SIDE = {"chosen": "SELECT 1", "rejected": "SELECT 2"}
HISTORY = {"columns": {"prompt": "instruction", "history": "history", "chosen": "chosen", "rejected": "rejected"}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": 5}, "row 1 has 5 in its prompt, which is no text"),
        ({"instruction": "\ud800"}, r"row 1 has '\\ud800' for 'instruction', and .* surrogates not allowed"),
        ({"chosen": "\ud800"}, r"row 1 has '\\ud800' for 'chosen'"),
        ({"id": "a"}, "row 1 has 'a' for 'id', and LLaMA-Factory cannot load such a column"),
        ({"history": [["a", "b", "c"]]}, "row 1 has the history .*; it must be a list of .question, answer."),
        ({"history": [["a", None]]}, "row 1 has None in its prompt"),
        ({"history": "abc"}, "row 1 has the history 'abc'"),
    ],
)
def test_a_row_that_llamafactory_dies_on_is_named(folder, row, message):
    first = {"instruction": "How many?", **SIDE} if "instruction" not in row else {"id": 0, **SIDE}
    first |= {"id": 0} if "id" in row else {}
    (folder / "my_dpo.json").write_text(json.dumps([first, {**first, **row}]))
    change(folder, **(HISTORY if "history" in row else {"columns": {**HISTORY["columns"], "history": None}}))
    with pytest.raises(UserError, match=f"^Dataset 'my_dpo' {message}") as error:
        config(folder)
    str(error.value).encode()


def test_a_table_of_numbers_and_a_message_without_text_are_named(folder):
    (folder / "table.csv").write_text("instruction,chosen,rejected\n1,a,b\n2,c,d\n")
    change(folder, file_name="table.csv", columns={**HISTORY["columns"], "history": None})
    with pytest.raises(UserError, match="'my_dpo' row 0 has 1 in its prompt, which is no text"):
        config(folder)
    chat = [{"from": "human", "value": None}, {"from": "gpt", "value": "SELECT 1"}]
    (folder / "chat.json").write_text(json.dumps([{"conversations": chat}]))
    change(folder, "chat", file_name="chat.json", formatting="sharegpt")
    with pytest.raises(UserError, match="'chat' row 0 has None in its prompt, which is no text"):
        config(folder, "chat")


def test_columns_that_are_null_are_refused(folder):
    info = json.loads((folder / "dataset_info.json").read_text())
    info["my_dpo"]["columns"] = None
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="'my_dpo' has None for columns"):
        config(folder)


@pytest.mark.parametrize("name", ["my_dpo.json", "dataset_info.json"])
def test_a_byte_order_mark_is_refused_as_llamafactory_cannot_read_it(folder, name):
    path = folder / name
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    with pytest.raises(UserError, match=f"a byte order mark.*{'in my_dpo.json' if name[0] == 'm' else ''}.*UTF-8 with"):
        config(folder)


def test_turns_out_of_order_are_refused_as_they_would_be_dropped(folder, pairs):
    save_llamafactory(pairs, folder / "chat.json", formatting="sharegpt")
    rows = json.loads((folder / "chat.json").read_text())
    rows[2]["messages"].append({"role": "user", "content": "And now?"})
    (folder / "chat.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match="'chat' row 2 has no answer, or turns out of order"):
        config(folder, "chat")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no dataset_info.json"), ("{", "cannot be read as JSON"), ("[]", "is a list")],
)
def test_a_dataset_info_that_is_missing_or_broken_is_one_line(folder, content, message):
    path = folder / "dataset_info.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=message):
        config(folder)


@pytest.mark.parametrize("name", ["train.json", "train", "dataset_info.json"])
def test_only_a_yaml_file_is_written(folder, name):
    with pytest.raises(UserError, match=r"must end in .yaml or .yml"):
        train_config(folder / name, "my_dpo", dataset_dir=folder, base_model=MODEL)


@pytest.mark.parametrize(
    ("removed", "message"),
    [("tokenizer*", "has no tokenizer; give the folder of a whole model"), ("chat_template*", "has no chat template")],
)
def test_a_model_without_tokenizer_or_chat_template_is_one_line(folder, removed, message):
    model = copy_of(MODEL, folder)
    for path in model.glob(removed):
        path.unlink()
    with pytest.raises(UserError, match=message):
        config(folder, base_model=model)


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_the_file_and_says_how_to_train(folder, capsys):
    output = str(folder / "dpo.yaml")
    given = ["--dataset-dir", folder, "--dataset", "my_dpo", "--base-model", MODEL, "--output", output]
    more = ["--pref-loss", "orpo", "--epochs", 1, "--device", "cpu"]
    assert main(["train-config", *map(str, [*given, *more])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("12 rows, prompt and answer: median ")
    assert lines[1:] == [f"wrote {output}", f"llamafactory-cli train {output}"]
    assert yaml.safe_load(Path(output).read_text())["pref_loss"] == "orpo"


def test_the_command_that_is_printed_is_quoted_for_a_shell(folder):
    path = folder / "my runs" / "x;y.yaml"
    assert str(config(folder, output=path)).endswith(f"\nllamafactory-cli train '{path}'")


def test_a_mistake_on_the_command_line_is_one_line_and_code_2(folder, capsys, caplog):
    caplog.set_level(logging.WARNING)
    given = ["--dataset-dir", folder, "--dataset", "my_dpo", "--base-model", MODEL, "--output", folder / "dpo.yaml"]
    assert main(["train-config", *map(str, given), "--pref-loss", "ipo"]) == 2
    assert capsys.readouterr().err == "t2s-pref: pref_loss is 'ipo'; it must be one of sigmoid, orpo, simpo.\n"
    assert not (folder / "dpo.yaml").exists()

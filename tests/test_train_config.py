"""Training files that are run as they are written, by real LLaMA-Factory: each on a few of the bundled rows."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from datasets import Dataset
from llamafactory_training import run_training
from transformers import AutoTokenizer

from t2s_pref import demo_files, load_sft, save_llamafactory, write_dpo_config, write_sft_config
from t2s_pref.formats import FORMATS
from t2s_pref.prompts import messages

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROWS = 16
MODEL, REASONER = demo_files().model, demo_files().reasoner
NO_THOUGHT = "{% if not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
# One step over all rows: its loss is that before the first update.
ONE_STEP = {"epochs": 1, "gradient_accumulation": ROWS}


class Run(NamedTuple):
    """What a finished run said and wrote."""

    log: str
    loss: float
    rows: int
    output: Path


def run(config: Path) -> Run:
    """Run a training file as it is."""
    log = run_training(config)
    assert "Dropped" not in log
    output = config.parent / re.search(r"^output_dir: (.+)$", config.read_text(), re.MULTILINE)[1]
    results = json.loads((output / "train_results.json").read_text(encoding="utf-8"))
    rows = int(re.search(r"Num examples = (\d+)", log)[1])
    return Run(log, results["train_loss"], rows, output)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mydata")


@pytest.fixture(scope="module")
def golds(folder: Path) -> Dataset:
    rows = load_sft(demo_files().train).select(range(ROWS))
    save_llamafactory(rows, folder / "my_sft.json")
    return rows


@pytest.fixture(scope="module")
def pairs(golds: Dataset, folder: Path) -> Dataset:
    """Each row's gold against that of the row after."""
    outputs = golds["output"]
    rows = golds.rename_column("output", "chosen").add_column("rejected", [*outputs[1:], outputs[0]])
    save_llamafactory(rows, folder / "my_dpo.json")
    save_llamafactory(rows.select(range(4)), folder / "other.jsonl", formatting="sharegpt")
    return rows


def options(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    return {"dataset_dir": folder, "base_model": MODEL, "device": "cpu", "output_dir": f"saves/{name}", **more}


@pytest.fixture(scope="module")
def adapter(golds: Dataset, folder: Path) -> Run:
    """An SFT adapter, trained so fast that it is another model than its base."""
    config = write_sft_config(
        folder / "sft.yaml",
        "my_sft",
        **options(folder, "sft", learning_rate=1e-2, epochs=2, gradient_accumulation=4),
    )
    return run(config)


def test_supervised_rows_are_trained_on_whole(adapter: Run, golds: Dataset) -> None:
    assert adapter.rows == ROWS
    assert (adapter.output / "adapter_model.safetensors").exists()
    assert f"labels:\n{golds[0]['output']}<|im_end|>" in adapter.log


def test_dpo_starts_from_the_adapter_as_its_own_reference(adapter: Run, pairs: Dataset, folder: Path) -> None:
    given = options(folder, "dpo", adapter_path=adapter.output, **ONE_STEP)
    done = run(write_dpo_config(folder / "dpo.yaml", "my_dpo", **given))
    assert "Merged 1 adapter(s)" in done.log
    assert done.rows == ROWS
    assert done.loss == pytest.approx(math.log(2), abs=1e-4)
    assert json.loads((done.output / "adapter_config.json").read_text())["r"] == 32


def test_two_datasets_are_mixed_with_their_probabilities(pairs: Dataset, folder: Path) -> None:
    given = options(folder, "mixed", probs=[0.5, 0.5], lora_rank=4, **ONE_STEP)
    done = run(write_dpo_config(folder / "mixed.yaml", ["my_dpo", "other"], **given))
    assert 4 <= done.rows < ROWS  # until the smaller one is used up
    assert done.loss == pytest.approx(math.log(2), abs=1e-4)


def test_all_weights_are_trained_against_the_model_that_they_were(pairs: Dataset, folder: Path) -> None:
    given = options(folder, "full", finetuning="full", max_samples=8, **ONE_STEP)
    done = run(write_dpo_config(folder / "full.yaml", "my_dpo", **given))
    assert done.rows == 8
    # the weights that are trained are in float32, those of the reference as they are stored, in bfloat16
    assert done.loss == pytest.approx(math.log(2), abs=5e-3)
    assert (done.output / "model.safetensors").exists()


@pytest.mark.parametrize("loss", ["orpo", "simpo"])
def test_losses_without_a_reference_are_their_own(adapter: Run, pairs: Dataset, folder: Path, loss: str) -> None:
    given = options(folder, loss, adapter_path=adapter.output, pref_loss=loss, max_samples=4, **ONE_STEP)
    done = run(write_dpo_config(folder / f"{loss}.yaml", "my_dpo", **given))
    assert math.isfinite(done.loss)
    assert done.loss != pytest.approx(math.log(2), abs=1e-2)


def test_the_reasoning_of_supervised_rows_is_learnt_after_the_prompt_that_is_sampled_with(
    golds: Dataset, folder: Path
) -> None:
    hybrid = folder / "hybrid"
    shutil.copytree(REASONER, hybrid)
    with open(hybrid / "chat_template.jinja", "a", encoding="utf-8") as file:
        file.write("{% if add_generation_prompt %}" + NO_THOUGHT + "{% endif %}")  # as Qwen3's
    turns = [["How many tables are there?", "SELECT count(*) FROM sqlite_master"]]
    think = FORMATS["think"].write
    rows = golds.map(lambda row: {"output": think("One table is enough.", row["output"]), "history": turns})
    save_llamafactory(rows, folder / "cot.json")
    config = write_sft_config(folder / "cot.yaml", "cot", **options(folder, "cot", base_model=hybrid, epochs=1))
    assert "template: qwen3\nenable_thinking: true\n" in config.read_text()
    done = run(config)
    assert done.rows == ROWS
    prompt = AutoTokenizer.from_pretrained(hybrid).apply_chat_template(
        messages(rows[0]), add_generation_prompt=True, tokenize=False, enable_thinking=True
    )
    answer = f"{rows[0]['output']}<|im_end|>\n"
    assert f"inputs:\n{prompt}{answer}" in done.log
    assert f"labels:\n{answer}" in done.log

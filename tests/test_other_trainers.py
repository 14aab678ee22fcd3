"""The recipes for axolotl and Unsloth load pairs in TRL's layout: every row, with the tokens of its prompt and answers.

Three roads: axolotl on the conversations, with its own chat template strategy; axolotl on rows made strings, for a
model that can think and was sampled without; Unsloth on rows made strings. Each goes through the real loader, from a
stand-in for the Hub or from a file, to one step of the tool's DPO trainer.
"""

import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import dpo_step
import pytest
from datasets import Dataset, load_from_disk
from loopback_hub import LoopbackHub
from other_venvs import axolotl_venv, unsloth_venv
from transformers import AutoTokenizer

from t2s_pref import demo_files, lineage, load_sft, to_trl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROWS = 24
SYSTEM = "You write SQLite. “Answer” with one query."
HISTORY = [["How many tables are there?", "SELECT count(*) FROM sqlite_master WHERE type = 'table'"]]
REPOSITORY = "user/pairs"
CARD = """\
---
configs:
- config_name: default
  data_files: trl.parquet
  default: true
- config_name: alpaca
  data_files: alpaca.parquet
---
"""

# A recipe of the README; below it what a run on a CPU needs.
AXOLOTL = """\
base_model: {model}
chat_template: tokenizer_default
rl: dpo
datasets:
  - path: user/pairs
    split: train
    type: chat_template.default
    field_messages: prompt
sequence_len: 4096
learning_rate: 0.000005
"""
AXOLOTL_TEXTS = """\
base_model: {model}
chat_template: tokenizer_default
rl: dpo
datasets:
  - path: texts.jsonl
    ds_type: json
sequence_len: 4096
learning_rate: 0.000005
"""
# How Qwen3's template opens an answer without thinking.
NO_THOUGHT = "{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"


class Step(NamedTuple):
    """What a tool made of the rows, the losses it reported, and the tokens that the package stands for."""

    tokens: list[tuple[list[int], ...]]
    losses: list[float]
    expected: list[tuple[list[int], ...]]


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    """Rows of which some have a system message, some a history, some both, as conversations."""
    rows = load_sft(demo_files().train).select(range(ROWS)).map(pair, with_indices=True)
    lineage.note(rows, step=lineage.SAMPLED, settings={"enable_thinking": False})
    return to_trl(rows).select_columns(["prompt", "chosen", "rejected", "chat_template_kwargs"])


def pair(row: dict[str, Any], index: int) -> dict[str, Any]:
    row = {**row, "system": SYSTEM if index % 2 else "", "history": HISTORY if index % 4 > 1 else []}
    return {**row, "chosen": row["output"], "rejected": f"```sql\nSELECT count(*)\nFROM ({row['output']})\n```"}


@pytest.fixture(scope="module")
def hub(pairs: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    folder = tmp_path_factory.mktemp("repository")
    pairs.to_parquet(folder / "trl.parquet")
    Dataset.from_list([{"instruction": "No pair."}]).to_parquet(folder / "alpaca.parquet")
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    with LoopbackHub() as hub:
        hub.add("dataset", REPOSITORY, folder)
        yield hub


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, with a template that can open an answer with an empty thought."""
    model = tmp_path_factory.mktemp("thinker") / "model"
    shutil.copytree(demo_files().model, model)
    template = model / "chat_template.jinja"
    text = template.read_text(encoding="utf-8").rstrip()
    assert text.endswith("{% endif %}")
    template.write_text(text.removesuffix("{% endif %}") + NO_THOUGHT, encoding="utf-8")
    return model


@pytest.fixture(scope="module", params=["axolotl", "axolotl-texts", "unsloth"])
def step(
    request: pytest.FixtureRequest,
    pairs: Dataset,
    hub: LoopbackHub,
    thinker: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Step:
    folder = tmp_path_factory.mktemp(request.param)
    model = Path(demo_files().model) if request.param == "axolotl" else thinker
    tokenizer = AutoTokenizer.from_pretrained(model)
    if request.param == "unsloth":
        tool, python, data = "unsloth", unsloth_venv() / "bin" / "python", REPOSITORY
    else:
        tool, python = "axolotl", axolotl_venv() / "bin" / "python"
        if request.param == "axolotl-texts":
            pairs.map(dpo_step.as_text, fn_kwargs={"tokenizer": tokenizer}).to_json(folder / "texts.jsonl")
        data = preprocess(AXOLOTL if request.param == "axolotl" else AXOLOTL_TEXTS, model, folder, hub)
    run([python, dpo_step.__file__, tool, model, data, folder], folder, hub)
    sides = ("prompt_ids", "chosen_ids", "rejected_ids")
    tokens = [tuple(row[side] for side in sides) for row in load_from_disk(folder / "tokens")]
    losses = json.loads((folder / "losses.json").read_text(encoding="utf-8"))
    return Step(sorted(tokens), losses, sorted(expected(row, tokenizer) for row in pairs))


def preprocess(recipe: str, model: Path, folder: Path, hub: LoopbackHub) -> Path:
    """Run `axolotl preprocess`; return the folder of the dataset that it prepared."""
    config = folder / "dpo.yaml"
    config.write_text(recipe.format(model=model), encoding="utf-8")
    run([axolotl_venv() / "bin" / "axolotl", "preprocess", config, "--no-download"], folder, hub)
    return next(folder.glob("last_run_prepared/*/dataset_info.json")).parent


def run(command: list[str | Path], folder: Path, hub: LoopbackHub) -> None:
    environment = {key: value for key, value in hub.environment(folder / "home").items() if key != "PYTHONPATH"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "AXOLOTL_DO_NOT_TRACK": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    done = subprocess.run(
        [os.fspath(word) for word in command],
        cwd=folder,
        env=environment,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-5000:]


def expected(row: dict[str, Any], tokenizer: Any) -> tuple[list[int], ...]:
    """The tokens of the prompt that was sampled from, and of both answers, each with one EOS token at its end."""
    prompt = tokenizer.apply_chat_template(
        row["prompt"], add_generation_prompt=True, return_dict=False, **row["chat_template_kwargs"]
    )
    answers = [row[side][0]["content"] + tokenizer.eos_token for side in ("chosen", "rejected")]
    return prompt, *(tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers)


def test_no_row_is_dropped(step: Step) -> None:
    assert len(step.tokens) == ROWS


def test_the_trainer_sees_the_tokens_of_each_prompt_and_of_its_answers(step: Step) -> None:
    assert step.tokens == step.expected


def test_the_first_loss_is_log_2(step: Step) -> None:
    """Policy and reference are one model before the first update."""
    assert step.losses == [pytest.approx(math.log(2), abs=1e-2)]

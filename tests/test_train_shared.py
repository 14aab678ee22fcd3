"""One DPO step on the same pairs by each road: a local file in either layout, and a dataset that was pushed.

Real LLaMA-Factory takes the files and the pushed dataset (`REMOTE:`, with no local file), real TRL the pushed one's
`default` configuration. Each must train on the tokens that the candidates were sampled from.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hub_scripts import run
from llamafactory_training import IGNORED, train
from loopback_hub import LoopbackHub
from transformers import AutoTokenizer

from t2s_pref import (
    SamplingSettings,
    TransformersEngine,
    demo_files,
    explode_rejected,
    generate_rejected,
    load_sft,
    save_llamafactory,
)
from t2s_pref.prompts import messages

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

FILES = demo_files()
SYSTEM = "You write SQLite. Answer with one query."
HISTORY = [["How many tables are there?", "SELECT count(*) FROM sqlite_master WHERE type = 'table'"]]
LOG_2 = pytest.approx(math.log(2), abs=1e-3)

TRAIN_WITH_TRL = """
from trl import DPOConfig, DPOTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(given["model"]), AutoTokenizer.from_pretrained(given["model"])
rows = load_dataset("user/pairs", split="train")
options = {"max_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": "none", "use_cpu": True}
trainer = DPOTrainer(model, args=DPOConfig(given["output"], max_length=None, **options), train_dataset=rows,
    processing_class=tokenizer)
trainer.train()
results += [[log["loss"] for log in trainer.state.log_history if "loss" in log], len(rows)]
results.append(trainer.train_dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).to_list())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def pairs(folder: Path) -> Dataset:
    """Pairs of plain rows, and of rows with a system message, a history, or both."""

    def as_chat(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {"system": SYSTEM if index % 2 else "", "history": HISTORY if index % 4 > 1 else []}

    rows = load_sft(load_sft(FILES.train).select(range(8)).map(as_chat, with_indices=True))
    settings = SamplingSettings(num_rejects=2, max_new_tokens=96, temperature=1.0)
    engine = TransformersEngine(FILES.model, device="cpu")
    rows = generate_rejected(rows, engine, settings, databases=FILES.databases, cache_dir=folder)
    pairs = explode_rejected(rows, dedup="normalized", cache_dir=folder)
    assert {bool(system) for system in pairs["system"]} == {True, False}
    return pairs


@pytest.fixture(scope="module")
def hub(pairs: Dataset, folder: Path) -> Iterator[LoopbackHub]:
    """A Hub to which the pairs were pushed."""
    pairs.save_to_disk(folder / "saved")
    with LoopbackHub() as hub:
        (pushed,) = run(hub, folder / "pusher", "push(load_from_disk(given['pairs']))", pairs=folder / "saved")
        assert isinstance(pushed, list), pushed
        yield hub


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FILES.model)


def prompt_of(row: dict[str, Any], tokenizer: Any) -> list[int]:
    return tokenizer.apply_chat_template(
        messages(row), add_generation_prompt=True, enable_thinking=False, return_dict=False
    )


@pytest.mark.parametrize("road", ["alpaca", "sharegpt", "pushed"])
def test_llamafactory_trains_on_every_pair_by_each_road(
    road: str, pairs: Dataset, folder: Path, tokenizer: Any, request: pytest.FixtureRequest
) -> None:
    if road == "pushed":
        environment = request.getfixturevalue("hub").environment(folder / "trainer")
        where = {"environment": environment, "dataset": "pairs", "dataset_dir": "REMOTE:user/pairs"}
    else:
        save_llamafactory(pairs, folder / f"{road}.json", formatting=road)
        where = {}
    trained = train(
        folder,
        pairs,
        road,
        **where,
        stage="dpo",
        pref_beta=0.1,
        pref_loss="sigmoid",
        max_steps=1,
        model_name_or_path=FILES.model,
    )
    assert len(trained.tokens) == len(pairs)
    assert "Dropped" not in trained.log
    assert trained.losses == [LOG_2]
    for row, tokens in zip(pairs, trained.tokens, strict=True):
        for side in ("chosen", "rejected"):
            labels = tokens[f"{side}_labels"]
            assert tokens[f"{side}_input_ids"][: labels.count(IGNORED)] == prompt_of(row, tokenizer)
            assert tokenizer.decode([each for each in labels if each != IGNORED]) == f"{row[side]}<|im_end|>\n"


def test_trl_trains_on_every_pair_of_the_default_configuration(
    hub: LoopbackHub, pairs: Dataset, folder: Path, tokenizer: Any
) -> None:
    losses, rows, trained = run(hub, folder / "trl", TRAIN_WITH_TRL, model=FILES.model, output=folder / "trl-trained")
    assert losses == [LOG_2]
    assert rows == len(pairs) == len(trained)
    given = [(prompt_of(row, tokenizer), row["chosen"], row["rejected"]) for row in pairs]
    found = [
        (row["prompt_ids"], *(tokenizer.decode(row[f"{side}_ids"]) for side in ("chosen", "rejected")))
        for row in trained
    ]
    ended = [(prompt, *(f"{answer}<|im_end|>\n" for answer in answers)) for prompt, *answers in given]
    assert sorted(map(json.dumps, found)) == sorted(map(json.dumps, ended))

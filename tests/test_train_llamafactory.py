"""What this package writes, real LLaMA-Factory trains on: every row, with the prompt the candidates were sampled from.

Two roads, each from the bundled data and model through sampling, export, one SFT run and one DPO run on its adapter:
`plain` rows as they are, and `chat` rows of which some have a system message, some a history, some both.
"""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from llamafactory_training import IGNORED, STEPS, Training, train
from transformers import AutoTokenizer

from t2s_pref import (
    SamplingSettings,
    demo_files,
    explode_rejected,
    generate_rejected,
    load_sft,
    save_llamafactory,
)
from t2s_pref.prompts import messages

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROWS = 24
SYSTEM = "You write SQLite. Answer with one query."
HISTORY = [["How many tables are there?", "SELECT count(*) FROM sqlite_master WHERE type = 'table'"]]


def as_chat(row: dict[str, Any], index: int) -> dict[str, Any]:
    return {"system": SYSTEM if index % 2 else "", "history": HISTORY if index % 4 > 1 else []}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo_files().model)


@pytest.fixture(scope="module", params=["plain", "chat"])
def road(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def rows(road: str) -> Dataset:
    rows = load_sft(demo_files().train).select(range(ROWS))
    return load_sft(rows.map(as_chat, with_indices=True)) if road == "chat" else rows


@pytest.fixture(scope="module")
def folder(road: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(road)


@pytest.fixture(scope="module")
def sft(rows: Dataset, folder: Path) -> Training:
    save_llamafactory(rows, folder / "sft.json", name="sft")
    return train(folder, rows, "sft", stage="sft", model_name_or_path=demo_files().model)


@pytest.fixture(scope="module")
def dpo(rows: Dataset, folder: Path, sft: Training) -> Training:
    sampled = generate_rejected(
        rows, demo_files().model, SamplingSettings(num_rejects=3, max_new_tokens=96), cache_dir=folder
    )
    pairs = explode_rejected(sampled, dedup="normalized", cache_dir=folder)
    assert len(pairs) > 0
    save_llamafactory(pairs, folder / "dpo.json", name="dpo")
    return train(
        folder,
        pairs,
        "dpo",
        stage="dpo",
        pref_beta=0.1,
        pref_loss="sigmoid",
        model_name_or_path=demo_files().model,
        adapter_name_or_path=str(sft.output),
        create_new_adapter=True,  # without it the reference is the bare base model
    )


def test_no_row_is_dropped(sft: Training, dpo: Training) -> None:
    for training in (sft, dpo):
        counted = re.search(r"Num examples = ([\d,]+)", training.log)
        assert counted, training.log[-5000:]
        assert int(counted[1].replace(",", "")) == len(training.tokens) == len(training.rows)
        assert "Dropped" not in training.log


def test_every_step_has_a_finite_loss(sft: Training, dpo: Training) -> None:
    for training in (sft, dpo):
        assert len(training.losses) == STEPS
        assert all(math.isfinite(loss) and loss > 0 for loss in training.losses)


def test_the_first_dpo_loss_is_log_2(dpo: Training) -> None:
    """Policy and reference are one model before the first update; the base without its SFT adapter is another."""
    assert dpo.losses[0] == pytest.approx(math.log(2), abs=1e-3)


def test_dpo_trains_on_the_prompt_that_was_sampled_from(dpo: Training, tokenizer: Any) -> None:
    for row, tokens in zip(dpo.rows, dpo.tokens, strict=True):
        for side in ("chosen", "rejected"):
            length = tokens[f"{side}_labels"].count(IGNORED)
            assert tokens[f"{side}_input_ids"][:length] == prompt_tokens(row, tokenizer)


def test_dpo_trains_on_the_whole_of_both_answers(dpo: Training, tokenizer: Any) -> None:
    for row, tokens in zip(dpo.rows, dpo.tokens, strict=True):
        for side in ("chosen", "rejected"):
            answer = [label for label in tokens[f"{side}_labels"] if label != IGNORED]
            assert tokenizer.decode(answer) == f"{row[side]}<|im_end|>\n"


def test_sft_trains_on_the_whole_conversation(sft: Training, tokenizer: Any) -> None:
    for row, tokens in zip(sft.rows, sft.tokens, strict=True):
        ids = prompt_tokens(row, tokenizer)
        assert tokens["input_ids"][: len(ids)] == ids
        assert tokens["labels"][len(ids) :] == tokens["input_ids"][len(ids) :]
        assert tokenizer.decode(tokens["input_ids"][len(ids) :]) == f"{row['output']}<|im_end|>\n"


def prompt_tokens(row: dict[str, Any], tokenizer: Any) -> list[int]:
    return tokenizer.apply_chat_template(
        messages(row), add_generation_prompt=True, enable_thinking=False, return_dict=False
    )

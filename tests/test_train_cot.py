"""Chains of thought in real LLaMA-Factory: it trains on the reasoning of SFT rows and of both sides of a pair.

The road of `t2s-pref cot` and `reject --cot` in either format, each with the training keys that fit the model. What
is trained on is read from the tokens and labels that LLaMA-Factory made.
"""

import math
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from llamafactory_training import IGNORED, STEPS, Training, train
from transformers import AutoTokenizer

from t2s_pref import (
    SamplingSettings,
    TransformersEngine,
    demo_files,
    explode_cot,
    explode_rejected,
    generate_cot,
    generate_rejected,
    load_sft,
    save_llamafactory,
)
from t2s_pref.formats import FORMATS
from t2s_pref.prompts import messages
from t2s_pref.templates import training_keys

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

FILES = demo_files()
ROWS = 24


@pytest.fixture(scope="module", params=["fenced", "think"])
def style(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(style: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(style)


@pytest.fixture(scope="module")
def settings(style: str) -> SamplingSettings:
    return SamplingSettings(num_rejects=3, max_new_tokens=256, answer_format=style)


@pytest.fixture(scope="module")
def taught(settings: SamplingSettings, folder: Path) -> Dataset:
    rows = load_sft(FILES.train).select(range(ROWS))
    return generate_cot(rows, FILES.reasoner, settings, databases=FILES.databases, cache_dir=folder)


def keys_of(style: str, rows: Dataset) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(FILES.reasoner)
    return training_keys(tokenizer, rows, enable_thinking=bool(FORMATS[style].thinking))


@pytest.fixture(scope="module")
def sft(taught: Dataset, style: str, folder: Path) -> Training:
    rows = explode_cot(taught, cache_dir=folder)
    save_llamafactory(rows, folder / "cot_sft.json")
    keys = {"stage": "sft", "model_name_or_path": FILES.reasoner, **keys_of(style, rows)}
    return train(folder, rows, "cot_sft", **keys)


@pytest.fixture(scope="module")
def dpo(taught: Dataset, style: str, settings: SamplingSettings, folder: Path, sft: Training) -> Training:
    policy = TransformersEngine(FILES.reasoner, adapter_path=str(sft.output), device="cpu")
    sampled = generate_rejected(
        taught, policy, settings, databases=FILES.databases, chosen="own_or_gold", cache_dir=folder
    )
    pairs = explode_rejected(sampled, dedup="normalized", chosen="own_or_gold", cache_dir=folder)
    save_llamafactory(pairs, folder / "cot_dpo.json")
    return train(
        folder,
        pairs,
        "cot_dpo",
        stage="dpo",
        pref_beta=0.1,
        pref_loss="sigmoid",
        model_name_or_path=FILES.reasoner,
        adapter_name_or_path=str(sft.output),
        create_new_adapter=True,
        **keys_of(style, pairs),
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FILES.reasoner)


def test_both_files_train_a_step_and_no_row_is_dropped(sft: Training, dpo: Training) -> None:
    for training in (sft, dpo):
        assert len(training.tokens) == len(training.rows) > 5
        assert "Dropped" not in training.log
        assert len(training.losses) == STEPS
        assert all(math.isfinite(loss) and loss > 0 for loss in training.losses)
    assert dpo.losses[0] == pytest.approx(math.log(2), abs=1e-3)


def test_the_reasoning_of_a_supervised_row_is_in_the_loss(sft: Training, style: str, tokenizer: Any) -> None:
    for row, tokens in zip(sft.rows, sft.tokens, strict=True):
        learnt = trained(tokens["labels"], tokenizer)
        assert learnt == f"{row['output']}<|im_end|>\n"
        assert FORMATS[style].read(row["output"]).reasoning in learnt


def test_the_reasoning_of_both_sides_of_a_pair_is_in_the_loss(dpo: Training, style: str, tokenizer: Any) -> None:
    for row, tokens in zip(dpo.rows, dpo.tokens, strict=True):
        for side in ("chosen", "rejected"):
            learnt = trained(tokens[f"{side}_labels"], tokenizer)
            assert learnt == f"{row[side]}<|im_end|>\n"
            assert FORMATS[style].read(row[side]).reasoning in learnt


def test_the_prompt_is_the_one_that_was_sampled_from(dpo: Training, style: str, tokenizer: Any) -> None:
    for row, tokens in zip(dpo.rows, dpo.tokens, strict=True):
        prompt = tokenizer.apply_chat_template(
            messages(row), add_generation_prompt=True, enable_thinking=style == "think", return_dict=False
        )
        for side in ("chosen", "rejected"):
            length = tokens[f"{side}_labels"].count(IGNORED)
            assert tokens[f"{side}_input_ids"][:length] == prompt


def trained(labels: list[int], tokenizer: Any) -> str:
    """The text that is learnt."""
    return tokenizer.decode([label for label in labels if label != IGNORED])

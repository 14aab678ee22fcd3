"""Training runs of real LLaMA-Factory, for the slow tests."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, load_from_disk
from llamafactory_venv import llamafactory_venv

STEPS = 2
IGNORED = -100  # the label of a token that is not trained on


@dataclass
class Training:
    """A finished run: the rows it was given, the tokens it made of them, and what it reported."""

    rows: Dataset
    tokens: Dataset
    log: str
    losses: list[float]
    output: Path


def run_training(config: Path, environment: dict[str, str] | None = None) -> str:
    """Run `llamafactory-cli train` on a training file in its folder; the log. Without an `environment`, offline."""
    environment = environment or {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(config.parent / "home")}
    environment = {key: value for key, value in environment.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [llamafactory_venv() / "bin" / "llamafactory-cli", "train", config],
        cwd=config.parent,
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def train(
    folder: Path, rows: Dataset, name: str, environment: dict[str, str] | None = None, **settings: Any
) -> Training:
    """Run `llamafactory-cli train` on the dataset `name` that was saved in `folder`, for `STEPS` steps on the CPU.

    With an `environment`, on whatever Hub it names.
    """
    output, tokenized = folder / f"{name}-trained", folder / f"{name}-tokens"
    config = folder / f"{name}.yaml"
    settings = {
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": 8,
        "template": "qwen3_nothink",
        "dataset": name,
        "dataset_dir": str(folder),
        "cutoff_len": 4096,
        "tokenized_path": str(tokenized),  # it keeps what it trained on there
        "output_dir": str(output),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,  # so high that the adapter of two SFT steps is told from none
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        **settings,
    }
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    log = run_training(config, environment)
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    return Training(rows, load_from_disk(tokenized)["train"], log, losses, output)

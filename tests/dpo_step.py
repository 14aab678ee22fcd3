"""One DPO step of another trainer, run by the Python of its environment: dpo_step.py axolotl|unsloth MODEL DATA OUTPUT.

OUTPUT gets `tokens`, a dataset on disk of what the trainer made of each row, and `losses.json`.
"""

import json
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "max_steps": 1,
    "max_length": 4096,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
}


def as_text(row: dict[str, Any], tokenizer: Any) -> dict[str, str]:
    """A row of TRL's conversations as strings. TRL ends each answer with the EOS token itself."""
    thinking = row.get("chat_template_kwargs") or {}
    prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True, **thinking)
    return {"prompt": prompt, "chosen": row["chosen"][0]["content"], "rejected": row["rejected"][0]["content"]}


def axolotl(model: str, prepared: str, output: Path) -> Any:
    """Axolotl's DPO trainer on what `axolotl preprocess` made."""
    from axolotl.core.trainers.dpo.args import AxolotlDPOConfig
    from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
    from datasets import load_from_disk
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AxolotlDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        processing_class=AutoTokenizer.from_pretrained(model),
        train_dataset=load_from_disk(prepared),
        args=AxolotlDPOConfig(output_dir=str(output), **SETTINGS),
    )


def unsloth(model: str, repository: str, output: Path) -> Any:
    """TRL's DPO trainer after `import unsloth`, on rows from the Hub that were made strings."""
    from unsloth import FastLanguageModel  # isort: skip: before TRL, which it patches

    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    policy, tokenizer = FastLanguageModel.from_pretrained(model, max_seq_length=4096, load_in_4bit=False)
    policy = FastLanguageModel.get_peft_model(policy, r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    pairs = load_dataset(repository, split="train").map(as_text, fn_kwargs={"tokenizer": tokenizer})
    arguments = DPOConfig(output_dir=str(output), **SETTINGS)
    return DPOTrainer(model=policy, processing_class=tokenizer, train_dataset=pairs, args=arguments)


if __name__ == "__main__":
    output = Path(sys.argv[4])
    trainer = {"axolotl": axolotl, "unsloth": unsloth}[sys.argv[1]](*sys.argv[2:4], output)
    trainer.train_dataset.save_to_disk(output / "tokens")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    (output / "losses.json").write_text(json.dumps(losses), encoding="utf-8")

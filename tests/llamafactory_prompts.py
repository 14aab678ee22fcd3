"""What LLaMA-Factory makes of rows under its templates: runs in its own environment, reads and writes JSON.

`python llamafactory_prompts.py JOBS RESULTS`: each job is a tokenizer's folder, a dataset folder, keys of a training
file and where to save the tokenizer as training would. The functions are those that `llamafactory-cli train` calls.
"""

import json
import sys
from pathlib import Path
from typing import Any

# For each stage: the stage's own name for the dataset that it reads, and the dataset's name and keys.
STAGES = {"dpo": ("rm", "pairs", {}), "sft": ("sft", "sft", {}), "masked": ("sft", "sft", {"mask_history": True})}


def encode(job: dict[str, Any]) -> dict[str, Any]:
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    result: dict[str, Any] = {}
    for name, (stage, dataset, keys) in STAGES.items():
        arguments = {
            "model_name_or_path": job["tokenizer"],
            "stage": "dpo" if stage == "rm" else "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "dataset": dataset,
            "dataset_dir": job["data"],
            "cutoff_len": 32768,
            "overwrite_cache": True,
            "output_dir": job["saved"],
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            **keys,
            **job["keys"],
        }
        model_args, data_args, training_args, _, _ = get_train_args(arguments)
        loaded = load_tokenizer(model_args)
        template = get_template_and_fix_tokenizer(loaded["tokenizer"], data_args)
        rows = get_dataset(template, model_args, data_args, training_args, stage=stage, **loaded)["train_dataset"]
        result[name] = rows.to_dict()
    loaded["tokenizer"].save_pretrained(job["saved"])
    return result


if __name__ == "__main__":
    jobs, results = map(Path, sys.argv[1:])
    read = json.loads(jobs.read_text(encoding="utf-8"))
    results.write_text(json.dumps([encode(job) for job in read]), encoding="utf-8")

"""Training files for LLaMA-Factory that run as they are: `write_dpo_config`, `write_sft_config`.

Written for LLaMA-Factory 0.9.5, and run by it in the slow tests. What is not its default and does something stands in
the file, nothing else. Not covered: DeepSpeed and FSDP, evaluation sets, several adapters.
"""

import logging
import math
import os
import re
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from t2s_pref.cutoff import cutoff_len as fitting_cutoff
from t2s_pref.cutoff import load_tokenizer, row_lengths, template_keys, thinking_mode
from t2s_pref.entries import Entry, find_entries
from t2s_pref.errors import UserError
from t2s_pref.files import atomic_write, check_writable
from t2s_pref.starting import absolute, check_finetuning, check_output, starting_adapter, starting_model

logger = logging.getLogger(__name__)

FINETUNING = ("lora", "qlora", "full")
MIXES = ("concat", "interleave_under", "interleave_over")
DEVICES = ("auto", "cuda", "cpu")
REPORTS = ("none", "wandb", "tensorboard", "swanlab", "mlflow", "trackio")
# The others that LLaMA-Factory has in its list (hinge, ipo, kto_pair) train silently as sigmoid. SimPO averages over
# tokens, so that its beta is an order larger than that of the sums of DPO (Meng et al., arXiv 2405.14734).
BETAS = {"sigmoid": 0.1, "orpo": 0.1, "simpo": 2.0}
# LLaMA-Factory's own examples; the source recipe's 5e-5 for DPO degenerates models.
RATES = {("dpo", "lora"): 5e-6, ("dpo", "full"): 5e-6, ("sft", "lora"): 1e-4, ("sft", "full"): 1e-5}


@dataclass(frozen=True)
class TrainConfig:
    """A training file that was written: where, for which stage, its keys, and the tokens of each row."""

    path: Path
    stage: str
    keys: dict[str, Any]
    lengths: tuple[int, ...]

    @property
    def measured(self) -> str:
        """How long the rows are, in one line."""
        longest, median = max(self.lengths), round(statistics.median(self.lengths))
        return f"{len(self.lengths)} rows, prompt and answer: median {median}, longest {longest} tokens"

    def __str__(self) -> str:
        lines = [self.measured, f"wrote {self.path}", f"llamafactory-cli train {shlex.quote(str(self.path))}"]
        if "create_new_adapter" in self.keys:
            both = f"{self.keys['adapter_name_or_path']},{self.keys['output_dir']}"
            lines.append(f"what is trained lies on top of that adapter: use both, adapter_name_or_path: {both}")
        return "\n".join(lines)


def write_dpo_config(
    output: str | os.PathLike[str],
    datasets: str | Sequence[str],
    *,
    dataset_dir: str | os.PathLike[str],
    **options: Any,
) -> Path:
    """Write the YAML with which `llamafactory-cli train` trains on preference pairs.

    Args:
        output: the file, `.yaml` or `.yml`.
        datasets: names in the `dataset_info.json` of `dataset_dir`; several are mixed.
        dataset_dir: the folder of `dataset_info.json`, or `REMOTE:user/repo`.
        **options: of [`train_config`], which both stages share.

    Raises:
        [`UserError`]: where they are no preference data, and what [`train_config`] refuses. Nothing is written then.

    >>> import tempfile
    >>> from datasets import Dataset
    >>> from t2s_pref import demo_files, save_llamafactory
    >>> pair = {"instruction": "How many books?", "input": "", "chosen": "SELECT count(*) FROM book"}
    >>> pairs = Dataset.from_list([{**pair, "rejected": "SELECT count(*) FROM loan"}])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     data = save_llamafactory(pairs, f"{folder}/my_dpo.json")
    ...     model = demo_files().model
    ...     path = write_dpo_config(f"{folder}/dpo.yaml", "my_dpo", dataset_dir=folder, base_model=model, device="cpu")
    ...     print(path.read_text().partition("### method")[2].partition("### dataset")[0])
    <BLANKLINE>
    stage: dpo
    do_train: true
    finetuning_type: lora
    lora_rank: 32
    lora_target: all
    pref_beta: 0.1
    pref_loss: sigmoid
    <BLANKLINE>
    """
    return train_config(output, datasets, dataset_dir=dataset_dir, stage="dpo", **options).path


def write_sft_config(
    output: str | os.PathLike[str],
    datasets: str | Sequence[str],
    *,
    dataset_dir: str | os.PathLike[str],
    **options: Any,
) -> Path:
    """Write the YAML with which `llamafactory-cli train` trains on supervised rows, with or without reasoning.

    As [`write_dpo_config`], for data without rejects.
    """
    return train_config(output, datasets, dataset_dir=dataset_dir, stage="sft", **options).path


def train_config(
    output: str | os.PathLike[str],
    datasets: str | Sequence[str],
    *,
    dataset_dir: str | os.PathLike[str],
    stage: str | None = None,
    base_model: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    adapter_path: str | os.PathLike[str] | None = None,
    finetuning: str = "lora",
    lora_rank: int = 32,
    template: str | None = None,
    pref_loss: str = "sigmoid",
    pref_beta: float | None = None,
    mix: str | None = None,
    probs: Sequence[float] | None = None,
    cutoff_len: int | None = None,
    max_samples: int = 0,
    output_dir: str | os.PathLike[str] | None = None,
    save_steps: int = 500,
    report_to: str = "none",
    batch_size: int = 1,
    gradient_accumulation: int = 8,
    learning_rate: float | None = None,
    epochs: float = 3.0,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> TrainConfig:
    """Write the training file that the datasets need: DPO for preference pairs, SFT for supervised rows.

    Args:
        output: the file, `.yaml` or `.yml`.
        datasets: names in the `dataset_info.json` of `dataset_dir`.
        dataset_dir: the folder of `dataset_info.json`, or `REMOTE:user/repo`.
        stage: `dpo` or `sft`, refused where the datasets are of the other; what they are of where it is not given.
        base_model: folder or Hub id. Where it is not given, the Hub model that the pairs were sampled from.
        revision: branch, tag or commit of a base model from the Hub; that of the sampling where this is noted.
        adapter_path: LoRA adapter to start from, folder or Hub id: it is merged, becomes part of the DPO reference, and
            a new one is trained on top. `""` trains the base model alone, which has to be said where pairs were sampled
            with an adapter.
        finetuning: `lora`, `qlora` (LoRA on 4-bit weights) or `full`.
        lora_rank: of the adapter that is trained.
        template: LLaMA-Factory's; where it is not given, the one whose token ids are those of the chat template.
        pref_loss: `sigmoid` (DPO), `orpo` or `simpo`; the latter two have no reference model.
        pref_beta: how strongly preferences count; defaults to 0.1, and to 2.0 for `simpo`.
        mix: how several datasets are mixed: `concat` (the default), `interleave_under` until the first is used up,
            `interleave_over` until all are.
        probs: with which probability a row is drawn from each dataset; needs one of the interleaved ways, the first of
            which it implies.
        cutoff_len: most tokens of a row; defaults to what the longest has, rounded up to a multiple of 64, and 64 more
            under a template whose own lengths are not known.
        max_samples: the first rows of each dataset; 0 for all. All are measured of one with `num_samples`, which draws.
        output_dir: where the trained weights go; defaults to `saves/<model>/<finetuning>/<first dataset>`. Where
            training starts from weights in this folder, it is refused.
        save_steps: steps from one checkpoint to the next.
        report_to: `none`, `wandb`, `tensorboard`, `swanlab`, `mlflow` or `trackio`.
        batch_size: rows (pairs) that a device computes at a time; with `gradient_accumulation` rows of a step.
        gradient_accumulation: batches of a step.
        learning_rate: the highest; defaults to 5e-6 for DPO, 1e-4 for SFT, 1e-5 for SFT of all weights.
        epochs: passes over the data.
        device: where it will be trained: `cuda`, `cpu`, or `auto`, what this machine has.
        trust_remote_code: run model code that comes with the weights, here for the tokenizer and in training.

    Warns where a row will be cut, and where what is trained is not what was sampled from.

    Raises:
        [`UserError`]: a value out of its range, data, model or adapter that are not there or do not go together, a chat
            template that no template of LLaMA-Factory gives. Nothing is written then.
    """
    values = locals()
    for name, allowed in (
        *(("finetuning", FINETUNING), ("pref_loss", BETAS), ("mix", (None, *MIXES))),
        *(("report_to", REPORTS), ("device", DEVICES), ("stage", (None, "dpo", "sft"))),
    ):
        if values[name] not in allowed:
            raise UserError(f"{name} is {values[name]!r}; it must be one of {', '.join(filter(None, allowed))}.")
    for name, least in (
        *(("lora_rank", 1), ("batch_size", 1), ("gradient_accumulation", 1), ("save_steps", 1)),
        *(("max_samples", 0), *((("cutoff_len", 1),) if cutoff_len is not None else ())),
    ):
        if isinstance(values[name], bool) or not isinstance(values[name], int) or values[name] < least:
            raise UserError(f"{name} is {values[name]!r}; it must be a whole number, {least} or more.")
    for name, below in (("learning_rate", 1.0), ("epochs", math.inf), ("pref_beta", math.inf)):
        given = values[name]
        if given is not None and not (isinstance(given, int | float) and 0 < given < below):
            raise UserError(f"{name} is {given!r}; it must be above 0{' and below 1' if below == 1 else ''}.")
    try:
        path = Path(output).expanduser()
    except RuntimeError as error:
        raise UserError(f"{str(output)!r} is in the home of a user who is not known here; give the folder.") from error
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{str(output)!r} must end in .yaml or .yml; LLaMA-Factory reads no other training file.")
    check_writable(path)

    names = [datasets] if isinstance(datasets, str) else list(datasets)
    mixed = _mixed(names, mix, probs)
    entries = find_entries(os.fspath(dataset_dir), names)
    stage = _stage(entries, stage, pref_loss, pref_beta)
    on_cpu = device == "cpu" or (device == "auto" and not _has_cuda())
    model, revision = starting_model(entries, base_model, revision)
    adapter = starting_adapter(entries, adapter_path)
    check_finetuning(finetuning, adapter, on_cpu)
    output_dir = os.fspath(output_dir or f"saves/{Path(model).name}/{finetuning}/{names[0]}")
    check_output(output_dir, model, adapter)
    pinned = revision
    if adapter and revision and not os.path.isabs(adapter):
        logger.warning(
            "model_revision %s is left out: LLaMA-Factory would look for the adapter %r at it too; to train on it, "
            "download the adapter and give its folder",
            *(revision, adapter),
        )
        pinned = None

    rows = [(entry.name, trained) for entry in entries for trained in entry.rows(max_samples or None)]
    bare = [trained for _, trained in rows]
    tokenizer, positions = load_tokenizer(model, revision, trust_remote_code)
    thinking = thinking_mode(entries, rows)
    templated = template_keys(tokenizer, template, bare, thinking, stage)
    measured = row_lengths(tokenizer, bare, templated, thinking)
    cutoff = fitting_cutoff(cutoff_len, rows, measured, positions, templated["template"])
    lengths = tuple(map(sum, measured))

    lora = finetuning != "full"
    groups = {
        "model": {
            "model_name_or_path": model,
            **({"model_revision": pinned} if pinned else {}),
            **({"adapter_name_or_path": adapter} if adapter else {}),
            **({"trust_remote_code": True} if trust_remote_code else {}),
            **({"quantization_bit": 4, "quantization_method": "bnb"} if finetuning == "qlora" else {}),
            **templated,
        },
        "method": {
            "stage": stage,
            "do_train": True,
            "finetuning_type": "lora" if lora else "full",
            **({"lora_rank": lora_rank, "lora_target": "all"} if lora else {}),
            # Without it the adapter is trained further, and the reference of DPO is the bare base model.
            **({"create_new_adapter": True} if adapter else {}),
            **({"pref_beta": float(pref_beta or BETAS[pref_loss]), "pref_loss": pref_loss} if stage == "dpo" else {}),
        },
        "dataset": {
            "dataset": ",".join(names),
            "dataset_dir": os.fspath(dataset_dir) if entries[0].folder is None else absolute(dataset_dir),
            **mixed,
            "cutoff_len": cutoff,
            **({"max_samples": max_samples} if max_samples else {}),  # 0 is no row there
            "overwrite_cache": True,
            "preprocessing_num_workers": 2,
        },
        "output": {
            "output_dir": output_dir,
            "logging_steps": 10,
            "save_steps": save_steps,
            "plot_loss": True,
            "overwrite_output_dir": True,
            "report_to": report_to,
        },
        "train": {
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": gradient_accumulation,
            "learning_rate": float(learning_rate or RATES[stage, "lora" if lora else "full"]),
            "num_train_epochs": float(epochs),
            "lr_scheduler_type": "cosine",
            # A fraction as warmup_steps means less than one step to some transformers that LLaMA-Factory allows.
            "warmup_ratio": 0.1,
            **({"use_cpu": True, "bf16": False} if on_cpu else {"bf16": True}),
            "ddp_timeout": 180000000,
        },
    }
    done = TrainConfig(path, stage, {key: value for group in groups.values() for key, value in group.items()}, lengths)
    with atomic_write(path) as file:
        file.write(f"# {done.measured}\n")
        for title, keys in groups.items():
            file.write(f"\n### {title}\n")
            yaml.dump(keys, file, _Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
    return done


class _Dumper(yaml.SafeDumper):
    """Quotes what LLaMA-Factory's own reader, OmegaConf, would take for a number: a commit or a dataset like 12e3."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[\d_]+(\.[\d_]*)?e[-+]?\d+", re.I), None)


def _mixed(names: list[str], mix: str | None, probs: Sequence[float] | None) -> dict[str, str]:
    """The keys that say how datasets are mixed; none for one of them, or where they are joined, the default there."""
    if probs is None:
        return {"mix_strategy": mix} if len(names) > 1 and mix not in (None, "concat") else {}
    if mix == "concat":
        raise UserError(f"probs needs an interleaved mix, {' or '.join(MIXES[1:])}; concat takes every row once.")
    if len(probs) != len(names) or len(names) < 2:
        raise UserError(
            f"probs are {len(probs)} numbers for {len(names)} datasets; it must be one each, of two or more."
        )
    if not all(isinstance(p, int | float) and 0 < p < 1 for p in probs) or abs(sum(probs) - 1) > 1e-6:
        raise UserError(f"probs are {list(probs)}; they must be above 0 and sum to 1.")
    # as exact as numpy wants the sum to be
    return {
        "mix_strategy": mix or MIXES[1],
        "interleave_probs": ",".join(str(round(p / sum(probs), 12)) for p in probs),
    }


def _stage(entries: list[Entry], wanted: str | None, pref_loss: str, pref_beta: float | None) -> str:
    kinds = {"dpo" if entry.ranking else "sft": entry.name for entry in entries}
    if len(kinds) > 1:
        raise UserError(
            f"{kinds['dpo']!r} holds preference pairs and {kinds['sft']!r} does not; train them one by one."
        )
    (stage,) = kinds
    if wanted not in (None, stage):
        has = "preference pairs (ranking: true)" if stage == "dpo" else "no preference pairs (ranking: true)"
        raise UserError(f"Dataset {kinds[stage]!r} has {has}; write_{stage}_config is for it.")
    if stage == "sft" and (pref_loss != "sigmoid" or pref_beta is not None):
        raise UserError(f"pref_loss and pref_beta are for preference pairs; {kinds[stage]!r} has none.")
    return stage


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()

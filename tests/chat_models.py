"""Tokenizers of the model families, as near as can be without the Hub: special tokens, chat templates and classes.

The tokens are those of the bundled model, a byte-level BPE that splits text as Qwen's does, with two merges more. The
chat templates are the original ones, from the wheel of `trl`, or short equivalents of what it does not have.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import distribution
from pathlib import Path

from t2s_pref import demo_files

# Real tokenizers have such ones: they join what LLaMA-Factory keeps apart, the end of a prompt and its answer.
MERGES = ((":", "S"), ("Ċ", "Ċ"))

IM = "'<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n'"
CHATML = "{% for m in messages %}{{ " + IM + " }}{% endfor %}"
ANSWER = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
HELPFUL = "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
SHORT = {
    "qwen3_coder": CHATML + ANSWER,  # without tools
    "qwen3_thinking_2507": CHATML + ANSWER.replace("assistant\n", "assistant\n<think>\n"),  # history without thoughts
    "qwen2": "{% if messages[0].role != 'system' %}" + HELPFUL + "{% endif %}" + CHATML + ANSWER,
}

QWEN = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")  # the first three tokens of the bundled tokenizer, in its order
LLAMA = ("<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>")


@dataclass(frozen=True)
class Family:
    """What sets a tokenizer apart; `chat` names its chat template, `more` are tokens and whether they are special."""

    chat: str | None
    first: tuple[str, str, str] = QWEN
    more: Mapping[str, bool] = field(default_factory=dict)
    kind: str = "Qwen2Tokenizer"
    eos: str | None = "<|im_end|>"
    bos: str | None = None


THINK = {"<think>": False, "</think>": False}
HEADERS = {"<|end_header_id|>": True, "<|begin_of_text|>": True}
FAMILIES = {
    "qwen2_5": Family("qwen2_5"),
    "qwen3": Family("qwen3", more=THINK),
    "qwen3_instruct_2507": Family("qwen3_instruct_2507", more=THINK),
    "qwen3_coder": Family("qwen3_coder", more=THINK),
    "qwen3_thinking_2507": Family("qwen3_thinking_2507", more=THINK),
    "qwen2": Family("qwen2"),
    "llama3": Family("llama3", LLAMA, HEADERS, "PreTrainedTokenizerFast", "<|end_of_text|>", "<|begin_of_text|>"),
    "llama3_1": Family(
        *("llama3_1", LLAMA, {**HEADERS, "<|eom_id|>": True}),
        *("PreTrainedTokenizerFast", "<|eot_id|>", "<|begin_of_text|>"),
    ),
    "base": Family(None, eos="<|endoftext|>"),
    "llama_base": Family(None, LLAMA, HEADERS, "PreTrainedTokenizerFast", "<|end_of_text|>", "<|begin_of_text|>"),
    "bare": Family(None, first=("<unk>", "<a>", "<b>"), kind="PreTrainedTokenizerFast", eos=None),
}
SAMPLED = [name for name, family in FAMILIES.items() if family.chat]
BASES = [name for name, family in FAMILIES.items() if not family.chat]

# What each family is trained with, thinking off and on, where it is sampled from and a template fits.
Keys = dict[str, str | bool] | None
KEYS: dict[str, tuple[Keys, Keys]] = {
    "qwen2_5": ({"template": "qwen"}, {"template": "qwen"}),
    "qwen3": ({"template": "qwen3", "enable_thinking": False}, {"template": "qwen3", "enable_thinking": True}),
    "qwen3_instruct_2507": ({"template": "qwen3_nothink"}, {"template": "qwen3_nothink"}),
    "qwen3_coder": ({"template": "qwen3_nothink"}, {"template": "qwen3_nothink"}),
    "llama3": ({"template": "llama3"}, {"template": "llama3"}),
    "qwen3_thinking_2507": (None, None),  # its prompt opens the think block
    "qwen2": (None, None),  # where there is no system message, one that is not LLaMA-Factory's
    "llama3_1": (None, None),  # each system message begins with dates
}


def chat_template(name: str) -> str:
    """The chat template of that name."""
    if name in SHORT:
        return SHORT[name]
    path = distribution("trl").locate_file(f"trl/chat_templates/{name}.jinja")
    return Path(str(path)).read_text(encoding="utf-8")


def save_chat_tokenizer(folder: Path, family: Family) -> Path:
    """Write a tokenizer of that family as the files that `AutoTokenizer.from_pretrained` reads."""
    text = (Path(demo_files().model) / "tokenizer.json").read_text(encoding="utf-8")
    for old, new in zip(QWEN, family.first, strict=True):
        text = text.replace(old, new)
    tokens = json.loads(text)
    vocabulary, merges = tokens["model"]["vocab"], tokens["model"]["merges"]
    for left, right in MERGES:
        if left + right not in vocabulary:
            vocabulary[left + right] = len(vocabulary)
            merges.insert(0, [left, right])
    number = max(vocabulary.values())
    for token, special in family.more.items():
        number += 1
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokens["added_tokens"].append({"id": number, "content": token, "special": special, **plain})
    if family.bos:  # as Llama's does: a text that is encoded with special tokens begins with it
        begin = tokens["added_tokens"][-1]["id"]
        bos = {"SpecialToken": {"id": family.bos, "type_id": 0}}
        sequences = [{"Sequence": {"id": name, "type_id": place}} for place, name in enumerate("AB")]
        tokens["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [bos, sequences[0]],
            "pair": [bos, sequences[0], sequences[1]],
            "special_tokens": {family.bos: {"id": family.bos, "ids": [begin], "tokens": [family.bos]}},
        }
    config = {
        "tokenizer_class": family.kind,
        "eos_token": family.eos,
        "bos_token": family.bos,
        "pad_token": family.first[0],
        "model_max_length": 32768,
    }
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokens), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if family.chat:
        (folder / "chat_template.jinja").write_text(chat_template(family.chat), encoding="utf-8")
    return folder

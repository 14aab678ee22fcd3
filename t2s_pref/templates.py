"""How LLaMA-Factory encodes a row under its `template`, and which template fits what a model is sampled with.

Candidates are sampled from what the tokenizer's own chat template renders; LLaMA-Factory builds the prompt it trains on
with a template of its own. Where the two differ by a token, one trains on another prompt than one sampled from, and
nothing says so. Here is what LLaMA-Factory 0.9.5 does under five of its templates, equal to it token by token
(`tests/test_fidelity.py`): where it trains on pairs, and under `stage: sft` too, but for the history under `qwen3`. SFT
gives each answer there an empty think block or keeps its thoughts, unless the file says `mask_history: true`.

Not covered: its other templates, tools, images, `default_system`, `preserve_thinking`, and `cutoff_len`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from t2s_pref.columns import HISTORY, INPUT, INSTRUCTION, SYSTEM
from t2s_pref.errors import UserError
from t2s_pref.prompts import messages
from t2s_pref.tokens import THINK_TAGS, encode_chats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EOS = None  # the place of the tokenizer's own end-of-sequence token
Parts = tuple[str | None, ...]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Template:
    """The parts of a prompt, each of which LLaMA-Factory tokenizes by itself: no merge of tokens crosses their bounds.

    `stops` become special tokens, the first one the end-of-sequence token; `thinks` is what its `ReasoningTemplate` is.
    """

    system: Parts
    user: Parts
    assistant: Parts
    default_system: str = ""
    begins: bool = False
    stops: tuple[str, ...] = ()
    thinks: bool = False


CHATML: dict[str, Any] = {
    "system": ("<|im_start|>system\n{{content}}<|im_end|>\n",),
    "user": ("<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n",),
    "assistant": ("{{content}}<|im_end|>\n",),
    "stops": ("<|im_end|>",),
}
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"

# Where several fit, the first one is taken.
TEMPLATES = {
    "qwen3_nothink": Template(**CHATML),
    "qwen": Template(**CHATML, default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "llama3": Template(
        system=(HEADER.format("system") + "{{content}}<|eot_id|>",),
        user=(HEADER.format("user") + "{{content}}<|eot_id|>" + HEADER.format("assistant"),),
        assistant=("{{content}}<|eot_id|>",),
        begins=True,
        stops=("<|eot_id|>", "<|eom_id|>"),
    ),
    "default": Template(
        ("System: {{content}}", EOS, "\n"), ("Human: {{content}}", EOS, "\nAssistant:"), ("{{content}}", EOS, "\n")
    ),
    "qwen3": Template(**CHATML, thinks=True),
}

NO_EOS = "<|endoftext|>"  # what a tokenizer without an end-of-sequence token gets
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
_THOUGHT = re.compile(r"<think>\n(.*?)\n</think>\n\n", re.DOTALL)
PLAIN = {INSTRUCTION: "", INPUT: "How many books are there?"}  # decides where the given rows leave a choice


def ready(template: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with the tokens that LLaMA-Factory adds; itself, where it has them.

    Adding them copies it, which takes a second for a large one: who encodes many rows calls this once before.
    """
    stops = _named(template).stops or ((NO_EOS,) if tokenizer.eos_token_id is None else ())
    if tokenizer.eos_token_id is not None and set(stops) <= set(tokenizer.get_added_vocab()):
        return tokenizer
    tokenizer = deepcopy(tokenizer)
    tokenizer.add_special_tokens({"eos_token": stops[0]})
    tokenizer.add_tokens(list(stops[1:]), special_tokens=True)
    return tokenizer


def prompt_ids(
    template: str, tokenizer: PreTrainedTokenizerBase, row: Row, enable_thinking: bool, answer: str = ""
) -> list[int]:
    """The token ids of the prompt that LLaMA-Factory trains on.

    Args:
        template: one of `TEMPLATES`; any other is a [`UserError`].
        tokenizer: of the model that is trained; it is not changed, though LLaMA-Factory may add tokens to its own: for
            many rows, what `ready` makes of it.
        row: `instruction`, `input`, and where it has them `system` and `history`, as `t2s_pref.prompts.messages` reads.
        enable_thinking: as in the training file; the prompt of `qwen3` ends in an empty think block where it is off.
        answer: what follows, of a pair the chosen one. A think tag that `qwen3` without thinking cannot cut away from
            it, as it is no whole block, keeps the empty block out of the prompt.

    >>> from transformers import AutoTokenizer
    >>> from t2s_pref import demo_files
    >>> tokenizer = AutoTokenizer.from_pretrained(demo_files().model)
    >>> ids = prompt_ids("qwen3", tokenizer, {"instruction": "", "input": "How many?"}, enable_thinking=False)
    >>> tokenizer.decode(ids)
    '<|im_start|>user\\nHow many?<|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n'
    """
    chosen = _named(template)
    return _prompt(chosen, ready(template, tokenizer), row, enable_thinking, answer)


def answer_ids(template: str, tokenizer: PreTrainedTokenizerBase, answer: str, enable_thinking: bool) -> list[int]:
    """The token ids of the answer that LLaMA-Factory trains on, with the end of the turn.

    Under `qwen3` with thinking on, an answer without a think tag gets an empty think block; with thinking off, think
    blocks as `t2s_pref.formats` writes them are cut away, and line breaks at the start with them.
    """
    chosen = _named(template)
    answer, adds_thought = _thoughts(chosen, answer, enable_thinking)
    thought = (EMPTY_THOUGHT,) if adds_thought and enable_thinking else ()
    return _encode(ready(template, tokenizer), thought + chosen.assistant, content=answer)


def training_keys(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row], enable_thinking: bool
) -> dict[str, str | bool]:
    """The keys of a training file under which LLaMA-Factory trains on the prompts that were sampled from.

    They are found by comparing token ids, row by row: no name of a model says which template is right.

    Args:
        tokenizer: of the model, with the chat template that candidates are sampled with.
        rows: all that is trained on, as `prompt_ids` reads them.
        enable_thinking: what the chat template is told in sampling.

    Returns `template`, and for `qwen3` `enable_thinking`. Where several templates fit all rows, it is one that fits a
    question alone as well; `qwen3` with thinking on only where the model's own chat template knows of thinking.

    Raises [`UserError`] where no template fits all rows, or the model has no chat template.

    >>> from transformers import AutoTokenizer
    >>> from t2s_pref import demo_files
    >>> tokenizer = AutoTokenizer.from_pretrained(demo_files().model)
    >>> training_keys(tokenizer, [{"instruction": "Write SQL.", "input": "How many?"}], enable_thinking=False)
    {'template': 'qwen3_nothink'}
    """
    prepared = {name: ready(name, tokenizer) for name in TEMPLATES}
    if enable_thinking and _sampled(tokenizer, PLAIN, True) != _sampled(tokenizer, PLAIN, False):
        prepared = {"qwen3": prepared.pop("qwen3"), **prepared}

    def trained(name: str, row: Row) -> list[int]:
        return _prompt(TEMPLATES[name], prepared[name], row, enable_thinking)

    def fits(name: str, row: Row) -> bool:
        try:
            return _sampled(tokenizer, row, enable_thinking) == trained(name, row)
        except UserError:  # a chat template may refuse a row that is asked about here only
            return False

    fitting = list(prepared)
    for index, row in enumerate(rows):
        sampled = _sampled(tokenizer, row, enable_thinking)
        prompts = {name: trained(name, row) for name in fitting}
        if sampled not in prompts.values():
            nearest = max(fitting, key=lambda name: _alike(sampled, prompts[name]))
            raise UserError(
                f"Row {index}: no LLaMA-Factory template of {', '.join(sorted(prepared))} gives the prompt that "
                f"{tokenizer.name_or_path!r} is sampled with. {nearest!r} comes nearest: "
                f"{_difference(prepared[nearest], sampled, prompts[nearest])}. {_way_out(row, fitting, fits)}"
            )
        fitting = [name for name in fitting if prompts[name] == sampled]
    name = next((name for name in fitting if fits(name, PLAIN)), fitting[0])
    return {"template": name, **({"enable_thinking": enable_thinking} if TEMPLATES[name].thinks else {})}


def _named(template: str) -> Template:
    if template in TEMPLATES:
        return TEMPLATES[template]
    raise UserError(f"template is {template!r}; the ones known here are {', '.join(sorted(TEMPLATES))}.")


def _prompt(
    template: Template, tokenizer: PreTrainedTokenizerBase, row: Row, enable_thinking: bool, answer: str = ""
) -> list[int]:
    chat = messages(row)
    system = chat.pop(0)["content"] if chat[0]["role"] == "system" else template.default_system
    ids = [tokenizer.bos_token_id] if template.begins and tokenizer.bos_token_id is not None else []
    ids += _encode(tokenizer, template.system, content=system) if system else []
    for index, message in enumerate(chat):
        content = message["content"]
        if message["role"] == "assistant":
            ids += _encode(tokenizer, template.assistant, content=_thoughts(template, content, False)[0])
        else:  # `idx` is for templates that number their turns, and replaced under any
            ids += _encode(tokenizer, template.user, content=content, idx=str(index // 2))
    adds_thought = _thoughts(template, answer, enable_thinking)[1]
    return ids + _encode(tokenizer, (EMPTY_THOUGHT,)) if adds_thought and not enable_thinking else ids


def _encode(tokenizer: PreTrainedTokenizerBase, parts: Parts, **places: str) -> list[int]:
    ids = []
    for part in parts:
        for name, text in places.items():
            part = part and part.replace("{{" + name + "}}", text, 1)
        ids += [tokenizer.eos_token_id] if part is EOS else tokenizer.encode(part, add_special_tokens=False)
    return ids


def _thoughts(template: Template, answer: str, enable_thinking: bool) -> tuple[str, bool]:
    """The answer with the thoughts that are trained on, and whether an empty think block goes before it."""
    if template.thinks and not enable_thinking:
        answer = _THOUGHT.sub("", answer).lstrip("\n")
    return answer, template.thinks and not any(tag in answer for tag in THINK_TAGS)


def _sampled(tokenizer: PreTrainedTokenizerBase, row: Row, enable_thinking: bool) -> list[int]:
    return encode_chats(tokenizer, tokenizer.name_or_path, [messages(row)], enable_thinking)[0]


def _alike(one: list[int], other: list[int]) -> int:
    """How many ids two lists begin with in common."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))


def _difference(tokenizer: PreTrainedTokenizerBase, sampled: list[int], trained: list[int]) -> str:
    place = _alike(sampled, trained)
    one, other = (tokenizer.decode(ids[place : place + 8]) for ids in (sampled, trained))
    if tokenizer.decode(sampled) == tokenizer.decode(trained):
        return f"from token {place} on, {one!r} is split into other tokens"
    return f"from token {place} on, {one!r} is sampled with and {other!r} trained on"


def _way_out(row: Row, names: list[str], fits: Callable[[str, Row], bool]) -> str:
    stripped = {name: (row.get(name) or "").strip() for name in (INSTRUCTION, INPUT, SYSTEM)}
    stripped[HISTORY] = [[text.strip() for text in turn] for turn in row.get(HISTORY) or ()]
    ways = [("with each text stripped of blanks at its ends", stripped)]
    ways += [("without its history", {HISTORY: None}), ("with a system message", {SYSTEM: "Answer."})]
    for way, changed in ways:
        if name := next((name for name in names if fits(name, {**row, **changed})), None):
            return f"It would fit {name!r} {way}."
    if any(fits(name, PLAIN) for name in names):
        return "Leave such rows out."
    return "Take the chat template out of the model's folder before SFT, and LLaMA-Factory saves one of its own there."

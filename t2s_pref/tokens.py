"""Chats to token ids and token ids to text, the same for every engine; transformers is the caller's to import."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from t2s_pref.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THINK_TAGS = ("<think>", "</think>")


def encode_chats(
    tokenizer: PreTrainedTokenizerBase, name: str, chats: list[list[dict[str, str]]], enable_thinking: bool
) -> list[list[int]]:
    """Token ids of each chat under the template of the model `name`, up to where the answer begins."""
    if not tokenizer.chat_template:
        raise UserError(f"{name!r} has no chat template; use the instruct model of its kind.")
    try:
        return tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=False, enable_thinking=enable_thinking
        )
    except Exception as error:  # templates raise jinja's errors, e.g. for roles that they refuse
        raise UserError(f"The chat template of {name!r} refuses a row: {one_line(error)}") from error


def count_tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[int]:
    """How many tokens each text has."""
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def begins_in_thought(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> bool:
    """Whether the prompt opens the think block itself, as some templates have it."""
    return tokenizer.decode(list(prompt[-8:])).rstrip().endswith(THINK_TAGS[0])


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The special tokens by their ids; some tokenizers count the think tags among these."""
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def text_of(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    """Token ids to text: without special tokens, but with think tags."""
    hidden = {number for number, text in special_tokens(tokenizer).items() if text not in THINK_TAGS}

    def text(tokens: list[int]) -> str:
        return tokenizer.decode([token for token in tokens if token not in hidden], clean_up_tokenization_spaces=False)

    return text

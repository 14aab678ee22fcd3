"""The policy model as an engine: it says what it is, turns chats into tokens, and samples answers.

Nothing is loaded before that is needed: a cached run imports torch at most, to see whether there is a GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from t2s_pref.errors import UserError, one_line
from t2s_pref.models import (
    Loaded,
    check_device,
    end_tokens,
    free_cached_memory,
    free_memory,
    hash_model,
    load,
    resolve_device,
    resolve_dtype,
)
from t2s_pref.settings import DEFAULT_MODEL, DTYPES, SamplingSettings
from t2s_pref.weights import Source, find_adapter, find_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from t2s_pref.decoding import Request

logger = logging.getLogger(__name__)

# The share of free memory that cached keys and values may take, and the most tokens of them in a batch: beyond it a
# GPU's matrix units are busy anyway, and on a CPU more sequences at a time only cost memory.
MEMORY_SHARE = 0.4
MOST_TOKENS = {"cuda": 1 << 20, "cpu": 1 << 15}


class Answer(NamedTuple):
    """One sampled answer: its text, the number of its tokens, and whether it ended before the length cap."""

    text: str
    tokens: int
    ended: bool


class TransformersEngine:
    """Samples from a causal language model with transformers, with a LoRA adapter on it where one is given.

    Args:
        base_model (`str` or `PreTrainedModel`, *optional*, defaults to `"Qwen/Qwen3-Coder-30B-A3B-Instruct"`):
            A folder, a Hub id, or a model in hand, which is then used as it is (adapter, device and dtype included).
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The tokenizer of a model in hand.
        adapter_path (`str`, *optional*): LoRA adapter, a folder or a Hub id. One that is absent is warned about and
            left out, as the source recipe has it; one that is broken or does not fit is an error.
        strict_adapter (`bool`, *optional*, defaults to `False`): Refuse an absent adapter too.
        revision (`str`, *optional*): Branch, tag or commit of a base model from the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run model code that comes with the weights.
        dtype (`str`, *optional*, defaults to `"auto"`): `auto` is bfloat16 on CUDA and float32 on a CPU.
        device (`str`, *optional*, defaults to `"auto"`): `auto`, `cpu`, `cuda` or `cuda:N`. CUDA that is not there
            falls back to the CPU with a warning. A model larger than one GPU is spread over all of them.

    Raises:
        [`UserError`]: on a value that is not allowed; on first use, where weights are absent, broken or too large.
    """

    def __init__(
        self,
        base_model: str | PreTrainedModel = DEFAULT_MODEL,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        adapter_path: str | None = None,
        strict_adapter: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
        dtype: str = "auto",
        device: str = "auto",
    ) -> None:
        if dtype not in DTYPES:
            raise UserError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}.")
        check_device(device)
        self._in_hand = None if isinstance(base_model, str | Path) else base_model
        if (self._in_hand is None) != (tokenizer is None):
            raise UserError("A model in hand needs its tokenizer=, and a tokenizer= is for a model in hand only.")
        if self._in_hand is not None and (adapter_path or revision):
            raise UserError("A model in hand is used as it is; put the adapter on it with peft, leave revision out.")
        self.base_model = str(base_model) if self._in_hand is None else type(base_model).__name__
        self.tokenizer = tokenizer
        self.adapter_path = adapter_path or None
        self.strict_adapter = strict_adapter
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.dtype = dtype
        self.device = device
        self._sources: tuple[Source, Source | None] | None = None
        self._ceiling: float = float("inf")  # a batch of this many tokens has met the end of memory

    # -- what it is ----------------------------------------------------------------------------------------------

    def identity(self, memo: Path) -> dict[str, Any]:
        """Everything about the model that decides its answers, without loading it: a part of every cache key."""
        if self._in_hand is not None:
            return {"in_hand": hash_model(self._in_hand, self.tokenizer)}
        # found anew each time: a folder may have been trained into since the last call
        base, adapter = self._sources = self._find(memo)
        return {
            "base_model": base.identity,
            "adapter": adapter.identity if adapter else None,
            "dtype": self._resolve()[1],
        }

    def describe(self) -> str:
        """One line on model and adapter, for people; known once `identity` has been asked for."""
        if self._in_hand is not None:
            return f"{self.base_model} in hand"
        base, adapter = self._sources
        if adapter is not None:
            rider = f"adapter {self.adapter_path}"
        else:
            rider = f"no adapter: {self.adapter_path} was absent" if self.adapter_path else "no adapter"
        return f"{self.base_model}{f' at {base.revision[:12]}' if base.revision else ''}, {rider}"

    def _find(self, memo: Path) -> tuple[Source, Source | None]:
        base = find_model(self.base_model, self.revision, memo)
        adapter = find_adapter(self.adapter_path, memo) if self.adapter_path else None
        if self.adapter_path and adapter is None:
            if self.strict_adapter:
                raise UserError(f"Adapter {self.adapter_path!r} does not exist; mend the path or leave it out.")
            logger.warning(
                "ADAPTER NOT FOUND: %r does not exist. Going on with the base model alone: the candidates are NOT "
                "those of your fine-tuned model. Pass --strict-adapter to refuse this.",
                self.adapter_path,
            )
        return base, adapter

    def _resolve(self) -> tuple[str, str]:
        """The device and the dtype of this run; says once that CUDA is missing."""
        device = resolve_device(self.device)
        if device == "cpu" and self.device.startswith("cuda"):
            logger.warning("device %r was asked for, but there is no CUDA; using the CPU, slowly.", self.device)
            self.device = "cpu"
        return device, resolve_dtype(self.dtype, device)

    def _load(self) -> Loaded:
        if self._in_hand is not None:
            return Loaded("", self._in_hand, self.tokenizer)
        device, dtype = self._resolve()
        return load(*self._sources, dtype, device, self.trust_remote_code)

    # -- sampling ------------------------------------------------------------------------------------------------

    @property
    def context_length(self) -> int | None:
        """Most tokens of prompt and answer together, `None` where the model names no limit."""
        config = self._load().model.config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None)

    def token_budget(self) -> int:
        """Tokens of cached keys and values that a batch may hold, from the memory that is free after loading."""
        model = self._load().model
        config = model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        a_token = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
        device = model.get_input_embeddings().weight.device
        room = int(free_memory(str(device)) * MEMORY_SHARE / a_token)
        return max(1, min(MOST_TOKENS.get(device.type, MOST_TOKENS["cpu"]), room))

    def encode_chats(self, chats: list[list[dict[str, str]]], enable_thinking: bool) -> list[list[int]]:
        """Token ids of each chat under the model's own template, up to where the answer begins."""
        tokenizer = self._load().tokenizer
        if not tokenizer.chat_template:
            raise UserError(f"{self.base_model!r} has no chat template; use the instruct model of its kind.")
        try:
            return tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, tokenize=True, return_dict=False, enable_thinking=enable_thinking
            )
        except Exception as error:  # templates raise jinja's errors, e.g. for roles that they refuse
            raise UserError(f"The chat template of {self.base_model!r} refuses a row: {one_line(error)}") from error

    def count_tokens(self, texts: list[str]) -> list[int]:
        """How many tokens each text has."""
        return [len(ids) for ids in self._load().tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def sample(self, requests: Sequence[Request], settings: SamplingSettings) -> list[list[Answer]]:
        """The answers to each request, one a candidate; where memory does not suffice, in smaller batches.

        Raises:
            [`UserError`]: where a single candidate does not fit.
        """
        from t2s_pref.decoding import draw, halve, out_of_memory

        model, tokenizer = self._load()[1:]
        sequences = sum(len(request.candidates) for request in requests)
        longest = max(len(request.prompt) for request in requests)
        if sequences * longest < self._ceiling or sequences == 1:
            training = model.training
            model.eval()  # one in hand may be in the middle of its training
            try:
                drawn = draw(
                    model,
                    requests,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    end_tokens=end_tokens(model, tokenizer),
                    pad_token=tokenizer.pad_token_id or 0,
                )
                return [[Answer(_text(tokenizer, d.tokens), len(d.tokens), d.ended) for d in row] for row in drawn]
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            finally:
                model.train(training)
            # Past the handler, whose traceback would keep the failed batch's tensors alive.
            self._give_way(sequences, longest)
        first, second = (self.sample(half, settings) for half in halve(requests))
        return first + second if len(requests) > 1 else [first[0] + second[0]]

    def _give_way(self, sequences: int, longest: int) -> None:
        free_cached_memory()
        if sequences == 1:
            raise UserError(
                f"Out of memory with a single candidate on a prompt of {longest} tokens; lower --max-new-tokens, use "
                "--dtype bfloat16, a smaller model, or a device with more memory; what was sampled is kept."
            )
        self._ceiling = sequences * longest
        logger.warning("Out of memory with %d candidates of up to %d prompt tokens; halving.", sequences, longest)


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """The answer as text: without special tokens, but with think tags, which some tokenizers count among these."""
    added = tokenizer.added_tokens_decoder
    hidden = {number for number, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    hidden -= {number for number, token in added.items() if token.content in ("<think>", "</think>")}
    return tokenizer.decode([token for token in tokens if token not in hidden], clean_up_tokenization_spaces=False)

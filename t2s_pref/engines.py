"""The policy model as an engine: it says what it is, turns chats into tokens, and samples answers.

Nothing is loaded before that is needed: a cached run imports torch at most, to see whether there is a GPU.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2s_pref.errors import UserError
from t2s_pref.models import (
    Loaded,
    check_device,
    end_tokens,
    evaluating,
    free_memory,
    hash_model,
    load,
    resolve_device,
    resolve_dtype,
    token_bytes,
)
from t2s_pref.protocol import Answer, Request, Sampled, Work
from t2s_pref.settings import DEFAULT_MODEL, DTYPES, SamplingSettings
from t2s_pref.stops import Stops
from t2s_pref.templates import training_keys
from t2s_pref.tokens import begins_in_thought, count_tokens, encode_chats, text_of
from t2s_pref.weights import Source, find_adapter, find_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from t2s_pref.decoding import Decoder, Ends
    from t2s_pref.fallback import GenerateDecoder
    from t2s_pref.kv import Beginnings

logger = logging.getLogger(__name__)

# The share of free memory that cached keys and values may take, and the most tokens of them in a batch: beyond it a
# GPU's matrix units are busy anyway, and on a CPU more sequences at a time only cost memory.
MEMORY_SHARE = 0.4
MOST_TOKENS = {"cuda": 1 << 20, "cpu": 1 << 15}


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
        self.ceiling = float("inf")
        self.work = Work()
        self._stops: tuple[tuple[Any, ...], list[Stops]] | None = None
        self._found: tuple[weakref.ref[PreTrainedModel], str] | None = None
        self._beginnings: Beginnings | None = None  # of a model in hand, during a run

    # -- what it is ----------------------------------------------------------------------------------------------

    def identity(self, memo: Path) -> dict[str, Any]:
        """Everything about the model that decides its answers, without loading it: a part of every cache key."""
        if self._in_hand is not None:
            self._found = self._beginnings = None  # it may have been trained since
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

    def origin(self) -> dict[str, Any]:
        """Model and adapter for a dataset's card; known once `identity` has been asked for."""
        if self._in_hand is not None:
            return {"model": {"name": self.base_model}, "adapter": None}
        base, adapter = self._sources
        return {"model": base.public(), "adapter": adapter and adapter.public(), "dtype": self._resolve()[1]}

    @property
    def adapter_name(self) -> str:
        """The name of the adapter, its folder's or its Hub id; `""` where there is none."""
        if self._in_hand is not None or self._sources is None or self._sources[1] is None:
            return ""
        return self._sources[1].public()["name"]

    def _find(self, memo: Path | None) -> tuple[Source, Source | None]:
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
            return Loaded("", self._in_hand, self.tokenizer, None)
        if self._sources is None:
            self._sources = self._find(None)
        device, dtype = self._resolve()
        return load(*self._sources, dtype, device, self.trust_remote_code)

    # -- sampling ------------------------------------------------------------------------------------------------

    @property
    def whole_batches(self) -> bool:
        """In float32 an answer is the same whatever it is decoded together with, so each can be recorded by itself."""
        from t2s_pref.methods import is_exact

        return not is_exact(self._load().model)

    @property
    def context_length(self) -> int | None:
        """Most tokens of prompt and answer together, `None` where the model names no limit."""
        config = self._load().model.config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None)

    def token_budget(self) -> int:
        """Tokens of cached keys and values that a batch may hold, from the memory that is free after loading."""
        model = self._load().model
        device = model.get_input_embeddings().weight.device
        room = int(free_memory(str(device)) * MEMORY_SHARE / token_bytes(model))
        return max(1, min(MOST_TOKENS.get(device.type, MOST_TOKENS["cpu"]), room))

    def encode_chats(self, chats: list[list[dict[str, str]]], enable_thinking: bool) -> list[list[int]]:
        """Token ids of each chat under the model's own template, up to where the answer begins."""
        return encode_chats(self._load().tokenizer, self.base_model, chats, enable_thinking)

    def training_keys(self, rows: Sequence[Mapping[str, Any]], enable_thinking: bool) -> dict[str, str | bool]:
        """LLaMA-Factory's `template` (and `enable_thinking`) that gives the prompts of these rows, where one does."""
        with suppress(UserError):
            return training_keys(self._load().tokenizer, rows, enable_thinking)
        return {}

    def count_tokens(self, texts: list[str]) -> list[int]:
        """How many tokens each text has."""
        return count_tokens(self._load().tokenizer, texts)

    def method(self) -> str:
        """How this model is decoded, in words."""
        from t2s_pref.methods import WORDS

        return WORDS[self._method()]

    def holds_once(self) -> bool:
        """Whether keys and values that sequences have in common are held once for all of them."""
        from t2s_pref.methods import SHARED

        return self._method() == SHARED

    def _method(self) -> str:
        """The way of decoding that is right for the model; tried out once."""
        model = self._load().model
        if self._found is None or self._found[0]() is not model:
            from t2s_pref.methods import method_of

            with evaluating(model):
                self._found = weakref.ref(model), method_of(model)
        return self._found[1]

    def _drawer(self) -> Decoder | GenerateDecoder:
        from t2s_pref.decoding import Decoder
        from t2s_pref.fallback import GenerateDecoder
        from t2s_pref.kv import Beginnings
        from t2s_pref.methods import GENERATE, SHARED

        loaded, method = self._load(), self._method()
        if method == GENERATE:
            return GenerateDecoder(loaded.model, self.work)
        if self._in_hand is not None and self._beginnings is None:
            self._beginnings = Beginnings()
        return Decoder(loaded.model, method == SHARED, loaded.beginnings or self._beginnings, self.work)

    def _stops_of(self, requests: Sequence[Request], settings: SamplingSettings) -> list[Stops]:
        """The stops of each request; kept between batches, because they look at the whole vocabulary first."""
        tokenizer = self._load().tokenizer
        key = tokenizer, settings.stop, settings.ends_with_sql
        if self._stops is None or self._stops[0] != key:
            text = text_of(tokenizer)
            pair = [Stops(*key[:2], thinking, text, settings.ends_with_sql) for thinking in (False, True)]
            self._stops = key, pair
        return [
            self._stops[1][settings.enable_thinking or begins_in_thought(tokenizer, request.prompt)]
            for request in requests
        ]

    def _ends(self, stops: Sequence[Stops]) -> Ends:
        from t2s_pref.decoding import Ends

        loaded = self._load()
        tokens = frozenset(end_tokens(loaded.model, loaded.tokenizer))
        return Ends(tokens, stops[0].watched, lambda place, answer: stops[place].over(answer))

    def rest(self) -> None:
        """Let go of what a run holds of a model in hand: it is the caller's, its memory too."""
        self._beginnings = None

    def sample(
        self, requests: Sequence[Request], settings: SamplingSettings, budget: int
    ) -> Generator[Sampled, None, None]:
        """Every candidate of the requests, in the order in which they end; where memory does not suffice, fewer at a
        time.

        Raises:
            [`UserError`]: where a single candidate does not fit.
        """
        from t2s_pref.choice import Sampling
        from t2s_pref.decoding import OutOfMemoryError

        if not requests:
            return
        model, drawer, stops = self._load().model, self._drawer(), self._stops_of(requests, settings)
        ends, within = self._ends(stops), int(min(budget, self.ceiling))
        try:
            with evaluating(model):
                for place, candidate, tokens, ended in drawer.draw(requests, Sampling.of(settings), ends, within):
                    yield Sampled(place, candidate, Answer(stops[place].text(tokens), len(tokens), ended))
        except OutOfMemoryError:
            longest = max(len(request.prompt) for request in requests)
            raise UserError(
                f"Out of memory with a single candidate on a prompt of {longest} tokens; lower --max-new-tokens, use "
                "--dtype bfloat16, a smaller model, or a device with more memory; what was sampled is kept."
            ) from None
        finally:
            self.ceiling = min(self.ceiling, drawer.ceiling)

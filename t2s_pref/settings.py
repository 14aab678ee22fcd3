"""The sampling settings: the command line, the cache key and the card in one frozen dataclass."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from t2s_pref.errors import UserError

# Raise it whenever the same settings and weights give other candidates, or the same candidates another SQL: it is part
# of every key, so that old samples are never served for new code. tests/test_golden.py fails where that was forgotten.
SAMPLING_VERSION = 3

# What may be chosen, and the default: here, because the command line must know it without importing anything large.
DEFAULT_MODEL = "Qwen/Qwen3-Coder-30B-A3B-Instruct"
DTYPES = ("auto", "bfloat16", "float16", "float32")
DEDUPS = ("none", "exact", "normalized")
SELECTS = ("first", "hardest", "diverse", "closest_length", "random")
CHOSENS = ("gold", "own", "own_or_gold")
LAYOUTS = ("alpaca", "sharegpt")
ANSWER_FORMATS = ("sql", "fenced", "think")
TIMEOUT, GOLD_TIMEOUT = 5.0, 30.0  # seconds that a reject and a gold may take

# How far apart the seeds of two rounds are: more than any two rows of one.
ROUND_SPAN = 1 << 80


@dataclass(frozen=True)
class SamplingSettings:
    """How candidates are drawn from the policy model.

    Nothing of the model's own `generation_config` but its end-of-sequence tokens takes effect: what is not set here
    is off (no `top_k`, no repetition penalty).

    Args:
        num_rejects (`int`, *optional*, defaults to `3`): Candidates a row.
        seed (`int`, *optional*, defaults to `1234`): Base seed; a row's own is `seed + 1000 * source_index`.
        max_new_tokens (`int`, *optional*, defaults to `4096`): Length cap of an answer, in tokens; a candidate that
            reaches it is dropped and counted.
        temperature (`float`, *optional*, defaults to `0.7`): `0` is greedy decoding, one candidate a row.
        top_p (`float`, *optional*, defaults to `0.9`): Nucleus, in `(0, 1]`; `1` keeps the whole vocabulary.
        top_k (`int`, *optional*, defaults to `0`): Draw from the likeliest `top_k` tokens only; `0` is off.
        repetition_penalty (`float`, *optional*, defaults to `1.0`): Above 1, tokens that the prompt or the answer holds
            already become less likely (Keskar et al., arXiv 1909.05858); `1` is off.
        stop (`tuple[str, ...]`, *optional*, defaults to `()`): An answer ends before the first of these texts.
        enable_thinking (`bool`, *optional*, defaults to `False`): Given to the chat template; a think block in the
            answer never becomes part of the SQL.
        answer_format (`str`, *optional*, defaults to `"sql"`): `"fenced"` and `"think"` are answers with a chain of
            thought, which is kept; `t2s_pref.formats` has what each looks like. Each decides `enable_thinking`.
        round (`int`, *optional*): Of on-policy training, from 1: each has seeds of its own, and the rows carry it.

    Raises:
        [`UserError`]: on a value outside of its range.
    """

    num_rejects: int = 3
    seed: int = 1234
    max_new_tokens: int = 4096
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    enable_thinking: bool = False
    answer_format: str = "sql"
    round: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_rejects", "seed", "max_new_tokens", "top_k", *(() if self.round is None else ("round",))):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int):
                raise UserError(f"{name} is {value!r}; it must be an integer.")
        for name in ("temperature", "top_p", "repetition_penalty"):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int | float):
                raise UserError(f"{name} is {value!r}; it must be a number.")
            try:
                # 1 and 1.0 are one setting, so they must be one cache key
                object.__setattr__(self, name, float(value))
            except OverflowError as error:
                raise UserError(f"{name} is larger than any float.") from error
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        stop = tuple(stop) if isinstance(stop, list | tuple) else (stop,)
        if not all(isinstance(text, str) and text and text.encode(errors="ignore").decode() == text for text in stop):
            raise UserError(f"stop is {self.stop!r}; it must be texts of one character or more, in Unicode.")
        object.__setattr__(self, "stop", stop)
        if not isinstance(self.enable_thinking, bool):
            raise UserError(f"enable_thinking is {self.enable_thinking!r}; it must be True or False.")
        if self.answer_format not in ANSWER_FORMATS:
            raise UserError(f"answer_format is {self.answer_format!r}; it must be one of {', '.join(ANSWER_FORMATS)}.")
        if self.answer_format == "think":
            object.__setattr__(self, "enable_thinking", True)
        if self.answer_format == "fenced" and self.enable_thinking:
            raise UserError(
                "answer_format is 'fenced', whose reasoning is in the answer; with enable_thinking use 'think'."
            )
        if self.round is not None and not 1 <= self.round < 1 << 31:
            raise UserError(f"round is {self.round}; it must be 1 or more, and less than 2**31.")
        if self.num_rejects < 1:
            raise UserError(f"num_rejects is {self.num_rejects}; it must be 1 or more.")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be 1 or more.")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (1 = the whole vocabulary).")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be 0 (off) or more.")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise UserError(f"repetition_penalty is {self.repetition_penalty}; it must be from 0.01 to 100 (1 = off).")

    @property
    def candidates(self) -> int:
        """How many candidates a row gets: greedy decoding has only one answer to give."""
        return 1 if self.temperature == 0 else self.num_rejects

    @property
    def ends_with_sql(self) -> bool:
        """Whether an answer is over where its SQL is complete: reasoning may draft in fences before it answers."""
        return self.answer_format != "fenced"

    def row_seed(self, source_index: int) -> int:
        """Seed of the row at `source_index`, spaced as in the source recipe; rounds lie beyond each other's rows."""
        return self.seed + 1000 * source_index + ((self.round or 1) - 1) * ROUND_SPAN

    def drawing(self) -> dict[str, Any]:
        """What decides a candidate beside its row seed and number: the part of the settings that keys the store."""
        fields = asdict(self)
        del fields["num_rejects"], fields["seed"], fields["round"]
        return fields


SAMPLING_DEFAULTS = {field.name: field.default for field in fields(SamplingSettings)}

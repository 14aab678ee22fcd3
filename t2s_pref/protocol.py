"""What sampling asks of an engine, whatever runs behind it: this process, another library, or a server."""

import hashlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from t2s_pref.settings import SamplingSettings


@dataclass(frozen=True)
class Request:
    """Candidates to draw of one row: its prompt's token ids, its seed, their numbers, and the most tokens of each.

    `shared` is how many tokens the prompt has in common with those of its group, and `expected` how many an answer is
    likely to have. They plan memory and decide nothing else.
    """

    prompt: Sequence[int]
    row_seed: int
    candidates: Sequence[int]
    cap: int
    shared: int = 0
    expected: int = 0


def candidate_digest(row_seed: int, candidate: int) -> bytes:
    """The 8 bytes that seed one candidate, whatever draws it."""
    return hashlib.blake2b(f"{row_seed}|{candidate}".encode(), digest_size=8).digest()


class Answer(NamedTuple):
    """One sampled answer: its text, the number of its tokens, and whether it ended before the length cap."""

    text: str
    tokens: int
    ended: bool


class Sampled(NamedTuple):
    """An answer, of which request of those that were handed over, and under which of its candidates' numbers.

    The answer is `None` where there is none to be had now: a server failed, and the next run asks again.
    """

    place: int
    candidate: int
    answer: Answer | None


class Engine(Protocol):
    """A source of answers. Nothing is loaded or asked before that is needed: a cached run touches no weights.

    Attributes:
        device: where it runs, as torch names it; `"cpu"` where it does not matter here.
        whole_batches: whether only whole batches are recorded, so that a resumed run repeats the one that was cut off.
            That is for engines whose answers depend, in their last bits, on what they are decoded together with, where
            a batch can be repeated as it was: not on a server.
        ceiling: cached tokens beyond which memory was found not to suffice; infinite until then.
        work: what it has done so far, for the progress bar.
    """

    device: str
    whole_batches: bool
    ceiling: float
    work: "Work"

    def identity(self, memo: Path) -> dict[str, Any]:
        """Everything that decides its answers beside the settings: a part of every cache key."""

    def describe(self) -> str:
        """One line for people on what is sampled from; known once `identity` has been asked for."""

    def origin(self) -> dict[str, Any]:
        """What is sampled from, for a dataset's card: `model` and `adapter` (`None` where there is none), each with its
        `name` and where known its `revision`, `content` hash or `version`. No path, no address, no key.
        """

    @property
    def adapter_name(self) -> str:
        """The name of the adapter or of the served model, no path; `""` where there is none."""

    def method(self) -> str:
        """A few words for people on how it decodes; known once something was sampled, before that it may load."""

    @property
    def context_length(self) -> int | None:
        """Most tokens of prompt and answer together, `None` where there is no known limit."""

    def token_budget(self) -> int:
        """Tokens of cached keys and values that a batch may hold."""

    def rest(self) -> None:
        """A run is over: let go of what is not to be held between runs."""

    def holds_once(self) -> bool:
        """Whether keys and values that sequences have in common are held once for all of them."""

    def encode_chats(self, chats: list[list[dict[str, str]]], enable_thinking: bool) -> list[list[int]]:
        """Token ids of each chat under the model's own template, up to where the answer begins."""

    def training_keys(self, rows: Sequence[Mapping[str, Any]], enable_thinking: bool) -> dict[str, str | bool]:
        """LLaMA-Factory's `template` (and `enable_thinking`) that gives the prompts of these rows; none, where no
        template does or only the server knows its tokens.
        """

    def count_tokens(self, texts: list[str]) -> list[int]:
        """How many tokens each text has."""

    def sample(
        self, requests: Sequence[Request], settings: SamplingSettings, budget: int
    ) -> Generator[Sampled, None, None]:
        """Every candidate of the requests, once, in the order in which they end; within `budget` tokens of cache.

        Asked after `identity`: a model in hand may have been trained since.
        """


@dataclass
class Work:
    """Counted, not estimated: tokens of prompts asked for (once a candidate), prompt tokens that went through the model
    (padding included), tokens generated, and the most tokens of keys and values that were held at once."""

    prompt_asked: int = 0
    prompt_computed: int = 0
    generated: int = 0
    most_held: int = 0

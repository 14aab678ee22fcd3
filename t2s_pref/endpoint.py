"""A vLLM server as an engine: it samples there, over the OpenAI-compatible HTTP interface; all else stays as it is."""

from __future__ import annotations

import logging
import os
import queue
import re
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from t2s_pref.errors import UserError, one_line
from t2s_pref.files import looks_local, public_name
from t2s_pref.protocol import Answer, Request, Sampled, Work, candidate_digest
from t2s_pref.settings import SamplingSettings
from t2s_pref.stops import complete_part
from t2s_pref.templates import training_keys
from t2s_pref.tokens import THINK_TAGS, begins_in_thought, count_tokens, encode_chats, special_tokens
from t2s_pref.weights import Source, find_model, hash_parts, remembered_hashes
from t2s_pref.wire import FIRST_TRIES, TRIES, Line, PassingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Files beside a tokenizer that decide nothing here.
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


class EndpointEngine:
    """Samples from a model that a vLLM server serves: prompts go there as token ids, each candidate in a request.

    A server does not tell what its weights are. Samples are kept under the served name, its `root` and its `parent`,
    not under the URL: name a `model_version` where weights of the same name may change, or old samples are served for
    new weights. An answer depends on its seed and, by rounding, on what the server decodes beside it. Of the model's
    `generation_config` there, the end tokens take effect, and a cap on the answer's length, which is warned about.

    Args:
        url (`str`): The server's address: `http://localhost:8000`, with `/v1` or without.
        model (`str`, *optional*): The served name, a LoRA's too; without it, the only one that the server lists.
        tokenizer (`str`, *optional*): Folder or Hub id of the model whose chat template and token ids are used;
            without it, the `root` that the server lists for the model, or for a LoRA's parent.
        model_version (`str`, *optional*): What you call the weights that are served now.
        api_key (`str`, *optional*): What the server was started with as `--api-key`; else that in `VLLM_API_KEY`.
        parallel (`int`, *optional*, defaults to `32`): Requests under way at a time.

    Raises:
        [`UserError`]: on a value that is not allowed; on first use, where the server cannot be reached, does not serve
            the model, or the tokenizer is not found here.
    """

    device, whole_batches, ceiling = "cpu", False, float("inf")

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        tokenizer: str | None = None,
        model_version: str | None = None,
        api_key: str | None = None,
        parallel: int = 32,
    ) -> None:
        if isinstance(parallel, bool) or not isinstance(parallel, int) or parallel < 1:
            raise UserError(f"parallel is {parallel!r}; it must be an integer of 1 or more.")
        self.url, self._api_key = _base(url), (api_key or os.environ.get("VLLM_API_KEY") or "").strip()
        if not (self._api_key.isascii() and self._api_key.isprintable()):
            raise UserError("api_key has a character that no HTTP header may have; give the key and nothing else.")
        self.model, self.tokenizer, self.model_version = model, tokenizer, model_version
        self.parallel, self.work = parallel, Work()
        self._source: Source | None = None
        self._warned = False

    # -- what it is ----------------------------------------------------------------------------------------------

    def identity(self, memo: Path) -> dict[str, Any]:
        """What is known of the served model, and the content of its tokenizer: a part of every cache key."""
        for asked in ("_cards", "_version"):  # anew each time: another model may be served by now
            self.__dict__.pop(asked, None)
        before, self._source = self._source, self._find_tokenizer(memo)
        if before != self._source:
            self.__dict__.pop("_tokenizer", None)
        return {
            "endpoint_model": self._card["id"],
            "root": self._card.get("root"),
            "parent": self._card.get("parent"),
            "base_root": self._base_card.get("root"),
            "model_version": self.model_version,
            "tokenizer": self._source.identity,
            "context_length": self.context_length,  # the server's choice, and it caps answers
        }

    def describe(self) -> str:
        """One line on model and server, for people."""
        parent = f" on {self._card['parent']}" if self._card.get("parent") else ""
        return f"{self._card['id']}{parent}{f' ({self.model_version})' if self.model_version else ''} at {self.url}"

    def origin(self) -> dict[str, Any]:
        """Model and adapter for a dataset's card, by what they are called there."""
        version = {"version": self.model_version} if self.model_version else {}
        served, parent = public_name(self._card["id"]), self._card.get("parent")
        if parent:
            return {"model": {"name": public_name(parent)}, "adapter": {"name": served, **version}}
        return {"model": {"name": served, **version}, "adapter": None}

    @property
    def adapter_name(self) -> str:
        """The served name, where that is a LoRA's."""
        return public_name(self._card["id"]) if self._card.get("parent") else ""

    def method(self) -> str:
        """A few words on what decodes there."""
        with suppress(UserError):
            if self._card.get("owned_by") == "vllm":
                return f"vLLM {self._version} at an endpoint"
        return "at an endpoint"

    @cached_property
    def _version(self) -> str:
        return self._get("/version", lambda answered: answered["version"])

    @cached_property
    def _cards(self) -> dict[str, dict[str, Any]]:
        """What the server lists, by name."""
        return self._get("/v1/models", lambda answered: {card["id"]: card for card in answered["data"]})

    @property
    def _card(self) -> dict[str, Any]:
        if (self.model or "") not in self._cards and (self.model or len(self._cards) != 1):
            what = f"does not serve {self.model!r}" if self.model else f"serves {len(self._cards)} models"
            names = ", ".join(self._cards) or "none"
            raise UserError(f"{self.url} {what}; pass one of these as model= (--served-model): {names}.")
        return self._cards[self.model or next(iter(self._cards))]

    @property
    def _base_card(self) -> dict[str, Any]:
        """The same of a LoRA's base model, whose served name is the LoRA's parent."""
        parent = self._card.get("parent")
        return self._cards.get(parent, {"root": parent}) if parent else self._card

    @property
    def context_length(self) -> int | None:
        """Most tokens of prompt and answer together, `None` where the server names no limit."""
        return self._card.get("max_model_len") or self._base_card.get("max_model_len")

    def token_budget(self) -> int:
        """Tokens that a batch may hold: many, for the server shares out its own memory."""
        return 1 << 20

    def holds_once(self) -> bool:
        """Whether keys and values that sequences have in common are held once: vLLM caches prefixes."""
        return True

    def rest(self) -> None:
        """Nothing is held between runs."""

    # -- tokens --------------------------------------------------------------------------------------------------

    def _find_tokenizer(self, memo: Path | None) -> Source:
        name = self.tokenizer or self._base_card.get("root") or self._card["id"]
        if looks_local(name):  # weights beside it are not what is served, or the server's matter
            folder = Path(name).expanduser()
            files = sorted(f for f in folder.glob("[!.]*") if f.is_file() and not f.name.endswith(WEIGHTS))
            if hashes := remembered_hashes(files, memo):
                return Source(str(folder), None, hash_parts(f"{f.name}\0{hashes[f]}".encode() for f in files))
            raise UserError(
                f"{name!r} is no folder with a tokenizer here; pass tokenizer= (--base-model), one or a Hub id."
            )
        try:
            return find_model(name, None, memo)
        except UserError as error:
            raise UserError(
                f"{error} Pass tokenizer= (--base-model), the folder or Hub id of {self._card['id']!r}."
            ) from error

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        source = self._source or self._find_tokenizer(None)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source.name, revision=source.revision)
        except Exception as error:  # each file format fails in its own way
            raise UserError(f"The tokenizer of {source.name!r} cannot be loaded: {one_line(error)}") from error
        # transformers makes up a tokenizer without words where there is none
        if not (tokenizer("SELECT", add_special_tokens=False)["input_ids"] and tokenizer.chat_template):
            raise UserError(f"{source.name!r} lacks a tokenizer or its chat template; pass an instruct model's.")
        return tokenizer

    def encode_chats(self, chats: list[list[dict[str, str]]], enable_thinking: bool) -> list[list[int]]:
        """Token ids of each chat under the model's own template, up to where the answer begins."""
        return encode_chats(self._tokenizer, self._tokenizer.name_or_path, chats, enable_thinking)

    def training_keys(self, rows: Sequence[Mapping[str, Any]], enable_thinking: bool) -> dict[str, str | bool]:
        """LLaMA-Factory's `template` (and `enable_thinking`) that gives the prompts of these rows, where one does."""
        with suppress(UserError):
            return training_keys(self._tokenizer, rows, enable_thinking)
        return {}

    def count_tokens(self, texts: list[str]) -> list[int]:
        """How many tokens each text has."""
        return count_tokens(self._tokenizer, texts)

    # -- sampling ------------------------------------------------------------------------------------------------

    def sample(
        self, requests: Sequence[Request], settings: SamplingSettings, budget: int = 0
    ) -> Generator[Sampled, None, None]:
        """Every candidate of the requests, once, in the order in which they end; `budget` is the server's own matter.

        Raises:
            [`UserError`]: where the server refuses a request or fails for a minute, after all that it has answered.
        """
        if not requests:
            return
        hidden = _hidden(self._tokenizer)
        thinking = [settings.enable_thinking or begins_in_thought(self._tokenizer, each.prompt) for each in requests]
        shared = {
            "model": self._card["id"],
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k or -1,  # off is -1 in every version, 0 only in later ones
            "min_p": 0.0,
            "repetition_penalty": settings.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": list(settings.stop),
            "skip_special_tokens": not hidden,
            "spaces_between_special_tokens": False,
        }
        jobs: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        for place, request in enumerate(requests):
            for number in request.candidates:  # one after the other, so that they meet in the server's prefix cache
                jobs.put((place, number))
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stopping = threading.Event()  # nothing begins any more, and nothing is tried again
        lines = [Line(self.url, self._api_key, stopping) for _ in range(min(self.parallel, jobs.qsize()))]

        def work(line: Line) -> None:
            try:
                while not stopping.is_set():
                    place, number = jobs.get_nowait()
                    request = requests[place]
                    own = {"prompt": list(request.prompt), "seed": _seed(request.row_seed, number)}
                    body = {**shared, **own, "max_tokens": request.cap}
                    read = partial(_read, request, hidden, thinking[place], settings.ends_with_sql)
                    done.put((place, number, line.ask("/v1/completions", body, TRIES, read)))
            except queue.Empty:
                pass
            except BaseException as error:
                done.put(error)
                stopping.set()
            finally:
                line.close()
                done.put(None)

        failures: list[BaseException] = []
        try:
            for line in lines:
                threading.Thread(target=work, args=(line,), name="endpoint", daemon=True).start()
            working = len(lines)
            while working:
                one = done.get()
                if one is None:
                    working -= 1
                elif isinstance(one, BaseException):
                    failures.append(one)
                else:
                    place, number, (answer, cached) = one
                    self._count(requests[place], answer, cached)
                    yield Sampled(place, number, answer)
        finally:  # also where the caller has had enough: the server drops what nobody waits for
            stopping.set()
            for line in lines:
                line.cut()
        if failures:
            raise failures[0]

    def _count(self, request: Request, answer: Answer, cached: int) -> None:
        self.work.prompt_asked += len(request.prompt)
        self.work.prompt_computed += len(request.prompt) - cached
        self.work.generated += answer.tokens
        if not answer.ended and answer.tokens < request.cap and not self._warned:
            self._warned = True
            logger.warning(
                "%s cuts answers after %d tokens where %d were asked for; start vLLM with --generation-config vllm.",
                *(self.url, answer.tokens, request.cap),
            )

    def _get(self, path: str, read: Callable[[Any], Any]) -> Any:
        with closing(Line(self.url, self._api_key, threading.Event())) as line:
            return line.ask(path, None, FIRST_TRIES, read)


def _base(url: str) -> str:
    """The server's address without `/v1`."""
    plain = isinstance(url, str) and url.strip().isascii() and not re.search(r"[\s?#\x00-\x1f\x7f]", url.strip())
    with suppress(ValueError):  # of a port that is no number
        parts = urlsplit(url.strip() if plain else "")
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and parts.username is None:
            return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
    shown = "holds a name or password" if isinstance(url, str) and "@" in url else f"is {url!r}"
    raise UserError(f"The URL {shown}; it must be like http://localhost:8000/v1, and a key goes into VLLM_API_KEY.")


def _seed(row_seed: int, candidate: int) -> int:
    """The seed of one candidate, of 63 bits: vLLM takes 64 with a sign, and -1 as none."""
    return int.from_bytes(candidate_digest(row_seed, candidate), "big") >> 1


def _hidden(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Special tokens to be taken out here: all but the think tags where they are special too, else none.

    The server would leave out think tags with the others, and thoughts could not be told from the answer.
    """
    special, tags = set(special_tokens(tokenizer).values()), set(THINK_TAGS)
    return special - tags if special & tags else set()


def _read(request: Request, hidden: set[str], thinking: bool, sql_ends: bool, answered: Any) -> tuple[Answer, int]:
    """An answer, and how many tokens of its prompt the server had in its cache."""
    choice, usage = answered["choices"][0], answered["usage"]
    if choice["finish_reason"] not in ("stop", "length"):
        raise PassingError(f"ended an answer with {choice['finish_reason']!r}")
    if usage["prompt_tokens"] != len(request.prompt):
        raise UserError(
            f"The server read {usage['prompt_tokens']} tokens where a prompt of {len(request.prompt)} was sent; use "
            "one that takes token ids as they are, as vLLM does."
        )
    text = choice["text"]
    for token in hidden:
        text = text.replace(token, "")
    # The server does not see where the SQL is complete; the answer ends there all the same, as with every other engine.
    part = complete_part(text, thinking) if sql_ends else text
    ended = choice["finish_reason"] == "stop" or len(part) < len(text)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Answer(part, usage["completion_tokens"], ended), cached

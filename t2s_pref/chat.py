"""Any OpenAI-compatible server as an engine: messages go there, one request a candidate, and answers come back."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from t2s_pref.completions import Client, Server
from t2s_pref.errors import UserError
from t2s_pref.files import public_name
from t2s_pref.protocol import Request, Sampled, Work
from t2s_pref.replies import FailedError, about
from t2s_pref.settings import SamplingSettings

REFUSALS = 64  # where so many requests were refused and none was answered, none will be
KEPT_ALIVE = 20  # connections that one client keeps for its next requests


class ChatEngine:
    """Samples from a model behind any OpenAI-compatible endpoint: vLLM, SGLang, TGI, llama.cpp, a hosted API.

    Prompts go there as messages, which the server puts into its own template. Sent are `temperature`, `top_p`,
    `max_tokens`, a `seed` for each candidate and `enable_thinking` for the template; `stop`, `top_k` and
    `repetition_penalty` only where they are set, because many servers refuse fields that they do not know. For all that
    is not sent, the server's own defaults take effect. Samples are kept under the model's name, not under the URL: name
    a `model_version` where weights of the same name may change. Some servers honour seeds and others do not, so only
    the store makes a run repeatable.

    The key is read from the environment variable `T2S_PREF_API_KEY` and from nowhere else; without it none is sent, nor
    is the token for the Hub. What may pass (429, 5xx, timeouts, broken connections) is tried again for about a minute.
    Where the server wants fewer requests (429), all of them wait, and for as long as others are answered none is given
    up. A candidate that fails all the same is left out, counted in `failed`, and asked for again by the next run.
    Redirects are not followed.
    `HF_HUB_OFFLINE` is about the Hub: this server is asked all the same.

    Args:
        base_url (`str`): The server's address as OpenAI clients have it: `http://localhost:8000/v1`. One without a path
            gets `/v1`.
        model (`str`): The model's name there.
        model_version (`str`, *optional*): What you call the weights that are served now.
        parallel (`int`, *optional*, defaults to `16`): Requests under way at a time. Each may take an hour, with its
            time in the server's queue: ask a slow server with one slot for fewer.

    Raises:
        [`UserError`]: on a value that is not allowed; while sampling, where the server cannot be reached or refuses the
            key, the model, or every request.
    """

    device, whole_batches, ceiling, context_length = "cpu", False, float("inf"), None

    def __init__(self, base_url: str, model: str, *, model_version: str | None = None, parallel: int = 16) -> None:
        if isinstance(parallel, bool) or not isinstance(parallel, int) or parallel < 1:
            raise UserError(f"parallel is {parallel!r}; it must be an integer of 1 or more.")
        if not isinstance(model, str) or not model.strip():
            raise UserError(f"model is {model!r}; it must be the name that the server knows the model by.")
        self._server = Server(base_url, model)
        self.model, self.model_version, self.parallel = model, model_version, parallel
        self.work, self.failed = Work(), 0
        # How many were refused, and what the last ones failed with since an answer.
        self._refused, self._failures = 0, []

    # -- what it is ----------------------------------------------------------------------------------------------

    def identity(self, memo: Path) -> dict[str, Any]:
        """What the model is called: a part of every cache key. The server is not asked: what is cached needs none."""
        return {"chat_model": self.model, "model_version": self.model_version}

    def describe(self) -> str:
        """One line on model and server, for people."""
        version = f" ({self.model_version})" if self.model_version else ""
        return f"{self.model}{version} at {urlsplit(self._server.url).netloc}"

    def origin(self) -> dict[str, Any]:
        """The model for a dataset's card, by what it is called there."""
        version = {"version": self.model_version} if self.model_version else {}
        return {"model": {"name": public_name(self.model), **version}, "adapter": None}

    @property
    def adapter_name(self) -> str:
        """The model's name there, or that of its folder."""
        return public_name(self.model)

    def method(self) -> str:
        """A few words on what decodes there."""
        return "at an endpoint, by messages"

    def token_budget(self) -> int:
        """Tokens that a batch may hold: many, for the server shares out its own memory."""
        return 1 << 20

    def holds_once(self) -> bool:
        """Whether keys and values that sequences have in common are held once: most servers cache prefixes."""
        return True

    def rest(self) -> None:
        """Nothing is held between runs."""

    # -- tokens, which only the server knows ---------------------------------------------------------------------

    def encode_chats(self, chats: list[list[dict[str, str]]], enable_thinking: bool) -> list[list[int]]:
        """The bytes of each chat's messages as JSON: the same messages are always the same numbers."""
        return [list(json.dumps(chat, ensure_ascii=False, separators=(",", ":")).encode()) for chat in chats]

    def training_keys(self, rows: Sequence[Mapping[str, Any]], enable_thinking: bool) -> dict[str, str | bool]:
        """None: only the server knows the prompt's tokens."""
        return {}

    def count_tokens(self, texts: list[str]) -> list[int]:
        """About how many tokens each text has."""
        return [about(text) for text in texts]

    # -- sampling ------------------------------------------------------------------------------------------------

    def sample(
        self, requests: Sequence[Request], settings: SamplingSettings, budget: int = 0
    ) -> Generator[Sampled, None, None]:
        """The candidates of the requests, each once, in the order in which they end; `None` for those that fail.

        Raises:
            [`UserError`]: where the server cannot be reached or refuses all, after all that it has answered.
        """
        if not any(request.candidates for request in requests):
            return
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # In a thread, because a notebook has a loop of its own that is running.
        loop = asyncio.new_event_loop()
        asking = loop.create_task(self._ask_all(requests, settings, done))

        def work() -> None:
            try:
                with suppress(asyncio.CancelledError):
                    loop.run_until_complete(asking)
                done.put(None)
            except BaseException as error:
                done.put(error)
            finally:
                loop.close()

        thread = threading.Thread(target=work, name="chat", daemon=True)
        thread.start()
        try:
            while (one := done.get()) is not None:
                if isinstance(one, BaseException):
                    self._refused, self._failures = 0, []  # another run begins anew
                    raise one
                place, number, read = one
                if read is None:
                    yield Sampled(place, number, None)
                    continue
                self.work.prompt_asked += read.prompt
                self.work.prompt_computed += read.prompt - read.cached
                self.work.generated += read.answer.tokens
                yield Sampled(place, number, read.answer)
        finally:  # also where the caller has had enough
            with suppress(RuntimeError):  # of a loop that is closed
                loop.call_soon_threadsafe(asking.cancel)
            thread.join(timeout=5)

    async def _ask_all(
        self, requests: Sequence[Request], settings: SamplingSettings, done: queue.SimpleQueue[Any]
    ) -> None:
        """Put what is answered into `done`; raise the first [`UserError`], once what was under way has come."""
        # one after the other, so that they meet in the server's prefix cache
        jobs = [(place, number) for place, request in enumerate(requests) for number in request.candidates]
        left, stopping = iter(jobs), asyncio.Event()  # then nothing begins any more, and nothing is tried again

        async def work(client: Client) -> None:
            try:
                for place, number in left:
                    try:
                        read = await self._server.ask(client, requests[place], number, settings, stopping)
                    except FailedError as failure:
                        done.put((place, number, None))  # before the run may end with it
                        self._note(failure)
                    else:
                        if read is not None:
                            self._failures = []
                            done.put((place, number, read))
                    if stopping.is_set():
                        return
            except BaseException:
                stopping.set()
                raise

        async with AsyncExitStack() as opened:
            workers = min(self.parallel, len(jobs))
            clients = [await opened.enter_async_context(self._server.client()) for _ in range(0, workers, KEPT_ALIVE)]
            working = [work(clients[number // KEPT_ALIVE]) for number in range(workers)]
            for error in await asyncio.gather(*working, return_exceptions=True):
                if error is not None:
                    raise error
        if self._failures and not self._server.answers:
            raise self._gone()

    def _note(self, failure: FailedError) -> None:
        """Count a candidate that failed; raise where there is nothing to hope for."""
        self.failed += 1
        if failure.refused:
            self._refused += 1
            if self._refused >= REFUSALS and not self._server.answers:
                raise UserError(f"{self._server.url} {failure}; it has refused all of {self._refused} requests.")
        else:
            self._failures.append(failure)
            if len(self._failures) >= self.parallel:
                raise self._gone()
        self._server.warn("failed", f"{failure}; such candidates are left out, and the next run asks for them again.")

    def _gone(self) -> UserError:
        rest = "see that the server runs, then run again: what was sampled is kept."
        return UserError(f"{self._server.url} {self._failures[-1]}; {rest}")

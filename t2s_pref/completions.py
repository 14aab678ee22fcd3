"""Chat completions from any OpenAI-compatible server: what is sent, what is tried again, and what an answer says.

The client is huggingface_hub's. It brings httpx in some versions and httpx2 in others, so neither is named here: what
an error holds is found by its attributes.
"""

import asyncio
import json
import logging
import math
import os
import random
import re
import time
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from huggingface_hub import AsyncInferenceClient

from t2s_pref.errors import UserError, one_line
from t2s_pref.formats import CLOSE, OPEN
from t2s_pref.protocol import Answer, Request, candidate_digest
from t2s_pref.settings import SamplingSettings
from t2s_pref.stops import complete_part
from t2s_pref.wire import PassingError, message_of

logger = logging.getLogger(__name__)

KEY = "T2S_PREF_API_KEY"

# Tries for an answer, about a minute in all; the seconds before a second one, doubled each time up to the longest; the
# most seconds that a server may ask for with Retry-After; the seconds to connect, and for an answer as a whole.
TRIES = 8
FIRST_PAUSE, LONGEST_PAUSE, LONGEST_RETRY_AFTER = 0.5, 30.0, 120.0
CONNECT, TIMEOUT = 10.0, 600.0
PASSING = {408, 409, 425, 429}  # and all from 500 up
HOPELESS = {
    401: f"check the key in {KEY}",
    402: "see to your account there",
    403: f"check the key in {KEY}",
    404: "check base_url (--base-url) and model (--model)",
}
DISPENSABLE = ("chat_template_kwargs", "seed")  # left out where a server refuses them by name
RENAMED = "max_completion_tokens"  # what some of OpenAI's models want instead of max_tokens, and say so
ENDED = ("stop", "eos_token", "stop_sequence")  # the last two are TGI's


class FailedError(Exception):
    """No answer for one candidate in this run; `refused` where another try would not help either."""

    def __init__(self, reason: str, refused: bool) -> None:
        super().__init__(reason)
        self.refused = refused


class Read(NamedTuple):
    """An answer, the tokens of its prompt, and how many of these the server had in its cache."""

    answer: Answer
    prompt: int
    cached: int


class Client(AsyncInferenceClient):
    """The client without its guard, which refuses every request under HF_HUB_OFFLINE: this is not the Hub.

    Should a version not ask here any more, such a request ends with a line that says why.
    """

    async def _get_async_client(self) -> Any:
        session = await super()._get_async_client()
        hooks = session.event_hooks
        own = [each for each in hooks["request"] if not each.__module__.startswith("huggingface_hub")]
        session.event_hooks = {**hooks, "request": own}
        return session


class Server:
    """A server, and a model there by its name; it remembers what the server refuses and what was warned about.

    Raises:
        [`UserError`]: on a URL that is none.
    """

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model = _base(url), model
        self.omitted: tuple[str, ...] = ()
        self._said: set[str] = set()

    def client(self) -> Client:
        """A new client, with the key that is in the environment now."""
        key = _key()
        # Where there is no key, the client would send the token for the Hub, to a stranger: so it is given another and
        # does not look that up, and the header is taken out again.
        return Client(
            base_url=f"{self.url}/chat/completions",  # whole, or the client puts a /v1 into it
            token=key or "none",
            headers=None if key else {"authorization": None},
            timeout=(CONNECT, None, None, None),  # httpx's connect, read, write, pool; asyncio has the whole
        )

    def warn(self, kind: str, text: str) -> None:
        """Say something once."""
        if kind not in self._said:
            self._said.add(kind)
            logger.warning("%s %s", self.url, text)

    async def ask(
        self, client: Client, request: Request, number: int, settings: SamplingSettings, stopping: asyncio.Event
    ) -> Read | None:
        """One answer; what may pass is tried again, until `stopping`: then `None`.

        Raises:
            FailedError: where this candidate gets none.
            [`UserError`]: where no other would get one either.
        """
        messages, omitted, tried = json.loads(bytes(request.prompt)), self.omitted, 0
        while True:
            try:
                async with asyncio.timeout(TIMEOUT):
                    fields = _fields(self.model, request, number, settings, omitted)
                    answered = await client.chat_completion(messages, **fields)
                read = _read(answered, request, settings)
                self._leave_out(omitted, settings)
                return read
            except (FailedError, UserError):
                raise
            except Exception as error:  # the client's, the transport's, and those of what is no such answer
                response = _response(error)
                status, text = (0, "") if response is None else (response.status_code, response.text)
                what = _what(error, status, text)
            if key := _key():  # some servers repeat it
                what = what.replace(key, "***")
            if status in (400, 422):
                names = (*DISPENSABLE, *(("max_tokens",) if RENAMED in text else ()))
                refused = [name for name in names if name in text and name not in omitted]
                if refused:
                    omitted = (*omitted, refused[0])
                    continue
            if status in HOPELESS:
                rest = "then run again: what was sampled is kept."
                raise UserError(f"{self.url} {what.rstrip('.')}; {HOPELESS[status]}, {rest}")
            if 0 < status < 500 and status not in PASSING:
                raise FailedError(what, refused=True)
            if not tried:
                self.warn("passing", f"{what}; trying again for about a minute.")
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**tried) * random.uniform(0.5, 1.5)
            if response is not None:
                pause = max(pause, _retry_after(response.headers.get("retry-after")))
            tried += 1
            if tried >= TRIES:
                raise FailedError(f"{what} at try {tried} of {TRIES}", refused=False)
            if await _comes(stopping, pause):
                return None

    def _leave_out(self, names: tuple[str, ...], settings: SamplingSettings) -> None:
        """The server has answered without these fields: from now on they are not sent."""
        for name in names:
            if name in self.omitted:
                continue
            # With the format `think`, the answers themselves show whether the model thought.
            if name == "chat_template_kwargs" and settings.enable_thinking and settings.answer_format != "think":
                raise UserError(
                    f"{self.url} refuses {name}, so enable_thinking (--enable-thinking) cannot be asked for; leave it "
                    "out, and the server decides whether the model thinks."
                )
            self.omitted += (name,)
            if name == "max_tokens":  # goes on under its other name
                continue
            own = "whether the model thinks" if name == "chat_template_kwargs" else "its seeds"
            self.warn(name, f"refuses {name}: it is not sent any more, and the server decides {own}.")


def _base(url: str) -> str:
    """The address that `/chat/completions` is put behind."""
    plain = isinstance(url, str) and url.strip().isascii() and not re.search(r"[\s?#\x00-\x1f\x7f]", url.strip())
    with suppress(ValueError):  # of a port that is no number
        parts = urlsplit(url.strip() if plain else "")
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and parts.username is None:
            path = parts.path.rstrip("/").removesuffix("/chat/completions")
            return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"
    shown = "holds a name or password" if isinstance(url, str) and "@" in url else f"is {url!r}"
    raise UserError(f"base_url {shown}; it must be like http://localhost:8000/v1, and a key goes into {KEY}.")


def _key() -> str:
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{KEY} has a character that no HTTP header may have; it must be the key and nothing else.")
    return key


def about(text: str) -> int:
    """About how many tokens a text has."""
    return len(text.encode(errors="replace")) // 4 + 1


def _seed(row_seed: int, candidate: int) -> int:
    """The seed of one candidate, of 31 bits: some servers take no more."""
    return int.from_bytes(candidate_digest(row_seed, candidate), "big") >> 33


def _fields(
    model: str, request: Request, number: int, settings: SamplingSettings, omitted: tuple[str, ...]
) -> dict[str, Any]:
    """What is sent beside the messages: what every server knows, and the rest only where it is set."""
    sent = {"model": model, "temperature": settings.temperature, "top_p": settings.top_p}
    extra: dict[str, Any] = {}
    if "max_tokens" in omitted:
        extra[RENAMED] = request.cap
    else:
        sent["max_tokens"] = request.cap
    if "seed" not in omitted:
        sent["seed"] = _seed(request.row_seed, number)
    if settings.stop:
        sent["stop"] = list(settings.stop)
    if settings.top_k:
        extra["top_k"] = settings.top_k
    if settings.repetition_penalty != 1:
        extra["repetition_penalty"] = settings.repetition_penalty
    if "chat_template_kwargs" not in omitted:
        extra["chat_template_kwargs"] = {"enable_thinking": settings.enable_thinking}
    return {**sent, "extra_body": extra}


def _read(answered: Any, request: Request, settings: SamplingSettings) -> Read:
    """What the server answered."""
    # By attributes: as a dict, the whole answer lacks those fields of its parts that the client does not know.
    choice, usage = answered.choices[0], answered.usage or {}
    if choice.finish_reason == "abort":  # SGLang's and vLLM's, when they are stopped
        raise PassingError("ended an answer with 'abort'")
    if choice.finish_reason not in (*ENDED, "length"):
        raise FailedError(f"ended an answer with {choice.finish_reason!r}", refused=True)
    text = choice.message.content or ""
    # Servers with a reasoning parser take the thoughts out of the answer.
    thoughts = choice.message.get("reasoning_content") or choice.message.get("reasoning")
    if thoughts:
        text = f"{OPEN}\n{thoughts.strip()}\n{CLOSE}\n\n{text.lstrip()}"
    text = text.encode(errors="replace").decode()  # JSON can hold halves of surrogate pairs
    tokens, prompt = usage.get("completion_tokens"), usage.get("prompt_tokens")
    # Some servers leave the stop text in the answer, and none sees where the SQL is complete.
    found = [(at + len(stop), at) for stop in settings.stop if (at := text.find(stop)) >= 0]
    part = text[: min(found)[1]] if found else text
    if settings.ends_with_sql:
        before, closed, _ = part.partition(CLOSE)
        part = complete_part(part, thinking=OPEN not in before and (settings.enable_thinking or bool(closed)))
    ended = choice.finish_reason != "length" or len(part) < len(text)
    answer = Answer(part, about(text) if tokens is None else tokens, ended)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Read(answer, len(request.prompt) // 4 + 1 if prompt is None else prompt, cached)


def _response(error: BaseException) -> Any:
    """The server's response that an error is about, `None` where there is none.

    The client itself fails on some bodies of errors, a JSON list for one; the response is with what it was at, then.
    """
    at: BaseException | None = error
    while at is not None:
        response = getattr(at, "response", None)
        if hasattr(response, "status_code"):
            return response
        at = at.__cause__ or at.__context__
    return None


def _what(error: Exception, status: int, text: str) -> str:
    """What a try came to, in a few words."""
    if isinstance(error, PassingError):
        return str(error)
    if status:
        return f"answered {status}: {message_of(text)}"
    if type(error).__name__ == "OfflineModeIsEnabled":
        raise UserError("HF_HUB_OFFLINE is set, and this huggingface_hub asks no server then; unset it.") from error
    if isinstance(error, TimeoutError) and not isinstance(error.__cause__, Exception):  # asyncio's, not a connect's
        return f"gave no answer within {TIMEOUT:g} s"
    if isinstance(error, ValueError | TypeError | LookupError | AttributeError):
        return f"answers, but with no chat completion ({one_line(error)})"
    return f"failed ({one_line(error)})"


def _retry_after(header: str | None) -> float:
    """Seconds to wait, where the server says so, in seconds or with a date."""
    if not header:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    if not (math.isfinite(seconds) and seconds > 0):
        return 0.0
    return min(seconds, LONGEST_RETRY_AFTER) + random.uniform(0, FIRST_PAUSE)  # not all at once


async def _comes(event: asyncio.Event, seconds: float) -> bool:
    """Whether an event comes within so many seconds."""
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)
    return event.is_set()

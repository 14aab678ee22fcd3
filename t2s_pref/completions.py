"""Chat completions from any OpenAI-compatible server: what is sent, what is tried again, and what an answer says.

The client is huggingface_hub's. It brings httpx in some versions and httpx2 in others, so neither is named here: what
an error holds is found by its attributes.
"""

import asyncio
import json
import logging
import re
import time
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import AsyncInferenceClient

from t2s_pref.errors import UserError
from t2s_pref.patience import TRIES, pause, retry_after
from t2s_pref.protocol import Request, candidate_digest
from t2s_pref.replies import KEY, FailedError, NoAnswerError, Read, api_key, examine, read, shown
from t2s_pref.settings import SamplingSettings
from t2s_pref.wire import PassingError

logger = logging.getLogger(__name__)

# The seconds to connect, and for an answer as a whole, which may stand in the queue of a server with one slot for long.
CONNECT, TIMEOUT = 10.0, 3600.0
LOOK = 0.05  # seconds between looks at what the others have got
LIMITED, UNAVAILABLE = 429, 503
PASSING = {408, 409, 425, LIMITED}  # and all from 500 up
HOPELESS = {
    401: f"check the key in {KEY}",
    402: "see to your account there",
    403: f"check the key in {KEY}",
    404: "check base_url (--base-url) and model (--model)",
}
ONE_ONLY = (403, 404)  # where others are answered, this one is refused: OpenRouter flags a prompt with 403
DISPENSABLE = ("chat_template_kwargs", "seed")  # left out where a server refuses them by name
RENAMED = "max_completion_tokens"  # what some of OpenAI's models want instead of max_tokens, and say so


class Client(AsyncInferenceClient):
    """The client without its guard, which refuses every request under HF_HUB_OFFLINE: this is not the Hub.

    Should a version not ask here any more, such a request ends with a line that says why. Responses are examined here,
    and redirects are not followed: they take prompts to another host, or make a GET of the request.
    """

    async def _get_async_client(self) -> Any:
        try:
            session = await super()._get_async_client()
        except Exception as error:  # nothing was asked yet: it is of what the environment names
            base = str(self.model).removesuffix("/chat/completions")
            raise UserError(
                f"{base} cannot be asked ({shown(error)}); see to the proxy and certificate variables of the "
                "environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE)."
            ) from error
        session.follow_redirects = False
        hooks = session.event_hooks
        own = [each for each in hooks["request"] if not each.__module__.startswith("huggingface_hub")]
        theirs = [each for each in hooks["response"] if each is not examine]
        session.event_hooks = {**hooks, "request": own, "response": [*theirs, examine]}
        return session


class Server:
    """A server, and a model there by its name; it remembers what the server refuses and what was warned about.

    Attributes:
        answers: how many candidates it has answered.

    Raises:
        [`UserError`]: on a URL that is none.
    """

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model = _base(url), model
        self.omitted: tuple[str, ...] = ()
        self.answers = 0
        self._said: set[str] = set()
        # Requests that wait for a response; before when none goes out, by time.monotonic(), because the server wants
        # fewer; how often in a row it wanted that.
        self._under_way, self._not_before, self._limits = 0, 0.0, 0

    def client(self) -> Client:
        """A new client, with the key that is in the environment now."""
        key = api_key()
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
        messages, omitted, tried, paused = json.loads(bytes(request.prompt)), self.omitted, 0, 0
        before = self.answers
        while True:
            if await self._turn(stopping):
                return None
            begun = time.monotonic()
            try:
                answered = await self._once(client, messages, _fields(self.model, request, number, settings, omitted))
                found = read(answered, request, settings)
                self._leave_out(omitted, settings)
                self.answers, self._limits = self.answers + 1, 0
                return found
            except (FailedError, UserError):
                raise
            except Exception as error:  # the client's, the transport's, and those of what is no such answer
                failure = error if isinstance(error, NoAnswerError) else NoAnswerError(_what(error), 0, "", None)
            what, status, text = str(failure), failure.status, failure.text
            if status in (400, 422):
                names = (*DISPENSABLE, *(("max_tokens",) if RENAMED in text else ()))
                refused = [name for name in names if name in text and name not in omitted]
                if refused:
                    omitted = (*omitted, refused[0])
                    continue
            if status in ONE_ONLY:  # what is under way tells whether it is this one only
                while self._under_way and not self.answers:
                    if await _comes(stopping, LOOK):
                        return None
            if status in HOPELESS and not (status in ONE_ONLY and self.answers):
                rest = "then run again: what was sampled is kept."
                raise UserError(f"{self.url} {what.rstrip('.')}; {HOPELESS[status]}, {rest}")
            if 0 < status < 500 and status not in PASSING:
                raise FailedError(what, refused=True)
            # Of many that meet the server's limit, some come through: they show that the others will.
            tried = 0 if status == LIMITED and self.answers > before else tried + 1
            before = self.answers
            if tried >= TRIES:
                raise FailedError(f"{what} at try {tried} of {TRIES}", refused=False)
            after = retry_after(failure.retry_after)
            if status == LIMITED or (status == UNAVAILABLE and after):
                self._hold(begun, after)
            how_long = f"in {max(1, round(after))} s" if after else "for about a minute"
            self.warn("waiting" if after else "passing", f"{what}; trying again {how_long}.")
            if await _comes(stopping, max(after, pause(paused))):
                return None
            paused += 1

    async def _once(self, client: Client, messages: list[dict[str, str]], fields: dict[str, Any]) -> Any:
        """What comes back to one request."""
        self._under_way += 1
        try:
            async with asyncio.timeout(TIMEOUT):
                return await client.chat_completion(messages, **fields)
        finally:
            self._under_way -= 1

    async def _turn(self, stopping: asyncio.Event) -> bool:
        """Wait until the server may be asked again; whether `stopping` comes before."""
        while (left := self._not_before - time.monotonic()) > 0:
            if await _comes(stopping, left):
                return True
        return stopping.is_set()

    def _hold(self, begun: float, after: float) -> None:
        """Let no request go out for so many seconds, or where the server says none, for longer each time in a row.

        `begun` is when the one went out that met the limit: those that were under way with it are one time.
        """
        now = time.monotonic()
        if begun >= self._not_before:
            self._not_before, self._limits = now + pause(self._limits), self._limits + 1
        self._not_before = max(self._not_before, now + after)

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
    wrong = "holds a name or password" if isinstance(url, str) and "@" in url else f"is {url!r}"
    raise UserError(f"base_url {wrong}; it must be like http://localhost:8000/v1, and a key goes into {KEY}.")


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


def _what(error: Exception) -> str:
    """What a try without a response came to, in a few words."""
    if isinstance(error, PassingError):
        return str(error)
    if type(error).__name__ == "OfflineModeIsEnabled":
        raise UserError("HF_HUB_OFFLINE is set, and this huggingface_hub asks no server then; unset it.") from error
    if isinstance(error, TimeoutError) and not isinstance(error.__cause__, Exception):  # asyncio's, not a connect's
        return f"gave no answer within {TIMEOUT:g} s"
    return f"failed ({shown(error)})"


async def _comes(event: asyncio.Event, seconds: float) -> bool:
    """Whether an event comes within so many seconds."""
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)
    return event.is_set()

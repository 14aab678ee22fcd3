"""What a server of chat completions replies: an answer and its tokens, or what it says instead; never with the key."""

import json
import os
import re
from contextlib import suppress
from html import escape
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

from t2s_pref.errors import UserError
from t2s_pref.formats import CLOSE, OPEN
from t2s_pref.protocol import Answer, Request
from t2s_pref.settings import SamplingSettings
from t2s_pref.stops import complete_part
from t2s_pref.wire import PassingError, message_of

KEY = "T2S_PREF_API_KEY"

SHORT = 8  # characters: a shorter key is a word like "none", which is masked only where it stands alone
READ = 100_000  # characters of an error that are read at most: far more than are shown
SHOWN = 100  # characters of what a server says in a field where a word is expected

# How answers end, in small letters: TGI's own words and Anthropic's are among them, and Mistral's for a full context.
ENDED = ("stop", "eos_token", "stop_sequence", "end_turn")
CUT = ("length", "max_tokens", "model_length")
# SGLang's and vLLM's when they are stopped, OpenRouter's when what it passed the request to failed, DeepSeek's.
AGAIN = ("abort", "error", "insufficient_system_resource")
MOST_TOKENS = 2**31 - 1  # more are a mistake of the server's, and the store has no place for them


class FailedError(Exception):
    """No answer for one candidate in this run; `refused` where another try would not help either."""

    def __init__(self, reason: str, refused: bool) -> None:
        super().__init__(reason)
        self.refused = refused


class NoAnswerError(Exception):
    """A response without an answer: the status that it counts as, 0 for none; its text; the seconds it says to wait."""

    def __init__(self, what: str, status: int, text: str, retry_after: str | None) -> None:
        super().__init__(what)
        self.status, self.text, self.retry_after = status, text, retry_after


class Read(NamedTuple):
    """An answer, the tokens of its prompt, and how many of these the server had in its cache."""

    answer: Answer
    prompt: int
    cached: int


# -- the key ---------------------------------------------------------------------------------------------------------


def api_key() -> str:
    """The key that is in the environment now, `""` for none."""
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{KEY} has a character that no HTTP header may have; it must be the key and nothing else.")
    return key


def masked(text: str) -> str:
    """A text of others in one line, without the key, as it is or escaped, and without names and passwords in URLs.

    Whatever is to be cut for people is masked before: a piece of a key would not be found.
    """
    text = re.sub(r"//[^/@\s]*@", "//***@", " ".join(text.split())[:READ])
    if not (key := api_key()):
        return text
    found = "".join(_anyhow(character) for character in key)
    if len(key) < SHORT:
        return re.sub(rf"(?<!\w)(?:{found})(?!\w)", "***", text)
    return re.sub(found, "***", text, flags=re.IGNORECASE)


def _anyhow(character: str) -> str:
    """A pattern of a character as it is, or escaped as in a URL, in JSON, in HTML or in Python."""
    code = ord(character)
    most = "{0,8}"  # how often an escape is escaped; a bound, because a server may send nothing else
    forms = [rf"\\{most}{re.escape(character)}", rf"\\{most}u{code:04x}", rf"\\{most}x{code:02x}"]
    forms += [f"%(?:25){most}{code:02x}", f"&#0{most}{code};", f"&#x0{most}{code:x};"]
    forms += [re.escape(escape(character)), *([r"\+"] if character == " " else [])]
    return f"(?:{'|'.join(forms)})"


def shown(error: BaseException) -> str:
    """An error of another library in one line, without the key."""
    name, text = type(error).__name__, masked(str(error))
    return f"{name}: {text[:300]}" if text else name


def said(text: str) -> str:
    """What a body says, in one line, without the key."""
    try:
        with suppress(ValueError):  # JSON may escape what is escaped already
            text = json.dumps(json.loads(text), ensure_ascii=False)
        return message_of(masked(text))
    except RecursionError:
        return "nothing that can be read"


# -- responses -------------------------------------------------------------------------------------------------------


async def examine(response: Any) -> None:
    """Raise where a response is no chat completion; a hook of the client's, which would not notice or not say so.

    The client itself follows redirects, takes an error under status 200 for an answer, and fails on some bodies of
    errors without their status. Bodies are decoded here, because some name character sets that do not exist.

    Raises:
        [`UserError`]: on a redirect.
        NoAnswerError: on whatever else is none.
    """
    await response.aread()
    status, text = response.status_code, response.content.decode(errors="replace")
    wait = response.headers.get("retry-after")
    if 300 <= status < 400 and "location" in response.headers:
        raise UserError(_elsewhere(status, str(response.request.url), response.headers["location"]))
    if not 200 <= status < 300:
        raise NoAnswerError(f"answered {status}: {said(text)}", status, text, wait)
    body = None
    with suppress(ValueError, RecursionError):
        body = json.loads(response.content)
    choices, error = (body.get("choices"), body.get("error")) if isinstance(body, dict) else (None, None)
    if isinstance(choices, list) and choices:
        if isinstance(choices[0], dict) and isinstance(choices[0].get("message"), dict):
            return
    elif error:  # OpenRouter's, of the server behind it
        code = error.get("code") if isinstance(error, dict) else None
        status = int(code) if re.fullmatch("[45][0-9][0-9]", str(code)) else 0
        what = f"answered {status}: {said(text)}" if status else f"answered with an error: {said(text)}"
        raise NoAnswerError(what, status, text, wait)
    raise NoAnswerError(f"answers, but with no chat completion: {said(text)}", 0, text, wait)


def _elsewhere(status: int, asked: str, location: str) -> str:
    """What to say of a redirect: 301 to 303 make a GET of the request, 307 and 308 send prompts to another host."""
    there = "another address"
    with suppress(ValueError):
        parts = urlsplit(urljoin(asked, location))
        # neither a query nor a name, for they may be secret
        there = masked(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")
    there = there[: 2 * SHOWN]
    base = asked.removesuffix("/chat/completions")
    return f"{base} answered {status}: it is now at {there}; redirects are not followed, give that as base_url."


# -- answers ---------------------------------------------------------------------------------------------------------


def about(text: str) -> int:
    """About how many tokens a text has."""
    return len(text.encode(errors="replace")) // 4 + 1


def _count(usage: Any, name: str) -> int | None:
    """A number of tokens, `None` where the server says none that can be one."""
    value = usage.get(name) if isinstance(usage, dict) else None
    counts = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_TOKENS
    return value if counts else None


def _joined(content: Any) -> str | None:
    """A text that comes whole or as a list of parts; `None` where it is anything else."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else None


def read(answered: Any, request: Request, settings: SamplingSettings) -> Read:
    """What the server answered.

    Raises:
        PassingError: where another try may get an answer.
        FailedError: where none will.
    """
    # By attributes: as a dict, the whole answer lacks those fields of its parts that the client does not know.
    choice, usage = answered.choices[0], answered.usage
    tokens, prompt = _count(usage, "completion_tokens"), _count(usage, "prompt_tokens")
    full = _ended_full(choice.finish_reason, tokens is not None and tokens >= request.cap)
    message = choice.message
    text = "" if message.content is None else _joined(message.content)
    if text is None:
        raise PassingError(f"answers, but with a text of type {type(message.content).__name__}")
    text = _clean(text)
    # Servers with a reasoning parser take the thoughts out of the answer.
    thoughts = _joined(message.get("reasoning_content")) or _joined(message.get("reasoning"))
    if thoughts:
        text = text.lstrip()
    # Some servers leave the stop text in the answer, and none sees where the SQL is complete. Thoughts that the server
    # took out were no part of what it searched.
    found = [(at + len(stop), at) for stop in settings.stop if (at := text.find(stop)) >= 0]
    part = text[: min(found)[1]] if found else text
    if thoughts:
        part = f"{OPEN}\n{_clean(thoughts).strip()}\n{CLOSE}\n\n{part}"
    whole = len(part)
    if settings.ends_with_sql:
        before, closed, _ = part.partition(CLOSE)
        part = complete_part(part, thinking=OPEN not in before and (settings.enable_thinking or bool(closed)))
    ended = not full or bool(found) or len(part) < whole
    prompt = len(request.prompt) // 4 + 1 if prompt is None else prompt
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    cached = min(_count(details, "cached_tokens") or 0, prompt)
    return Read(Answer(part, about(text + (thoughts or "")) if tokens is None else tokens, ended), prompt, cached)


def _clean(text: str) -> str:
    """A text without the halves of surrogate pairs that JSON can hold."""
    return text.encode(errors="replace").decode()


def _ended_full(reason: Any, at_cap: bool) -> bool:
    """Whether an answer ended at the length cap, by the server's word or, where it says none, by its length."""
    word = reason.lower() if isinstance(reason, str) else reason
    if word in AGAIN:
        raise PassingError(f"ended an answer with {word!r}")
    if word is None or word == "":
        return at_cap
    if word not in (*ENDED, *CUT):
        # masked before it is quoted, which may escape what is in the key
        what = repr(masked(reason)) if isinstance(reason, str) else masked(json.dumps(reason))
        raise FailedError(f"ended an answer with {what[:SHOWN]}", refused=True)
    return word in CUT

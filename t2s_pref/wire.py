"""One connection to a server that answers in JSON: asked again where that may help, cut where nobody waits any more.

The client is http.client, because huggingface_hub brings httpx in some versions and httpx2 in others.
"""

import http.client
import json
import logging
import random
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from t2s_pref.errors import UserError, one_line

logger = logging.getLogger(__name__)

# Tries for an answer, about a minute in all, and for what is asked first, where a wrong URL is likelier; the seconds
# before a second try, doubled each time up to the longest; the statuses that another try may not meet.
TRIES, FIRST_TRIES = 8, 3
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
PASSING = {408, 429, 500, 502, 503, 504}
# Seconds to connect, and for an answer, which may stand in the server's queue for long. A server that is gone without
# a word is noticed by keep-alive, after some two minutes.
CONNECT, ANSWER = 10.0, 3600.0
KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}


class PassingError(Exception):
    """What another try may not meet."""


class Line:
    """One connection to the server, used for a request after the other; another thread may cut it."""

    def __init__(self, url: str, api_key: str, stopping: threading.Event) -> None:
        parts = urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.connection = kind(parts.hostname, parts.port, timeout=CONNECT)
        self.url, self.prefix, self.stopping = url, parts.path, stopping
        self.headers = {"Content-Type": "application/json"}
        if api_key:
            self.headers["Authorization"] = f"Bearer {api_key}"

    def ask(self, path: str, body: dict[str, Any] | None, tries: int, read: Callable[[Any], Any]) -> Any:
        """What `read` makes of the server's answer; what may pass is tried again.

        Raises:
            [`UserError`]: where the server refuses the request, answers something else, or no try succeeds.
        """
        for number in range(tries):
            try:
                return read(self._once(path, body))
            except (PassingError, OSError, http.client.HTTPException, UnicodeError) as error:
                self.close()  # the rest of a broken answer must not begin the next
                if isinstance(error, http.client.InvalidURL | UnicodeError | ssl.SSLError):
                    raise UserError(f"{self.url}{path} failed ({one_line(error)}); check the URL.") from error
                what = str(error) if isinstance(error, PassingError) else f"failed ({one_line(error)})"
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**number) * random.uniform(0.5, 1.5)
                if number == 0 and tries == TRIES:
                    logger.warning("%s %s; trying again for about a minute.", self.url, what)
                if number + 1 == tries or self.stopping.wait(pause):
                    break
            except (LookupError, TypeError, AttributeError) as error:
                raise UserError(f"{self.url}{path} does not answer as vLLM does; check the URL.") from error
        raise UserError(
            f"{self.url}{path} {what} at try {number + 1} of {tries}; see that the server runs, then run again: what "
            "was sampled is kept."
        )

    def _once(self, path: str, body: dict[str, Any] | None) -> Any:
        if self.connection.sock is None:
            self.connection.connect()
            self.connection.sock.settimeout(ANSWER)
            self.connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in KEEP_ALIVE.items():
                if hasattr(socket, name):
                    self.connection.sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        if self.stopping.is_set():  # asked once there is a socket to cut, so that no request slips through
            raise PassingError("was not asked")
        data = None if body is None else json.dumps(body).encode()
        self.connection.request("GET" if data is None else "POST", self.prefix + path, data, self.headers)
        response = self.connection.getresponse()
        status, text = response.status, response.read().decode(errors="replace")
        if status == 200:
            with suppress(ValueError):
                return json.loads(text)
        said = f"answered {status}: {message_of(text)}"
        if status in PASSING:
            raise PassingError(said)
        hints = {400: "mend that", 401: "check VLLM_API_KEY", 403: "check VLLM_API_KEY"}
        hint = hints.get(status, "check the URL")
        raise UserError(f"{self.url}{path} {said.rstrip('.')}; {hint}, then run again: what was sampled is kept.")

    def cut(self) -> None:
        """End what another thread waits for."""
        if (waiting := self.connection.sock) is not None:
            with suppress(OSError):
                waiting.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection; the next request makes another."""
        self.connection.close()


def message_of(text: str) -> str:
    """What an error's body says, in one line: vLLM's, FastAPI's, or a proxy's page."""
    with suppress(ValueError, AttributeError):
        error = json.loads(text)
        error = error.get("error", error)
        text = error if isinstance(error, str) else str(error.get("message") or error.get("detail") or error)
    return " ".join(text.split())[:300] or "nothing"

"""Asking again where that may help: how long to wait, and what of the Hub's failures passes."""

import json
import logging
import math
import random
import re
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError

from t2s_pref.errors import UserError, one_line

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

# The seconds before a second try, doubled each time up to the longest; the most seconds that a server may ask for with
# Retry-After; the tries after which it is no use: with these pauses, about a minute in all.
FIRST_PAUSE, LONGEST_PAUSE, LONGEST_RETRY_AFTER = 0.5, 30.0, 120.0
TRIES = 8

# The statuses that another try may not meet, beside those from 500 up; what makes 412 pass is that all is read anew.
PASSING = {408, 409, 412, 425, 429}
# How the errors of hf_xet, which are Python's own, tell the status.
_XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3}) ")
REFUSED = {
    401: "set HF_TOKEN to a token that may write, or `hf auth login`",
    403: "the token may not write there; take one that may, or open a pull request (create_pr, --create-pr)",
    404: "see to the name, and that the token may read and write there",
}


class LostError(ConnectionError):
    """Whether it was done is not known, and another try might do it twice."""


def pause(number: int) -> float:
    """The seconds of a pause, the first being 0: each about twice as long as the one before, and none like another."""
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(number, TRIES)) * random.uniform(0.5, 1.5)


def retry_after(header: str | None) -> float:
    """Seconds to wait, where the server says so, in seconds or with a date."""
    if not header:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (ArithmeticError, LookupError, TypeError, ValueError):  # of years and zones that no clock has
            return 0.0
    if not (math.isfinite(seconds) and seconds > 0):
        return 0.0
    return min(seconds, LONGEST_RETRY_AFTER) + random.uniform(0, FIRST_PAUSE)  # not all at once


def patiently(ask: Callable[[], Value], what: str, otherwise: str) -> Value:
    """What `ask` returns; what may pass is tried again, for about a minute.

    Raises:
        [`UserError`]: where the Hub refuses.
        `ConnectionError`: where it goes on failing; `otherwise` says how things stand then.
    """
    for number in range(TRIES):
        try:
            return ask()
        except (UserError, LostError):
            raise
        except Exception as error:
            status, after = failure(error)
            if type(error).__name__ == "OfflineModeIsEnabled":
                raise UserError(f"HF_HUB_OFFLINE is set, and {what} needs the Hub; unset it.") from error
            if status is None:
                raise
            if status in REFUSED:
                raise UserError(f"{what}: the Hub answered {status}; {REFUSED[status]}.") from error
            if 0 < status < 500 and status not in PASSING:
                raise UserError(f"{what}: the Hub refused: {one_line(error)}") from error
            found = f"answered {status}" if status else f"failed ({one_line(error)})"
            if number == TRIES - 1:
                raise ConnectionError(f"{what}: the Hub {found} at try {TRIES} of {TRIES}. {otherwise}") from error
            seconds = max(after, pause(number))
            logger.warning("%s: the Hub %s; trying again in %.0f s.", what, found, seconds)
            time.sleep(seconds)
    raise AssertionError  # the last try returns or raises


def failure(error: BaseException | None) -> tuple[int | None, float]:
    """The status that an error of the Hub's client holds, 0 for a broken connection, `None` for another error; and the
    seconds that the Hub wants to be left alone.

    The client brings httpx in some versions and httpx2 in others, so neither is named here.
    """
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(error, HfHubHTTPError) and response is not None:
            return response.status_code, retry_after(response.headers.get("Retry-After"))
        if isinstance(error, OSError) and (found := _XET_STATUS.search(str(error))):
            return int(found[1]), 0.0
        if isinstance(error, PermissionError) and type(error).__name__.startswith("Xet"):
            return 401, 0.0
        transport = any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
        if transport or isinstance(error, ConnectionError | TimeoutError | json.JSONDecodeError):
            return 0, 0.0
        error = error.__cause__
    return None, 0.0

"""How long to wait before a server is asked again."""

import math
import random
import time
from email.utils import parsedate_to_datetime

# The seconds before a second try, doubled each time up to the longest; the most seconds that a server may ask for with
# Retry-After; the tries after which it is no use: with these pauses, about a minute in all.
FIRST_PAUSE, LONGEST_PAUSE, LONGEST_RETRY_AFTER = 0.5, 30.0, 120.0
TRIES = 8


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

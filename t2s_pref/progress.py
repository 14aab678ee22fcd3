"""The bar of a sampling run: candidates and rows, tokens a second, what sharing saves, and the time that is left."""

import time
from dataclasses import replace

from datasets.utils import tqdm

from t2s_pref import ranks
from t2s_pref.protocol import Work


class Progress:
    """A bar that counts candidates; obeys `datasets.disable_progress_bars()`. Use it as a context manager.

    Args:
        candidates: how many there will be, those that are known already among them.
        desc: stands before the bar.
        work: what the engine counts; it may go on from earlier runs.
    """

    def __init__(self, candidates: int, desc: str, work: Work) -> None:
        self.rows = 0
        self._work, self._before, self._start = work, replace(work), time.perf_counter()
        self._bar = tqdm(total=candidates, desc=desc, unit=" candidates", disable=ranks.rank() > 0)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._tell()
        self._bar.close()

    def found(self, rows: int, candidates: int) -> None:
        """So many were in the store, those of so many rows all of them."""
        self.rows += rows
        if not self._bar.disable:
            self._bar.initial += candidates  # they say nothing of the speed
        self._bar.update(candidates)

    def drawn(self, row_is_complete: bool) -> None:
        """One more was drawn."""
        self.rows += row_is_complete
        self._tell(refresh=False)
        self._bar.update(1)

    def text(self) -> str:
        """What stands behind the bar."""
        work, before = self._work, self._before
        asked, computed = work.prompt_asked - before.prompt_asked, work.prompt_computed - before.prompt_computed
        pace = (work.generated - before.generated) / max(1e-9, time.perf_counter() - self._start)
        saved = f", {1 - computed / asked:.0%} of prefill saved" if asked else ""
        return f"{self.rows:,} rows, {pace:,.0f} tokens/s{saved}"

    def _tell(self, refresh: bool = True) -> None:
        self._bar.set_postfix_str(self.text(), refresh=refresh)

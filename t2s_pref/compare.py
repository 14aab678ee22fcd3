"""Result against result: equal, perhaps equal, or different. Standard library only: the sandbox's workers run it.

[`compare`] calls a candidate's result wrong only where it differs from the gold's under every lenient reading at once:
as sets, in any order, with the gold's columns anywhere among the candidate's, with rounded floats, numbers written as
text, text but for case and outer blanks, NULL for the empty string, percentages for ratios. Searches count their steps,
and one that takes too many ends in doubt, never in `wrong_result`.

Not covered: dates in other formats, units, thousands separators, columns that are concatenations of others, and a
candidate that has fewer columns than the gold.
"""

from collections import Counter
from hashlib import blake2b
from typing import Any

from t2s_pref.lenient import (
    AS_TEXT,
    EVERY,
    NAN,
    PERMUTED,
    RUNGS,
    OutOfStepsError,
    Rows,
    Search,
)
from t2s_pref.verdicts import AMBIGUOUS, EQUIVALENT, WEAK, WRONG_RESULT

SEVERAL, BUDGET, TURNED = "several", "budget", "rows as columns"


def compare(gold: Rows, candidate: Rows, ordered: bool) -> tuple[str, str]:
    """The verdict on a candidate's result, and the reason for a doubt, as of [`in_place`].

    A row of several values may also be meant as the rows of one value each that it would be if turned.
    """
    verdict, reason = in_place(gold, candidate, ordered)
    if verdict == WRONG_RESULT:
        for one, other in ((gold, candidate), (candidate, gold)):
            if one.width == 1 < len(one.rows) == other.width and len(other.rows) == 1:
                turned = Rows(other.width, [tuple(cell for (cell,) in one.rows)])
                sides = (turned, other) if one is gold else (other, turned)
                if in_place(*sides, False)[0] != WRONG_RESULT:
                    return AMBIGUOUS, TURNED
    return verdict, reason


def in_place(gold: Rows, candidate: Rows, ordered: bool) -> tuple[str, str]:
    """The verdict on a candidate's result, and the reason for a doubt.

    Strict: as many columns, the same rows by position as a bag, in order if `ordered` (the gold's outermost query has
    ORDER BY). 1 equals 1.0, NULL only NULL; '1' is not 1.

    The reason is the one leniency, of `RUNGS`, that explains the difference alone, the first of those that do, or
    "several"; "budget" where the search took too many steps; "empty", "null" or "zero" for a gold's result that is too
    little to tell, beside another such: the greatest of no rows is one NULL, and the first of them no row.

    >>> in_place(Rows(1, [(1,), (2,)]), Rows(1, [(2,), (1.0,)]), ordered=False)
    ('equivalent', '')
    >>> in_place(Rows(1, [(0.333,)]), Rows(2, [("a", 33.3)]), ordered=False)
    ('ambiguous', 'several')
    >>> in_place(Rows(1, [(1,)]), Rows(1, [(2,)]), ordered=False)
    ('wrong_result', '')
    """
    if (little := _says_little(gold)) and _says_little(candidate):
        return WEAK, little
    if strict_equal(gold, candidate, ordered):
        return EQUIVALENT, ""
    if not gold.rows or not candidate.rows or gold.width > candidate.width:
        return WRONG_RESULT, ""
    search = Search(gold, candidate, ordered)
    try:
        # Among floats, text that is read as a number must be scaled and rounded as they are; as text it need not.
        if not search.found(EVERY) and not (search.text_by_floats and search.found(EVERY - {AS_TEXT})):
            return WRONG_RESULT, ""
        for rung in RUNGS:
            if search.found(frozenset([rung])):
                return AMBIGUOUS, rung
    except OutOfStepsError:
        return AMBIGUOUS, BUDGET
    return AMBIGUOUS, SEVERAL


def _says_little(result: Rows) -> str:
    """What a result is that nothing can be told from, or the empty string."""
    if not result.rows:
        return "empty"
    if len(result.rows) > 1 or any(cell is not None and cell != 0 for cell in result.rows[0]):
        return ""
    return "null" if set(result.rows[0]) == {None} else "zero"


def strict_equal(gold: Rows, candidate: Rows, ordered: bool) -> bool:
    """Whether two results are the same rows by position: as a bag, or in order."""
    if gold.width != candidate.width or len(gold.rows) != len(candidate.rows):
        return False
    if gold.rows == candidate.rows:
        return True
    left, right = _comparable(gold.rows), _comparable(candidate.rows)
    return left == right if ordered else Counter(left) == Counter(right)


def bird_equal(gold: Rows, candidate: Rows) -> bool:
    """BIRD's comparison: `set(predicted) == set(gold)`, so neither order nor duplicates matter, nor an empty width."""
    return set(gold.rows) == set(candidate.rows)


def spider_equal(gold: Rows, candidate: Rows, ordered: bool) -> bool:
    """The comparison of Spider's test suite: a bag of rows under any order of the columns, in order if `ordered`.

    Unlike its `result_eq`, this does not try all permutations of the columns, which hangs with 26 of them: the search
    is bounded, and `False` where it ends so. `ordered` is the caller's to say; there "order by" anywhere in the gold's
    text counts. Its early rejection sorts each row's cells as text, so that there (2, 10.0) may not be (10, 2.0)
    permuted; here it is. NaN equals itself here.
    """
    if not gold.rows and not candidate.rows:
        return True
    if gold.width != candidate.width or len(gold.rows) != len(candidate.rows):
        return False
    if strict_equal(gold, candidate, ordered):
        return True
    try:
        return Search(gold, candidate, ordered).found(frozenset([PERMUTED]))
    except OutOfStepsError:
        return False


def digest(result: Rows) -> str:
    """16 hex digits, the same for the same bag of rows in every process."""
    rows = sorted(ascii(tuple(map(_canonical, row))) for row in result.rows)
    return blake2b(f"{result.width}\n{rows}".encode(), digest_size=8).hexdigest()


def _canonical(cell: Any) -> Any:
    if isinstance(cell, float):
        if cell != cell:
            return NAN
        return int(cell) if cell.is_integer() else cell
    if isinstance(cell, int):
        return int(cell) if cell.bit_length() < 10_000 else ("int", hex(cell))  # Python writes no longer ones
    return cell


def _comparable(rows: list[tuple]) -> list[tuple]:
    """The rows such that Python's own equality is the strict one: all is, but that NaN equals nothing."""
    if any(cell != cell for row in rows for cell in row):
        return [tuple(NAN if cell != cell else cell for cell in row) for row in rows]
    return rows

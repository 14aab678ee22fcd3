"""Whether a candidate's columns can be a gold's under some leniencies: a search that ends within a number of steps.

Standard library only: the sandbox's workers run it.
"""

import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from math import isinf
from operator import itemgetter, mul
from types import NoneType
from typing import Any, NamedTuple

ORDER, DUPLICATES, PERMUTED, EXTRA = "order", "duplicates", "columns permuted", "extra columns"
ROUNDING, AS_TEXT, CASE, BLANK, PERCENT = (
    "rounding",
    "number as text",
    "case or space",
    "null or empty text",
    "percent",
)
RUNGS = (ORDER, DUPLICATES, PERMUTED, EXTRA, ROUNDING, AS_TEXT, CASE, BLANK, PERCENT)
EVERY = frozenset(RUNGS)
OF_KEYS = frozenset((AS_TEXT, CASE, BLANK))  # these concern a cell alone

STEPS = 4_000_000  # in one comparison, of a quarter to half a microsecond
SIX_DIGITS = 5e-6  # the largest relative difference of two numbers that agree in 6 significant digits
SAME = 1e-9  # of two that differ by the order of a sum
TINY = 1e-12  # what such a sum may be off where it should be 0, and nothing is relative to it
HUGE = 2**1000  # beyond it integers have no neighbours: Python refuses to reckon with them and floats
FACTORS = (1, 100, 0.01)
NUMBERS = frozenset((int, float))
PLAIN = frozenset((int, NoneType))

_NUMBER = re.compile(r"([+-]?(?:\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})(?:[eE][+-]?\d{1,3})?)\s?%?", re.ASCII)
NAN = ("nan",)
_NUM = ("number",)  # stands for any number where numbers are compared apart


class Rows(NamedTuple):
    """A result: how many columns, known without rows too, and its rows of `None`, int, float, str and bytes."""

    width: int
    rows: list[tuple]


def _key(cell: Any, lenient: frozenset[str]) -> Any:
    """What of a cell is compared: equal keys are cells that are equal under some leniencies, but for tolerances."""
    if isinstance(cell, bytes) and CASE in lenient:
        try:
            cell = cell.decode()
        except UnicodeDecodeError:
            return cell
    if isinstance(cell, str):
        text = cell.strip()
        if BLANK in lenient and not text:
            return None
        if AS_TEXT in lenient and (number := _NUMBER.fullmatch(text)):
            try:
                return int(number[1])
            except ValueError:
                return float(number[1])
        return text.casefold() if CASE in lenient else cell
    if isinstance(cell, float) and cell != cell:
        return NAN
    return int(cell) if isinstance(cell, bool) else cell


def _decimals(value: float) -> int:
    if value != value or isinf(value):
        return 0
    value = float(f"{value:.12g}")  # 0.29 * 100 is 28.999999999999996: such noise is no precision
    if value.is_integer():
        return 0
    mantissa, _, exponent = repr(value).partition("e")
    return max(0, len(mantissa.partition(".")[2]) - int(exponent or 0))


def _small(number: Any) -> Any:
    """The number, or where it is an integer that no reckoning with floats can take, something that equals only it."""
    if type(number) is not int or -HUGE < number < HUGE:
        return number
    try:
        return float(number) if float(number) == number else ("int", number)
    except OverflowError:
        return ("int", number)


class _Column:
    """A column under some leniencies: its keys, and in a search with tolerances what numbers are among them."""

    def __init__(self, keys: Sequence[Any], tolerant: bool) -> None:
        self.keys = keys
        self.apart = keys  # the keys with all numbers alike
        self.has_floats = self.mixed = False
        self.numbers: list[tuple[float]] = []  # each once
        self.decimals = 0
        if not tolerant:
            return
        numbers = [key for key in keys if type(key) in NUMBERS]
        if numbers and not (min(numbers) > -HUGE and max(numbers) < HUGE):
            self.keys = keys = [_small(key) for key in keys]
            numbers = [key for key in keys if type(key) in NUMBERS]
        floats = {number for number in numbers if type(number) is float}
        if not numbers:
            return
        self.apart = [_NUM] * len(keys) if len(numbers) == len(keys) else [_apart(key) for key in keys]
        self.has_floats = bool(floats)
        integers = {number for number in numbers if type(number) is int} if len(floats) < len(numbers) else set()
        self.mixed = bool(floats and integers)
        # 1 and 1.0 are equal, and yet only one of them may be a rounding: both stay
        self.numbers = [(number,) for number in sorted([*integers, *floats])]
        self.decimals = max(map(_decimals, floats), default=0)


class _Fit(NamedTuple):
    """A candidate's column in the place of a gold's: by its keys, or number by number under a tolerance."""

    column: int
    numeric: bool = False
    factor: float = 1
    relative: float = 0.0
    absolute: float = 0.0
    cut: bool = False  # whether the gold's may be quotients without their fractions

    def close(self, gold: Any, candidate: Any) -> bool:
        """Whether two numbers agree. 4 is a rounding of 3.5, but 3 is not: it is what integer division makes of it.

        A gold of integers may have been divided so itself: where it says 3, 3.7 may be meant.
        """
        floats = (type(gold) is float) + (type(candidate) is float)
        if not floats and self.factor != 1:
            return gold == candidate == 0
        scaled = gold if self.factor == 1 else gold * self.factor
        if scaled == candidate:
            return True
        if not floats or isinf(scaled) or isinf(candidate):
            return False
        difference, larger = abs(scaled - candidate), max(abs(scaled), abs(candidate))
        if difference <= max(self.relative * larger, TINY):
            return True
        if self.cut and int(candidate) == gold:
            return True
        if type(candidate) is int and self.factor == 1 and difference == 0.5 and abs(candidate) < larger:
            return False
        return difference <= self.absolute

    def reach(self, gold: Any) -> tuple[float, float]:
        """Between which numbers all lie that are close to a gold's."""
        scaled = gold * self.factor
        if isinf(scaled):
            return scaled, scaled
        wide = max(2 * max(self.relative, SAME) * abs(scaled), self.absolute, float(self.cut), TINY)
        return scaled - wide, scaled + wide

    def spans(self, gold: _Column, candidate: _Column) -> bool:
        """Whether the least and the greatest numbers of two columns can be close: most pairs of columns end here."""
        if not gold.numbers or not candidate.numbers:
            return not gold.numbers and not candidate.numbers
        for end in (0, -1):
            low, high = self.reach(gold.numbers[end][0])
            if not low <= candidate.numbers[end][0] <= high:
                return False
        return True


class OutOfStepsError(Exception):
    """A search took more steps than it is allowed."""


class Search:
    """The search for the gold's columns among the candidate's, under some leniencies, within a number of steps."""

    def __init__(self, gold: Rows, candidate: Rows, ordered: bool) -> None:
        self.widths = gold.width, candidate.width
        self.lengths = self.sizes = len(gold.rows), len(candidate.rows)
        self.ordered = ordered
        self.cells = [list(zip(*rows.rows, strict=True)) for rows in (gold, candidate)]
        self.types = [[set(map(type, column)) for column in side] for side in self.cells]
        self.kinds = set(chain(*chain(*self.types)))
        self.text_by_floats = any(float in each and not each.isdisjoint((str, bytes)) for each in chain(*self.types))
        self.keys: dict[frozenset[str], list[list[Sequence[Any]]]] = {}
        self.steps = STEPS

    def found(self, lenient: frozenset[str]) -> bool:
        """Whether the results match under these leniencies."""
        self.lenient = lenient
        self.sequence = self.ordered and ORDER not in lenient
        self.bag = DUPLICATES not in lenient
        self.sizes = self.lengths
        wide, wider = self.widths
        if (wide < wider and EXTRA not in lenient) or (self.bag and self.sizes[0] != self.sizes[1]):
            return False
        if len(lenient) == 1 and not self._can_matter(*lenient):
            return False
        anywhere = wide < wider or PERMUTED in lenient
        sides = self._keys(lenient & OF_KEYS)
        self.tolerant = not lenient.isdisjoint((ROUNDING, PERCENT)) and any(
            type(key) is float for key in chain(*chain(*sides))
        )
        if not self.bag and wide == wider and not self.tolerant and not self.sequence:
            # Each row once. Under any order of the columns that stays so, and then it can be counted how often a value
            # comes, which tells columns apart that have the same values.
            sides = [list(zip(*set(zip(*side, strict=True)), strict=True)) for side in sides]
            self.sizes = len(sides[0][0]), len(sides[1][0])
            self.bag = True
            if self.sizes[0] != self.sizes[1]:
                return False
        self.gold, self.candidate = ([_Column(keys, self.tolerant) for keys in side] for side in sides)
        self._spend(sum(map(mul, self.widths, self.sizes)))
        own, other = self._signatures()
        fits: list[list[_Fit]] = []
        for place in range(wide):
            # its own place first: most results that match do so without being permuted
            places = [place, *(other for other in range(wider) if other != place)] if anywhere else [place]
            fits.append([fit for each in places if own[place] == other[each] for fit in self._fits(place, each)])
            if not fits[-1]:
                return False
        return self._place(fits)

    def _can_matter(self, rung: str) -> bool:
        """Whether one leniency alone can turn a difference into a match, told by widths, lengths and types only."""
        wide, wider = self.widths
        if wide < wider:
            return rung == EXTRA
        if self.lengths[0] != self.lengths[1]:
            return rung == DUPLICATES
        if rung in (ROUNDING, PERCENT):
            return float in self.kinds
        if rung == CASE:
            return not self.kinds.isdisjoint((str, bytes))
        if rung in (AS_TEXT, BLANK):
            return str in self.kinds
        return {ORDER: self.ordered, PERMUTED: wide > 1, EXTRA: False}.get(rung, True)

    def _keys(self, lenient: frozenset[str]) -> list[list[Sequence[Any]]]:
        if lenient not in self.keys:
            self.keys[lenient] = [
                [
                    cells if types <= PLAIN else [_key(cell, lenient) for cell in cells]
                    for cells, types in zip(*side, strict=True)
                ]
                for side in zip(self.cells, self.types, strict=True)
            ]
            self._spend(sum(map(mul, self.widths, self.lengths)))
        return self.keys[lenient]

    def _spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps <= 0:
            raise OutOfStepsError

    def _signatures(self) -> list[list[int]]:
        """A number for each column, gold's and candidate's: only those with the same one can stand for each other."""
        known: dict[Any, int] = {}

        def signature(column: _Column) -> int:
            values = column.apart if self.tolerant else column.keys
            found = frozenset(Counter(values).items() if self.bag else values)
            return known.setdefault(found, len(known))

        return [[signature(column) for column in side] for side in (self.gold, self.candidate)]

    def _fits(self, place: int, other: int) -> Iterator[_Fit]:
        """How a candidate's column can stand for a gold's of the same signature."""
        gold, candidate = self.gold[place], self.candidate[other]
        if not gold.has_floats and not candidate.has_floats:
            if not self.tolerant or gold.numbers == candidate.numbers:
                yield _Fit(other)
            return
        for factor in FACTORS if PERCENT in self.lenient else FACTORS[:1]:
            relative, absolute = SAME, 0.0
            if ROUNDING in self.lenient:
                relative = SIX_DIGITS
                shift = {1: 0, 100: 2, 0.01: -2}[factor]
                decimals = max(0, min(gold.decimals - shift, candidate.decimals))
                ratio = {1: 1, 100: gold.decimals, 0.01: candidate.decimals}[factor]
                absolute = 0.5 * 10.0**-decimals * (1 + SAME) if ratio else 0.0  # 0.0 is no rounding of 20 %
            cut = absolute > 0 and factor == 1 and not gold.has_floats
            fit = _Fit(other, True, factor, relative, absolute, cut)
            if (factor == 1 and gold.numbers == candidate.numbers) or (
                fit.spans(gold, candidate) and self._cover(gold.numbers, candidate.numbers, [fit])
            ):
                yield fit

    def _place(self, fits: list[list[_Fit]]) -> bool:
        """Find a column of the candidate's for each of the gold's such that the rows match: backtracking, by a stack.

        Rows that are alike in the columns chosen so far share a number, so that a step looks at one column only.
        """
        order = sorted(range(len(fits)), key=lambda place: len(fits[place]))
        chosen: list[tuple[int, _Fit]] = []
        alike: tuple[list[int], list[int]] = ([0] * self.sizes[0], [0] * self.sizes[1])
        stack = [(iter(fits[order[0]]), alike)]
        while stack:
            choices, alike = stack[-1]
            del chosen[len(stack) - 1 :]
            taken = {fit.column for _, fit in chosen}
            for fit in choices:
                if fit.column in taken:
                    continue
                chosen.append((order[len(chosen)], fit))
                if finer := self._refined(alike, chosen):
                    if len(chosen) == len(order):
                        return True
                    stack.append((iter(fits[order[len(chosen)]]), finer))
                    break
                chosen.pop()
            else:
                stack.pop()
        return False

    def _refined(
        self, alike: tuple[list[int], list[int]], chosen: list[tuple[int, _Fit]]
    ) -> tuple[list[int], list[int]] | None:
        """The numbers of the rows with the column chosen last, or `None` where the rows don't match in those chosen."""
        self._spend(sum(self.sizes))
        place, fit = chosen[-1]
        gold, candidate = self.gold[place], self.candidate[fit.column]
        found: dict[Any, int] = {}
        ours = zip(alike[0], gold.apart if fit.numeric else gold.keys, strict=True)
        left = [found.setdefault(row, len(found)) for row in ours]
        theirs = zip(alike[1], candidate.apart if fit.numeric else candidate.keys, strict=True)
        try:
            right = [found[row] for row in theirs]
        except KeyError:
            return None
        if self.sequence:
            # of each row the first, where duplicates are overlooked: in both results they come in the same order then
            same = left == right or (not self.bag and list(dict.fromkeys(left)) == list(dict.fromkeys(right)))
        elif self.bag:
            same = Counter(left) == Counter(right)
        else:
            same = len(set(right)) == len(found)
        known = len(chosen) == 1 and not self.bag and not self.sequence  # `_fits` has looked at one column
        numeric = [] if known else [each for each in chosen if each[1].numeric]
        if not same or (numeric and not self._near(left, right, numeric)):
            return None
        return left, right

    def _near(self, left: list[int], right: list[int], numeric: list[tuple[int, _Fit]]) -> bool:
        """Whether rows that are alike in all else are close in the columns of numbers."""
        golds = [self.gold[place].keys for place, _ in numeric]
        candidates = [self.candidate[fit.column].keys for _, fit in numeric]
        fits = [fit for _, fit in numeric]
        self._spend(len(fits) * sum(self.sizes))
        if self.sequence:
            return all(map(_all_close, [fits] * len(left), zip(*golds, strict=True), zip(*candidates, strict=True)))
        rows = Counter if self.bag else set
        if all(fit.factor == 1 for fit in fits) and (
            rows(zip(left, *golds, strict=True)) == rows(zip(right, *candidates, strict=True))
        ):
            return True  # there is nothing to tolerate
        mixed = any(self.gold[place].mixed or self.candidate[fit.column].mixed for place, fit in numeric)
        once = mixed or not self.bag or len(fits) > 1
        ours, theirs = _groups(left, golds, mixed, once), _groups(right, candidates, mixed, once)
        if once:
            return all(self._cover(ours[row], theirs[row], fits) for row in ours)
        # as often: of one column's floats the least is for the least
        return all(
            _all_close(fits, a, b) for row in ours for a, b in zip(sorted(ours[row]), sorted(theirs[row]), strict=True)
        )

    def _cover(self, golds: list[tuple], candidates: list[tuple], fits: list[_Fit]) -> bool:
        """Whether each vector of numbers has a close one on the other side."""
        if len(golds) == len(candidates) == 1:
            return _all_close(fits, golds[0], candidates[0])
        places = [place for place, number in enumerate(golds[0]) if type(number) in NUMBERS]
        if not places:
            return True
        place = places[0]
        if len(places) > 1:  # where the numbers differ most, the fewest are near
            place = max(places, key=lambda each: len({vector[each] for vector in candidates}))
        near = fits[place]
        candidates = sorted(candidates, key=itemgetter(place))
        values = [vector[place] for vector in candidates]
        self._spend(8 * len(golds) + 2 * len(candidates))
        reached: set[int] = set()
        for vector in golds:
            low, high = near.reach(vector[place])
            met = False
            for other in range(bisect_left(values, low), bisect_right(values, high)):
                self._spend(3 * len(fits))
                if not (met and other in reached) and _all_close(fits, vector, candidates[other]):
                    met = True
                    reached.add(other)
            if not met:
                return False
        return len(reached) == len(candidates)


def _all_close(fits: list[_Fit], gold: tuple, candidate: tuple) -> bool:
    """Whether two rows' numbers are close; what else stands in a column of numbers has been compared before."""
    for fit, one, other in zip(fits, gold, candidate, strict=True):
        if type(one) in NUMBERS and not fit.close(one, other):
            return False
    return True


def _groups(alike: list[int], columns: list[Sequence[Any]], mixed: bool, once: bool) -> dict[int, list[tuple]]:
    """The rows' numbers by all else that is in them. `once`: equal ones of the same types only once."""
    groups: dict[int, list[tuple]] = {}
    seen: set[Any] = set()
    for number, *vector in zip(alike, *columns, strict=True):
        if once:
            before = len(seen)
            seen.add((number, *vector, *map(type, vector)) if mixed else (number, *vector))
            if len(seen) == before:
                continue
        groups.setdefault(number, []).append(tuple(vector))
    return groups


def _apart(key: Any) -> Any:
    return _NUM if type(key) in NUMBERS else key

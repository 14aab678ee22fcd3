"""Which answer is chosen against which reject: the gold's or the model's own, and in what order they pair up."""

from collections import Counter
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import NamedTuple

from t2s_pref.errors import UserError
from t2s_pref.settings import CHOSENS
from t2s_pref.trees import distance
from t2s_pref.verdicts import EQUIVALENT, RIGHT, SAME_AST

GOLD, OWN, OWN_OR_GOLD = CHOSENS


class Answer(NamedTuple):
    """One side of a pair: what is trained on, its SQL, and its place among the candidates.

    Places from -1 downwards are the gold's answers: the gold SQL itself, or its chains of thought.
    """

    place: int
    text: str
    sql: str


class Reject(NamedTuple):
    """A proven reject, and what its verification noted: verdict, digest of its result, distance from the gold."""

    place: int
    text: str
    sql: str
    verdict: str = ""
    digest: str = ""
    distance: float = 0.0


def check_chosen(chosen: str) -> None:
    """Raise [`UserError`] on a name that is none of `gold`, `own` and `own_or_gold`."""
    if chosen not in CHOSENS:
        raise UserError(f"chosen is {chosen!r}; it must be one of {', '.join(CHOSENS)}.")


def proven_right(answer_format: str) -> tuple[str, ...]:
    """The verdicts of a candidate that can be chosen: right, and another text than the gold, which reasoning always is.

    >>> proven_right("sql")
    ('equivalent', 'same_ast')
    """
    return (EQUIVALENT, SAME_AST) if answer_format == "sql" else RIGHT


def chosen_answers(chosen: str, own: Sequence[Answer], of_gold: Sequence[Answer]) -> list[Answer]:
    """What of one row may be chosen, each text once."""
    answers = {GOLD: of_gold, OWN: own, OWN_OR_GOLD: own or of_gold}[chosen]
    return list({answer.text.strip(): answer for answer in reversed(answers)}.values())[::-1]


def pair_up(
    answers: Sequence[Answer],
    rejects: Sequence[Reject],
    select: str,
    most: int | None,
    *,
    dialect: str = "sqlite",
    seed: int = 0,
) -> dict[int, int]:
    """The place of the chosen answer by the place of its reject, of the pairs of one row that come first.

    A reject is in one pair at most. The chosen answers take turns, so that none is overused; between those whose turn
    it is, and between rejects, `select` decides. `random` depends on the texts and the seed, not on the row's place.

    Args:
        select: `first` as sampled, `hardest` the two sides whose syntax trees differ least, `diverse` the rejects with
            other verdicts and results first, `closest_length` the two texts whose numbers of characters differ least.
        most: how many pairs; `None` for one a reject.

    >>> answers, rejects = [Answer(0, "aaaa", "")], [Reject(1, "b" * 9, ""), Reject(2, "ccc", "")]
    >>> pair_up(answers, rejects, "closest_length", 1)
    {2: 0}
    """
    if not answers:
        return {}
    cost = _cost(select, rejects, dialect, seed)
    ranked = sorted(
        (cost(answer, reject), number, reject.place, answer.place)
        for number, reject in enumerate(rejects)
        for answer in answers
    )
    used: Counter[int] = Counter()
    pairs: dict[int, int] = {}
    while ranked and (most is None or len(pairs) < most):
        best = min(ranked, key=lambda each: used[each[3]])  # the first of those whose chosen answer was used least
        _, _, reject, answer = best
        pairs[reject] = answer
        used[answer] += 1
        ranked = [each for each in ranked if each[2] != reject]
    return pairs


def _cost(select: str, rejects: Sequence[Reject], dialect: str, seed: int) -> Callable[[Answer, Reject], float]:
    """What a pair costs: those of the least cost come first, and of equals those sampled first."""
    if select == "hardest":
        # the gold's is known, and is that to the nearest of all accepted golds
        return lambda answer, reject: reject.distance if answer.place < 0 else distance(answer.sql, reject.sql, dialect)
    if select == "diverse":
        turn = {place: number for number, place in enumerate(_diverse(rejects))}
        return lambda _, reject: turn[reject.place]
    if select == "closest_length":
        return lambda answer, reject: abs(len(answer.text) - len(reject.text))
    if select == "random":
        return lambda answer, reject: _noise(seed, answer.text, reject.text)
    return lambda _, reject: reject.place


def _noise(seed: int, *texts: str) -> float:
    digest = blake2b("\0".join([str(seed), *texts]).encode(errors="surrogatepass"), digest_size=6)
    return int.from_bytes(digest.digest(), "big")


def _diverse(rejects: Sequence[Reject]) -> list[int]:
    """Places such that each next one's result, then its verdict, is the one seen least before it."""
    results: Counter[tuple[str, str]] = Counter()
    kinds: Counter[str] = Counter()
    ordered = []
    left = list(rejects)
    while left:
        each = min(left, key=lambda one: (results[one.verdict, one.digest], kinds[one.verdict], one.place))
        left.remove(each)
        ordered.append(each.place)
        results[each.verdict, each.digest] += 1
        kinds[each.verdict] += 1
    return ordered

"""Sampling until enough is proven: which candidates each row gets, decided round by round by their verdicts."""

import logging
from collections.abc import Collection, Iterator
from typing import NamedTuple

from datasets import Dataset

from t2s_pref import ranks
from t2s_pref.columns import PROMPT_TOO_LONG, REJECTED, STATUS
from t2s_pref.pairs import KEPT, drop_causes
from t2s_pref.plan import PAGE
from t2s_pref.progress import Progress
from t2s_pref.sampler import POSITION, RejectSampler
from t2s_pref.verdicts import GOLD_USABLE
from t2s_pref.verifier import Question, Verifier

logger = logging.getLogger(__name__)


class Proof(NamedTuple):
    """What proves candidates wrong, what each row asks of it, and the most candidates that a row may cost.

    Where there are verdicts in `right`, a row also wants one candidate with one of them.
    """

    verifier: Verifier
    questions: list[Question]
    max_candidates: int
    right: Collection[str] = ()


def sample_share(planned: Dataset, sampler: RejectSampler, desc: str) -> None:
    """Sample every n-th page of the plan into the store, n ranks together all of them."""
    mine = [row for row in range(len(planned)) if row // PAGE % ranks.world_size() == ranks.rank()]
    pages = planned.select(mine)
    wanted = sampler.wanted
    total = sum(
        sampler.settings.candidates if wanted is None else len(wanted[position]) for position in pages[POSITION]
    )
    with Progress(total, desc, sampler.engine.work) as sampler.progress:
        for page in pages.iter(PAGE):
            sampler(page)
    sampler.progress = None


def sample_until_proven(planned: Dataset, sampler: RejectSampler, proof: Proof, cpu: bool) -> list[range]:
    """Sample into the store until each row has its distinct proven rejects; the candidates of each row, by position.

    A row whose gold proves nothing gets none. Each round, a row gets as many new candidates as it lacks proven ones,
    so that no token is spent on a reject too many. A candidate's number is its seed, so what a row gets depends on its
    own verdicts only, and a run that was stopped goes on with what it has. Called on all ranks; rank 0 judges.
    """
    places = {position: place for place, position in enumerate(planned[POSITION][:])}
    totals = [0] * len(planned)
    texts: list[list[str]] = [[] for _ in totals]
    lacking: dict[int, int] = {}
    if ranks.rank() == 0:
        proof.verifier.judge(((question, ()) for question in proof.questions), desc="Running golds")
        usable = [proof.verifier.gold(question).verdict in GOLD_USABLE for question in proof.questions]
        lacking = {position: sampler.settings.candidates for position, can in enumerate(usable) if can}
    number = 0
    while lacking := ranks.from_main(lacking, cpu):
        number += 1
        sampler.wanted = [range(total, total) for total in totals]
        for position, lack in lacking.items():
            totals[position] = min(totals[position] + lack, proof.max_candidates)
            sampler.wanted[position] = range(sampler.wanted[position].start, totals[position])
        # in plan order, as in the first round: like beside like
        rows = planned.select(sorted(places[position] for position in lacking))
        sample_share(rows, sampler, f"Sampling, round {number}")
        ranks.wait_for_everyone(cpu)
        if ranks.rank() == 0:
            sampler.store.refresh()
            sampler.collecting = True
            for position, fresh, statuses in _sampled(rows, sampler):
                texts[position] += fresh
                if PROMPT_TOO_LONG in statuses:  # of this row, no candidate can be had
                    del lacking[position]
            sampler.collecting = False
            lacking = _lacking(lacking, totals, texts, sampler.settings.num_rejects, proof)
    return [range(total) for total in totals]


def _sampled(rows: Dataset, sampler: RejectSampler) -> Iterator[tuple[int, list[str], list[str]]]:
    """The SQL and the statuses of a round's candidates by the rows' positions: all of it is in the store by now."""
    for page in rows.iter(PAGE):
        columns = sampler(page)
        yield from zip(page[POSITION], columns[REJECTED], columns[STATUS], strict=True)


def _lacking(
    asked: dict[int, int], totals: list[int], texts: list[list[str]], wanted: int, proof: Proof
) -> dict[int, int]:
    """How many more candidates each of the rows `asked` needs, those left out that have or can have no more."""
    questions = {position: proof.questions[position] for position in asked}
    proof.verifier.judge((question, texts[position]) for position, question in questions.items())
    lacking = {}
    for position, question in questions.items():
        found = [proof.verifier.candidate(question, text).verdict for text in texts[position]]
        causes = drop_causes(question.golds, texts[position], "normalized", question.dialect, found)
        lack = wanted - causes.count(KEPT)
        if proof.right and not any(verdict in proof.right for verdict in found):
            lack = max(lack, 1)
        if lack > 0 and totals[position] < proof.max_candidates:
            lacking[position] = lack
    return lacking

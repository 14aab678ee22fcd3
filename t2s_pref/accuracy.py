"""`evaluate`: how often a model is right, by execution, greedy and with several tries.

Three measures side by side, because published numbers use different ones: `strict`, ours (bag of rows, by position, in
order where the gold has one); `bird`, the set of rows that BIRD compares; `spider`, the comparison of Spider's test
suite, under any order of the columns, with DISTINCT taken out of both queries as its command does by default.

Not covered: BIRD's efficiency score; Spider's exact set match and its replacement of values.
"""

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from datasets import Dataset
from datasets.utils import tqdm

from t2s_pref import ranks
from t2s_pref.columns import DB_ID, FAILED, OUTPUT, REJECTED, REQUIRED, SAMPLED, STATUS, check_columns, one_split
from t2s_pref.databases import DatabasesLike
from t2s_pref.engines import TransformersEngine
from t2s_pref.errors import UserError
from t2s_pref.generate import generate_rejected
from t2s_pref.pool import Bounds, Job, Task, WorkerPool
from t2s_pref.protocol import Engine
from t2s_pref.settings import GOLD_TIMEOUT, TIMEOUT, SamplingSettings
from t2s_pref.trees import without_distinct
from t2s_pref.verdicts import GOLD_USABLE, VERDICTS
from t2s_pref.verifier import (
    Question,
    Verifier,
    as_candidate,
    as_gold,
    of_candidate,
    of_golds,
    of_instances,
    statement_of,
)
from t2s_pref.verify import open_verifier, question

MEASURES = ("strict", "bird", "spider")
NO_ANSWER = "no_answer"


@dataclass(frozen=True)
class Evaluation:
    """Execution accuracy; prints as a table.

    `accuracy` has shares by way of answering (`greedy`, `pass@1`, `pass@k`), database (`""` for all) and measure.
    `rows` counts the rows by database whose gold can tell; the others (`golds`, by verdict) are in no share.
    `verdicts` counts the answers by way of drawing (`greedy`, `sampled`), database and verdict.
    """

    rows: dict[str, int]
    accuracy: dict[str, dict[str, dict[str, float]]]
    verdicts: dict[str, dict[str, dict[str, int]]]
    golds: dict[str, int]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        wide = max(len("all databases"), *(len(name) for name in self.rows))
        lines = [*self.notes, f"{'':{wide}}{'rows':>8}  {'':10}" + "".join(f"{name:>9}" for name in MEASURES)]
        for db_id, count in self.rows.items():
            for way, of in self.accuracy.items():
                shares = "".join(f"{100 * of[db_id][measure]:>7.1f} %" for measure in MEASURES)
                lines.append(f"{db_id or 'all databases':{wide}}{count:>8,}  {way:10}{shares}")
        counts = {way: of[""] for way, of in self.verdicts.items()}
        lines += ["", f"{'answers by verdict':22}" + "".join(f"{way:>10}" for way in counts)]
        for verdict in (*VERDICTS, NO_ANSWER):
            if any(verdict in of for of in counts.values()):
                lines.append(f"  {verdict:20}" + "".join(f"{of.get(verdict, 0):>10,}" for of in counts.values()))
        if left_out := {verdict: count for verdict, count in self.golds.items() if verdict not in GOLD_USABLE}:
            lines += ["", "rows left out: their golds tell nothing"]
            lines += [f"  {verdict:22}{count:>6,}" for verdict, count in left_out.items()]
        return "\n".join(lines)


def evaluate(
    dataset: Dataset,
    engine: Engine | str,
    databases: DatabasesLike,
    settings: SamplingSettings | None = None,
    *,
    timeout: float = TIMEOUT,
    gold_timeout: float = GOLD_TIMEOUT,
    database_version: str | None = None,
    workers: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Evaluation | None:
    """Execution accuracy of a model on rows with gold SQL: of its greedy answer, and of `settings.num_rejects` samples.

    pass@j is the unbiased estimate of Chen et al. (arXiv 2107.03374) from these samples: the chance that one of j is
    right.

    Args:
        dataset: as for `generate_rejected`; columns read for running: `output`, and where present `alternatives`,
            `db_id` and `dialect`.
        engine: the model; a `str` is a folder or Hub id.
        databases, timeout, gold_timeout, database_version, workers, cache_dir: as for `verify_rejected`.
        settings: how the samples are drawn; its `num_rejects` is the k of pass@k.

    Returns:
        [`Evaluation`]; `None` on all ranks but the first.

    Raises:
        [`UserError`]: on missing columns, where no database is found, where the model cannot be loaded, where no gold
            can tell what is right.
    """
    rows = one_split(dataset)
    check_columns(rows, REQUIRED, "load_sft makes them from alpaca files.")
    if not len(rows):
        raise UserError("The dataset has no rows to evaluate on.")
    settings = settings or SamplingSettings()
    engine = TransformersEngine(engine) if isinstance(engine, str | os.PathLike) else engine
    greedy = replace(settings, num_rejects=1, temperature=0.0)
    ways = {"greedy": greedy} if settings.temperature == 0 else {"greedy": greedy, "sampled": settings}
    bounds = Bounds(timeout, gold_timeout)
    answers = {}
    # opened before anything is sampled: what is wrong with the databases shows at once
    with open_verifier(rows, databases, bounds, database_version, workers, cache_dir) as judge:
        for way, drawn in ways.items():
            sampled = generate_rejected(rows, engine, drawn, cache_dir=cache_dir)
            if failed := sum(statuses.count(FAILED) for statuses in sampled[STATUS]):
                raise UserError(f"{failed} of the answers failed and would count as wrong; run again to ask for these.")
            answers[way] = [_texts(row) for row in sampled.select_columns([REJECTED, STATUS])]
        if ranks.rank():
            return None
        asked = [question(row, OUTPUT, judge.databases) for row in rows]
        texts = [list(dict.fromkeys(text for of in answers.values() for text in of[row])) for row in range(len(rows))]
        scored = score(judge, asked, texts)
        notes = (f"evaluate: {engine.describe()}", f"run on: {judge.engines()}")
    db_ids = [each or "" for each in rows[DB_ID]] if DB_ID in rows.column_names else [""] * len(rows)
    return _evaluation(db_ids, answers, scored, notes)


def _texts(row: dict[str, Any]) -> list[str]:
    """A text for each candidate; an answer that was cut or has no SQL is an empty one."""
    usable = iter(row[REJECTED])
    return [next(usable) if status == SAMPLED else "" for status in row[STATUS]]


Scores = dict[str, dict[str, Any]]


def score(judge: Verifier, asked: list[Question], texts: list[list[str]]) -> list[tuple[str, Scores]]:
    """For each row the verdict on its gold, and each text's verdict and measures."""
    found: list[tuple[str, Scores]] = [("", {})] * len(asked)
    with (
        WorkerPool(judge.workers, judge.bounds) as pool,
        tqdm(total=len(asked), desc="Running answers", unit=" rows") as bar,
    ):
        tasks = (_task(judge, each, of) for each, of in zip(asked, texts, strict=True))
        for row, result in pool.run(tasks):
            found[row] = result
            bar.update()
        judge.databases.check_unchanged()
    return found


def _task(judge: Verifier, asked: Question, texts: list[str]) -> Task[tuple[str, Scores]]:
    dialect = judge.databases.dialect(asked.db_id)
    golds = [as_gold(statement_of(text), dialect) for text in asked.golds]
    candidates = [as_candidate(statement_of(text), dialect) for text in texts if text]
    plain = [[each._replace(sql=without_distinct(each.sql, dialect)) for each in of] for of in (golds, candidates)]
    of_all: list[tuple[str, str]] = []
    answers: list[list[dict[str, Any]]] = [[] for _ in candidates]
    for instance in judge.databases[asked.db_id]:
        place, server = instance.address, instance.server
        outcome = yield Job(place, tuple(golds), tuple(candidates), server=server, scores=True)
        of_all.append(of_golds(outcome.golds))
        if of_all[-1][0] not in GOLD_USABLE:
            continue
        spider = outcome.candidates
        if plain != [golds, candidates]:
            proven = tuple(gold._replace(proven=True, volatile="") for gold in plain[0])
            spider = (yield Job(place, proven, tuple(plain[1]), server=server, scores=True)).candidates
        for number, answer in enumerate(outcome.candidates):
            other = spider[number]["spider"] if number < len(spider) else False
            answers[number].append({**answer, "spider": other})
    verdict = of_instances(of_all)[0]
    scores: Scores = {"": {"verdict": NO_ANSWER, **dict.fromkeys(MEASURES, False)}}
    for text, of in zip((text for text in texts if text), answers, strict=True):
        found = of_candidate(of)["verdict"]
        scores[text] = {"verdict": found, **{name: bool(of) and all(each[name] for each in of) for name in MEASURES}}
    return verdict, scores


def pass_at(tries: int, right: int, k: int) -> float:
    """The chance that one of `k` tries is right, where `right` of `tries` were (arXiv 2107.03374, equation 1).

    >>> [round(pass_at(4, 1, k), 2) for k in (1, 2, 4)]
    [0.25, 0.5, 1.0]
    """
    return 1.0 - math.comb(tries - right, k) / math.comb(tries, k)


def _evaluation(
    db_ids: Sequence[str],
    answers: dict[str, list[list[str]]],
    scored: list[tuple[str, Scores]],
    notes: tuple[str, ...],
) -> Evaluation:
    usable = [row for row, (verdict, _) in enumerate(scored) if verdict in GOLD_USABLE]
    golds = dict(Counter(verdict for verdict, _ in scored))
    if not usable:
        raise UserError(f"None of {len(scored)} golds can tell what is right: {golds}; t2s-pref audit says why.")
    groups = {"": usable}
    if any(db_ids):
        for db_id in sorted(set(db_ids)):
            if of_one := [row for row in usable if db_ids[row] == db_id]:
                groups[db_id] = of_one
    k = len(answers["sampled"][0]) if "sampled" in answers else 0
    tries = sorted({1, k}) if k else []
    ways = {"greedy": ("greedy", 1), **{f"pass@{j}": ("sampled", j) for j in tries}}

    def share(rows: list[int], way: str, tries: int, measure: str) -> float:
        chances = []
        for row in rows:
            drawn = [scored[row][1][text][measure] for text in answers[way][row]]
            chances.append(pass_at(len(drawn), sum(drawn), tries))
        return sum(chances) / len(chances)

    accuracy = {
        name: {db_id: {measure: share(rows, *of, measure) for measure in MEASURES} for db_id, rows in groups.items()}
        for name, of in ways.items()
    }
    verdicts = {
        way: {
            db_id: dict(Counter(scored[row][1][text]["verdict"] for row in rows for text in of[row]))
            for db_id, rows in groups.items()
        }
        for way, of in answers.items()
    }
    return Evaluation(
        rows={db_id: len(rows) for db_id, rows in groups.items()},
        accuracy=accuracy,
        verdicts=verdicts,
        golds=golds,
        notes=notes,
    )

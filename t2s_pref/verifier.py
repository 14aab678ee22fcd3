"""Judging rows: which statements must be run on which databases, what their verdicts come to, and remembering them."""

import json
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from datasets.utils import tqdm

from t2s_pref import verdicts
from t2s_pref.databases import Databases
from t2s_pref.pool import Bounds, Candidate, Gold, Job, Task, WorkerPool, check_workers
from t2s_pref.probes import MOST_SELECTS, mixed_probes, probes
from t2s_pref.sql import extract_sql, normalize_sql, other_readings, shorter_readings, uncut_sql
from t2s_pref.store import SampleStore, record_key
from t2s_pref.trees import is_ordered, sql_tokens, volatile
from t2s_pref.weights import hash_parts

# Raise it when the same SQL on the same data gets another verdict: what older code found is then not served.
VERIFY_VERSION = 1

PIECE = 50  # candidates that are sent to a process together: what it found of more would be lost with it

# Verdicts are written down when so many are new, or so many seconds have passed since the last time.
WRITE_AFTER = 500
WRITE_SECONDS = 2.0


class Question(NamedTuple):
    """What is judged together: the candidates of all rows that share their golds and their database."""

    db_id: str | None
    dialect: str
    golds: tuple[str, ...]


class Found(NamedTuple):
    """A verdict with the reason or the engine's message, and a digest of the result where there is one."""

    verdict: str
    detail: str
    digest: str = ""


class Verifier:
    """Judges candidates by running them, once for each question, and remembers what it found.

    A context manager: its processes end with it.

    Args:
        databases: where the rows' databases are.
        bounds: what a statement may take.
        workers: how many processes; by default one a core, 16 at most.
        store: folder of the verdicts found before. `None`, or databases whose content is not known: nothing is kept.
    """

    def __init__(self, databases: Databases, bounds: Bounds, workers: int | None, store: Path | None) -> None:
        check_workers(workers)
        self.databases, self.bounds, self.workers = databases, bounds, workers
        self._known: dict[bytes, dict[str, Any]] = {}
        self._fresh: list[tuple[bytes, dict[str, Any]]] = []  # not written down yet
        self._written = time.monotonic()
        self._store: SampleStore | None = None
        if store is not None and databases.contents is not None:
            name = hash_parts([json.dumps(self._settings(), sort_keys=True).encode()])
            self._store = SampleStore(store / name)

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_: object) -> None:
        if self._store is not None:
            self._store.close()

    def _settings(self) -> dict[str, Any]:
        return {"version": VERIFY_VERSION, "engine": sqlite3.sqlite_version, "bounds": asdict(self.bounds)}

    def key(self) -> dict[str, Any] | None:
        """What decides the verdicts beside the rows, or `None` where the content of a database is not known."""
        if (contents := self.databases.contents) is None:
            return None
        return {**self._settings(), "databases": contents}

    def engines(self) -> str:
        """What runs the SQL, and what a server's user calls its content. No address, no user."""
        version = self.databases.version
        names = {"sqlite": f"SQLite {sqlite3.sqlite_version}"}
        engines = ", ".join(names.get(dialect, dialect) for dialect in self.databases.dialects or ["sqlite"])
        return f"{engines}{f', database_version {version}' if version else ''}"

    def judge(self, asked: Iterable[tuple[Question, Iterable[str]]], desc: str = "Verifying") -> bool:
        """Run whatever is not known yet about these candidates, and write it down as it comes.

        Returns whether all that is known is for good: `False` where another try may find more.
        """
        grouped: dict[Question, dict[str, None]] = {}
        for question, candidates in asked:
            grouped.setdefault(question, {}).update(dict.fromkeys(candidates))
        wanted = {}
        for question, candidates in grouped.items():
            gold = self._get(question)
            missing = [text for text in candidates if not by_text(text, question) and not self._get(question, text)]
            if gold is None or (missing and gold["verdict"] in verdicts.GOLD_USABLE):
                wanted[question] = missing
        if not wanted:
            return self._is_for_good()
        with WorkerPool(self.workers, self.bounds) as pool, tqdm(total=len(wanted), desc=desc, unit=" golds") as bar:
            try:
                for _ in pool.run(self._task(question, texts) for question, texts in wanted.items()):
                    bar.update()
            finally:
                self._keep()  # interrupted too: what was found is not lost
        return self._is_for_good()

    def _is_for_good(self) -> bool:
        return self._store is None or not self._known

    def refresh(self) -> None:
        """See what other processes have written down since."""
        if self._store is not None:
            self._store.refresh()

    def gold(self, question: Question) -> Found:
        """The verdict on the golds of a question that was judged; the worst where they differ."""
        record = self._get(question)
        return Found(record["verdict"], record["detail"])

    def candidate(self, question: Question, text: str) -> Found:
        """The verdict on a candidate of a question that was judged."""
        if self.gold(question).verdict not in verdicts.GOLD_USABLE:
            return Found(verdicts.UNVERIFIED, "its gold proves nothing")
        if verdict := by_text(text, question):
            return Found(verdict, "")
        record = self._get(question, text)
        return Found(record["verdict"], record["detail"], record["digest"])

    # What is known

    def _key(self, question: Question, text: str | None = None) -> bytes:
        contents = [each.content or each.address for each in self.databases[question.db_id]]
        return record_key(*contents, None, question.dialect, *question.golds, None, text)

    def _get(self, question: Question, text: str | None = None) -> dict[str, Any] | None:
        key = self._key(question, text)
        return self._known.get(key) or (self._store.get(key) if self._store is not None else None)

    def _note(self, records: list[tuple[bytes, dict[str, Any]]]) -> None:
        """Take records, and write them down where they are many or old."""
        self._fresh += records
        if len(self._fresh) >= WRITE_AFTER or time.monotonic() > self._written + WRITE_SECONDS:
            self._keep()

    def _keep(self) -> None:
        records, self._fresh, self._written = self._fresh, [], time.monotonic()
        if records:
            self.databases.check_unchanged()  # or what was found of other data would be kept under the name of these
        for key, record in records:
            if self._store is None or record["verdict"] == verdicts.UNVERIFIED:
                self._known[key] = record  # a gold that could not be repeated just now may well be another time
        if self._store is not None:
            self._store.append(each for each in records if each[0] not in self._known)

    # Finding out

    def _task(self, question: Question, texts: list[str]) -> Task[None]:
        """Find out about one question, a piece of its candidates after the other."""
        known = self._get(question)
        golds = yield from self._golds(question)
        for start in range(0, max(1, len(texts)), PIECE):
            records = yield from self._piece(question, golds, known, texts[start : start + PIECE])
            known = known or records[0][1]
            self._note(records)
            if known["verdict"] not in verdicts.GOLD_USABLE:
                return

    def _golds(self, question: Question) -> Task[tuple[Gold, ...]]:
        instances = self.databases[question.db_id]
        golds = []
        for text in question.golds:
            sql = statement_of(text)
            if instances and (uncut := uncut_sql(text)):  # what the engine takes as it stands was not to be cut
                outcome = yield Job(instances[0].address, (Gold(uncut, proven=True),), server=instances[0].server)
                sql = uncut if outcome.golds[0]["verdict"] in verdicts.GOLD_USABLE else sql
            golds.append(as_gold(sql, self.databases.dialect(question.db_id)))
        return tuple(golds)

    def _piece(
        self, question: Question, golds: tuple[Gold, ...], known: dict[str, Any] | None, texts: list[str]
    ) -> Task[list[tuple[bytes, dict[str, Any]]]]:
        """Jobs for some candidates, instance by instance; returns the records of what was found, the gold's first."""
        instances = self.databases[question.db_id]
        dialect = self.databases.dialect(question.db_id)  # what runs; the row's own is how its text is read
        verdicts_of_gold: list[tuple[str, str]] = []
        of_texts: dict[str, list[dict[str, Any]]] = {text: [] for text in texts}
        for place, instance in enumerate(instances):
            before = known["instances"][place] if known else None
            if before is not None and before not in verdicts.GOLD_USABLE:
                verdicts_of_gold.append((before, known["detail"]))
                continue
            open_texts = [text for text, found in of_texts.items() if not _is_wrong(found)]
            if known and not open_texts:
                verdicts_of_gold.append((before, known["detail"]))
                continue
            ready = tuple(gold._replace(proven=before is not None) for gold in golds)
            candidates = tuple(as_candidate(statement_of(text), dialect) for text in open_texts)
            outcome = yield Job(instance.address, ready, candidates, server=instance.server)
            worst = of_golds(outcome.golds)
            verdicts_of_gold.append(worst)
            if worst[0] in verdicts.GOLD_USABLE:
                proven = tuple(gold._replace(proven=True) for gold in golds)
                again = Job(instance.address, proven, server=instance.server)
                yield from _reread(open_texts, outcome.candidates, again, dialect)
                for text, answer in zip(open_texts, outcome.candidates, strict=True):
                    if answer["verdict"] == verdicts.MISSING_FUNCTION:  # another version may have it
                        answer["detail"] += f" ({outcome.version})"
                    of_texts[text].append(answer)
        verdict, detail = of_instances(verdicts_of_gold)
        gold = {"verdict": verdict, "detail": detail, "instances": [each[0] for each in verdicts_of_gold]}
        records = [] if known else [(self._key(question), gold)]
        if known or verdict in verdicts.GOLD_USABLE:  # a gold that fails the second time leaves them unverified
            records += [(self._key(question, text), of_candidate(found)) for text, found in of_texts.items()]
        return records


def _reread(texts: list[str], answers: list[dict[str, Any]], job: Job, dialect: str) -> Task[None]:
    """Leave in doubt what is wrong only as its SQL was taken out of its text: every other reading must be wrong too."""
    others: list[tuple[int, str]] = []
    for place, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        if answer["verdict"] in verdicts.WRONG:
            found = other_readings(text)
            if answer["verdict"] != verdicts.WRONG_RESULT:
                found += [short for each in (statement_of(text), *found) for short in shorter_readings(each)]
            others += [(place, each) for each in dict.fromkeys(found)]
    if not others:
        return
    outcome = yield job._replace(candidates=tuple(as_candidate(each, dialect) for _, each in others))
    for (place, _), answer in zip(others, outcome.candidates, strict=False):
        if answer["verdict"] in (verdicts.EQUIVALENT, verdicts.WEAK, verdicts.AMBIGUOUS):
            answers[place] |= {"verdict": verdicts.AMBIGUOUS, "detail": "another reading of its text may be right"}


def by_text(text: str, question: Question) -> str:
    """The verdict that a candidate's text alone is enough for, or the empty string."""
    if not text.strip("; \t\r\n"):
        return verdicts.EMPTY
    if not extract_sql(text).strip():
        return verdicts.NOT_SQL
    sql = statement_of(text)
    golds = [statement_of(gold) for gold in question.golds]
    if sql in golds:
        return verdicts.SAME_TEXT
    same = normalize_sql(sql, question.dialect)
    return verdicts.SAME_AST if any(same == normalize_sql(gold, question.dialect) for gold in golds) else ""


def statement_of(text: str) -> str:
    """The SQL of a text that may have more around it; the text itself where none can be told apart."""
    return (extract_sql(text).strip() or text.strip()).rstrip("; \t\r\n")


def as_gold(sql: str, dialect: str) -> Gold:
    """An accepted gold with all that its proof needs."""
    return Gold(sql, is_ordered(sql, dialect), *_doubts(sql, dialect))


def as_candidate(sql: str, dialect: str) -> Candidate:
    """A candidate with all that its verdict needs."""
    return Candidate(sql, *_doubts(sql, dialect))


def _doubts(sql: str, dialect: str) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """How to find out whether the data determine what a statement returns, and why they may not."""
    if sql.lower().count("select") > MOST_SELECTS or not sql_tokens(sql, dialect):
        return (), (), "it cannot be taken apart, so nothing tells whether the data determine its result"
    changing = volatile(sql, dialect)
    why = f"{changing} changes with time or chance" if changing else ""
    return probes(sql, dialect), mixed_probes(sql, dialect), why


def _is_wrong(found: list[dict[str, Any]]) -> bool:
    return bool(found) and found[-1]["verdict"] in verdicts.WRONG


def of_golds(golds: list[dict[str, Any]]) -> tuple[str, str]:
    """Of several accepted golds on one instance: what fails, if anything; else empty only where all are."""
    failed = [gold for gold in golds if gold["verdict"] not in verdicts.GOLD_USABLE]
    rows = [gold for gold in golds if gold["verdict"] == verdicts.GOLD_OK]
    chosen = (failed or rows or golds)[0]
    place = golds.index(chosen) if failed else 0
    return chosen["verdict"], f"alternative {place}: {chosen['detail']}" if place else chosen["detail"]


def of_instances(found: list[tuple[str, str]]) -> tuple[str, str]:
    """Of one gold on several instances: an instance where it proves nothing is left out, and counts where all are."""
    if not found:
        return verdicts.NO_DATABASE, "no database of this name"
    for wanted in (verdicts.GOLD_OK, verdicts.GOLD_EMPTY):
        for verdict, detail in found:
            if verdict == wanted:
                return verdict, detail
    return found[0]


def of_candidate(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one candidate on several instances: wrong needs one that differs, equivalent needs all."""
    if not found:
        return {"verdict": verdicts.UNVERIFIED, "detail": "its gold could not be run again", "digest": ""}
    ranked = sorted(found, key=lambda answer: _RANK[answer["verdict"]])  # stable: of equals the first instance's
    return {"verdict": ranked[0]["verdict"], "detail": ranked[0]["detail"], "digest": found[0]["digest"]}


_RANK = {
    **dict.fromkeys(verdicts.WRONG, 0),
    **dict.fromkeys(verdicts.UNKNOWN, 1),
    verdicts.AMBIGUOUS: 2,
    verdicts.EQUIVALENT: 3,
    verdicts.WEAK: 4,
}

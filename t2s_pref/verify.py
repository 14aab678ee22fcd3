"""`verify_rejected`: which rejects are proven wrong, by running them and their gold."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from datasets import Dataset, DatasetDict, Features, List, Value

from t2s_pref import lineage
from t2s_pref.cache import cache_folder, cached_map, check_map_kwargs
from t2s_pref.columns import (
    ALTERNATIVES,
    CHOSEN,
    DB_ID,
    DIALECT,
    DISTANCE,
    GOLD_DETAIL,
    GOLD_VERDICT,
    OUTPUT,
    REJECTED,
    RESULT_DIGEST,
    STRINGS,
    VERDICT,
    VERDICT_DETAIL,
    check_columns,
    check_dialects,
    check_string_lists,
    check_strings,
    each_split,
)
from t2s_pref.databases import Databases, DatabasesLike
from t2s_pref.errors import UserError
from t2s_pref.pool import Bounds
from t2s_pref.settings import GOLD_TIMEOUT, TIMEOUT
from t2s_pref.trees import distance
from t2s_pref.verifier import Question, Verifier, statement_of

PAGE = 1000  # rows read at a time


def verify_rejected(
    dataset: Dataset | DatasetDict,
    databases: DatabasesLike,
    *,
    timeout: float = TIMEOUT,
    gold_timeout: float = GOLD_TIMEOUT,
    database_version: str | None = None,
    workers: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **map_kwargs: Any,
) -> Dataset | DatasetDict:
    """Prove by execution which rejects are wrong: run each row's gold and every reject, and compare the results.

    Nothing is taken for wrong that may be right. A gold that fails, times out, is too large or is not determined by the
    data condemns no reject of its row; a result that matches the gold's under a lenient reading (as a set, in another
    order, with more columns, rounded, ...) is `ambiguous`. Statements run in processes that are killed where they take
    too long; they can neither write nor see anything but their database.

    Cached twice, like `generate_rejected`: the result as an Arrow file, and below it every verdict, so that a run that
    was killed goes on where it was.

    Args:
        dataset: columns read: `output` (`str`, the gold) and `rejected` (`list[str]`), or pairs with `chosen` (`str`,
            taken for the gold) and `rejected` (`str`); and where present `alternatives` (`list[str]`, further accepted
            golds; one that fails leaves its row unverified), `db_id` (`str`) and `dialect` (`str`, a sqlglot name).
            Around the SQL there may be prose or a fence: a reject is wrong only if every reading of its text is.
        databases: a folder in the layout of Spider and BIRD (`<db_id>/<db_id>.sqlite`; several files in a database's
            folder are several instances to test on), one SQLite file for all rows, a mapping from `db_id` to files or
            URLs, or a SQLAlchemy URL of PostgreSQL, MySQL or MariaDB, with `{db_id}` in it where each has its own.
        timeout: seconds that a reject may take; ten times its gold's where that is more.
        gold_timeout: seconds that a gold may take, with the proof that the data determine its result.
        database_version: what you call the content of a server; without it, nothing that was found there is cached.
        workers: how many processes; by default one a core, 16 at most.
        cache_dir: folder of verdicts and results, by default `t2s_pref` under `HF_HOME`.
        **map_kwargs: `desc`, `writer_batch_size` and `load_from_cache_file` of `Dataset.map`.

    Returns:
        The dataset with these columns added, one element a reject (plain values for pairs):

        - `verdict` (`list[str]`): those in `t2s_pref.WRONG` are proven wrong; `t2s_pref.verdicts` has all;
        - `verdict_detail` (`list[str]`): why it is `ambiguous`, or the engine's message;
        - `result_digest` (`list[str]`): equal for equal results, `""` where there is none;
        - `distance` (`list[float64]`): from the nearest accepted gold, by syntax tree, 0 (the same) to 1;

        and for the row `gold_verdict` (`str`): `ok`, `gold_empty` (no rows; rejects are judged all the same), or why
        its rejects are `unverified`: `gold_error`, `gold_timeout`, `gold_truncated`, `gold_nondeterministic`,
        `no_database`; with `gold_detail` (`str`).

    Raises:
        [`UserError`]: on missing columns, where no database is found at all, where a driver is missing.

    >>> from t2s_pref import demo_files
    >>> golds = ["SELECT count(*) FROM book"] * 2
    >>> rejects = [["SELECT count(book_id) FROM book", "SELECT count(*) FROM books"], ["SELECT sum(pages) FROM book"]]
    >>> rows = Dataset.from_dict({"db_id": ["library"] * 2, "output": golds, "rejected": rejects})
    >>> verify_rejected(rows, demo_files().databases)["verdict"][:]
    [['equivalent', 'missing_table'], ['wrong_result']]
    """
    bounds = Bounds(timeout, gold_timeout)
    check_map_kwargs(map_kwargs)

    def verify(part: Dataset) -> Dataset:
        check_rows(part)
        with open_verifier(part, databases, bounds, database_version, workers, cache_dir) as verifier:
            return verify_with(verifier, part, cache_dir, map_kwargs)

    return each_split(dataset, verify)


@contextmanager
def open_verifier(
    dataset: Dataset,
    databases: DatabasesLike,
    bounds: Bounds,
    database_version: str | None,
    workers: int | None,
    cache_dir: str | os.PathLike[str] | None,
) -> Iterator[Verifier]:
    """A verifier on the databases that the rows of `dataset` name."""
    home = cache_folder(cache_dir)
    check_string_lists(dataset, ALTERNATIVES)
    check_dialects(dataset)
    if dataset.features.get(DB_ID, Value("null")) not in (Value("null"), *STRINGS):
        raise UserError(
            f"Column {DB_ID!r} is {dataset.features[DB_ID]}; expected strings, the names of databases: "
            f"dataset.cast_column({DB_ID!r}, Value('string'))."
        )
    db_ids = dataset.unique(DB_ID) if DB_ID in dataset.column_names else [None]
    with (
        Databases(databases, db_ids, version=database_version, memo=home / "databases.json") as found,
        Verifier(found, bounds, workers, home / "verdicts") as verifier,
    ):
        yield verifier


def check_rows(dataset: Dataset) -> None:
    """Raise [`UserError`] where the columns are not such as can be verified."""
    gold = gold_column(dataset)
    way_out = "generate_rejected adds 'rejected', load_sft makes the others; pairs have 'chosen' and 'rejected'."
    check_columns(dataset, (gold, REJECTED), way_out)
    check_strings(dataset, gold)
    if dataset.features[REJECTED] not in STRINGS:
        check_string_lists(dataset, REJECTED)


def gold_column(dataset: Dataset) -> str:
    """Where the golds are: `chosen` in pairs, `output` before."""
    pairs = dataset.features.get(REJECTED) in STRINGS and CHOSEN in dataset.column_names
    return CHOSEN if pairs else OUTPUT


def question(row: dict[str, Any], gold: str, databases: Databases) -> Question:
    """What a row asks of its database."""
    golds = dict.fromkeys([row[gold] or "", *(text for text in row.get(ALTERNATIVES) or () if text)])
    return Question(row.get(DB_ID), row.get(DIALECT) or databases.dialect(row.get(DB_ID)), tuple(golds))


def verify_with(
    verifier: Verifier, dataset: Dataset, cache_dir: str | os.PathLike[str] | None, map_kwargs: dict[str, Any]
) -> Dataset:
    """Add the columns of verification, with a verifier that is open."""
    gold = gold_column(dataset)
    pairs = dataset.features[REJECTED] in STRINGS
    names = [gold, REJECTED, *(name for name in (ALTERNATIVES, DB_ID, DIALECT) if name in dataset.column_names)]

    def asked(rows: dict[str, list]) -> list[tuple[Question, list[str]]]:
        lists = [[reject] if pairs else reject for reject in rows[REJECTED]]
        each = (dict(zip(names, values, strict=True)) for values in zip(*(rows[name] for name in names), strict=True))
        return [
            (question(row, gold, verifier.databases), [text or "" for text in rejects or ()])
            for row, rejects in zip(each, lists, strict=True)
        ]

    def add(rows: dict[str, list]) -> dict[str, list]:
        columns: dict[str, list] = {name: [] for name in added}
        for of, texts in asked(rows):
            found = [verifier.candidate(of, text) for text in texts]
            accepted = [statement_of(each) for each in of.golds]
            written = [statement_of(text) for text in texts]
            values = {
                VERDICT: [each.verdict for each in found],
                VERDICT_DETAIL: [each.detail for each in found],
                RESULT_DIGEST: [each.digest for each in found],
                DISTANCE: [min(distance(each, sql, of.dialect) for each in accepted) for sql in written],
            }
            for name, value in values.items():
                columns[name].append(value[0] if pairs else value)
            of_gold = verifier.gold(of)
            columns[GOLD_VERDICT].append(of_gold.verdict)
            columns[GOLD_DETAIL].append(of_gold.detail)
        return columns

    text = Value("string")
    added = {name: text if pairs else List(text) for name in (VERDICT, VERDICT_DETAIL, RESULT_DIGEST)}
    added |= {DISTANCE: Value("float64") if pairs else List(Value("float64")), GOLD_VERDICT: text, GOLD_DETAIL: text}
    columns = dataset.select_columns(names)
    result = cached_map(
        dataset,
        add,
        step="verified",
        key=verifier.key(),
        features=Features({**dataset.features, **added}),
        cache_dir=cache_dir,
        map_kwargs={"desc": "Writing verdicts", **map_kwargs},
        prepare=lambda: verifier.judge(pair for page in columns.iter(PAGE) for pair in asked(page)),
    )
    bounds = {"timeout": verifier.bounds.timeout, "gold_timeout": verifier.bounds.gold_timeout}
    engines = verifier.engines()
    lineage.forget(result, lineage.PROVEN)
    lineage.note(result, f"{lineage.PROVEN}: {engines}", step=lineage.PROVEN, engines=engines, **bounds)
    return result

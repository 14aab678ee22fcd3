"""The column names of every stage and the checks on them: one truth for the whole package."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, Value

from t2s_pref.errors import UserError
from t2s_pref.sql import check_dialect

# What a row of supervised data carries. `output` is the gold SQL.
INSTRUCTION = "instruction"
INPUT = "input"
OUTPUT = "output"
SYSTEM = "system"
HISTORY = "history"
DB_ID = "db_id"
DIALECT = "dialect"
ALTERNATIVES = "alternatives"  # further accepted golds
SOURCE_INDEX = "source_index"

# What sampling adds. Each list has one element a candidate, but for `rejected` and `answers`: the usable ones only.
REJECTED = "rejected"
ANSWERS = "answers"  # with their reasoning, where the answer format has one
STATUS = "candidate_status"
TOKENS = "generated_tokens"
SECONDS = "generation_seconds"
RAW = "raw_answers"
ROUND = "round"
ADAPTER = "adapter"
POLICY_HASH = "policy_hash"

# What a teacher adds: chains of thought that are kept, and what became of each sample.
COT = "cot"
COT_STATUS = "cot_status"

# What verification adds: a list has one element for each of `rejected`.
VERDICT = "verdict"
VERDICT_DETAIL = "verdict_detail"
RESULT_DIGEST = "result_digest"
DISTANCE = "distance"
GOLD_VERDICT = "gold_verdict"
GOLD_DETAIL = "gold_detail"

# What a preference pair carries beside its source row.
CHOSEN = "chosen"
REJECTED_INDEX = "rejected_index"
RAW_ANSWER = "raw_answer"
CHOSEN_FROM = "chosen_from"

# What only a pair has.
PAIR = (CHOSEN, REJECTED, REJECTED_INDEX, RAW_ANSWER, CHOSEN_FROM)

# All that is noted of candidates: gone where others are sampled in their place.
NOTED = (
    *(REJECTED, ANSWERS, STATUS, TOKENS, SECONDS, RAW),
    *(VERDICT, VERDICT_DETAIL, RESULT_DIGEST, DISTANCE, GOLD_VERDICT, GOLD_DETAIL),
)

ROUNDS = (ROUND, ADAPTER, POLICY_HASH)

STRINGS = (Value("string"), Value("large_string"))

REQUIRED = (INSTRUCTION, INPUT, OUTPUT)

# How sampling a candidate ended: the values of `candidate_status`.
SAMPLED = "sampled"
TRUNCATED = "truncated"
NO_SQL = "no_sql"
OFF_FORMAT = "off_format"
FAILED = "failed"
PROMPT_TOO_LONG = "prompt_too_long"


def check_columns(dataset: Dataset, needed: tuple[str, ...], way_out: str) -> None:
    """Raise [`UserError`] where `dataset` lacks one of `needed`; `way_out` says which function adds them."""
    missing = [name for name in needed if name not in dataset.column_names]
    if missing:
        raise UserError(f"Column {missing[0]!r} not found; columns are {dataset.column_names}. {way_out}")


def check_strings(dataset: Dataset, gold: str) -> None:
    """Raise [`UserError`] where the column of golds is not one of strings."""
    if dataset.features[gold] not in STRINGS:
        raise UserError(f"Column {gold!r} is {dataset.features[gold]}; expected strings, the gold SQL.")


def check_string_lists(dataset: Dataset, name: str) -> None:
    """Raise [`UserError`] where a column, if it is there, is not one of lists of strings."""
    feature = dataset.features.get(name, Value("null"))
    # null is what lists that are all empty, or absent, are taken for
    if feature in STRINGS or getattr(feature, "feature", feature) not in (Value("null"), *STRINGS):
        raise UserError(f"Column {name!r} is {feature}; expected a list of strings.")


def check_dialects(dataset: Dataset) -> None:
    """Raise [`UserError`] where a row names a dialect that sqlglot does not know."""
    if DIALECT in dataset.column_names:
        for named in set(dataset.unique(DIALECT)) - {None, ""}:
            check_dialect(named)


def one_split(dataset: Any) -> Dataset:
    """A `Dataset` as it is; whatever else is refused, with the way out."""
    if isinstance(dataset, DatasetDict):
        raise UserError(f"Expected one split, got the splits {list(dataset)}; choose one, dataset[name].")
    return each_split(dataset, lambda whole: whole)


def each_split(dataset: Any, function: Callable[[Dataset], Dataset]) -> Any:
    """Apply `function` to a `Dataset` or to each split of a `DatasetDict`; refuse what cannot be planned as a whole.

    A format such as `torch` is taken off first: it says how a user wants to see rows, and hides columns.
    """
    if isinstance(dataset, DatasetDict):
        return DatasetDict({split: each_split(part, function) for split, part in dataset.items()})
    if isinstance(dataset, Dataset):
        plain = dataset.format["type"] is None and dataset.format["columns"] == dataset.column_names
        return function(dataset if plain else dataset.with_format(None))
    if isinstance(dataset, IterableDataset | IterableDatasetDict):
        raise UserError(
            f"{type(dataset).__name__} cannot be planned, cached or resumed; materialise it first: "
            "Dataset.from_generator(lambda: (yield from dataset))"
        )
    raise UserError(f"Expected a Dataset or a DatasetDict, got {type(dataset).__name__}; load_sft makes one.")

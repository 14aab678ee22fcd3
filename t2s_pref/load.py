"""Supervised text-to-SQL data, from wherever it lies, as one canonical `Dataset`: `load_sft`.

JSON files are parsed here and not by `load_dataset("json")`, which guesses: date-like strings become timestamps, large
ids floats, mixed columns JSON text, and a broken file an error without a line. Here nothing is guessed and nothing is
mended but what `load_sft` documents; whatever else is wrong is named with its file, record, line and column.
"""

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    DatasetInfo,
    Features,
    List,
    NamedSplit,
    Value,
    load_dataset,
)
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import hf_hub_download

from t2s_pref import lineage
from t2s_pref.columns import (
    ALTERNATIVES,
    CHOSEN,
    CHOSEN_FROM,
    DB_ID,
    DIALECT,
    HISTORY,
    INPUT,
    INSTRUCTION,
    NOTED,
    OUTPUT,
    PAIR,
    REJECTED,
    REQUIRED,
    ROUNDS,
    SOURCE_INDEX,
    STRINGS,
    SYSTEM,
    each_split,
)
from t2s_pref.errors import UserError
from t2s_pref.files import looks_local
from t2s_pref.formats import FORMATS, format_of
from t2s_pref.prompts import PROMPT_COLUMNS, messages
from t2s_pref.records import KINDS, Origin, lone_surrogate, read_records
from t2s_pref.registry import noted_of

logger = logging.getLogger(__name__)

TEXT = (*REQUIRED, SYSTEM, DB_ID, DIALECT)
KNOWN = (*REQUIRED, SYSTEM, HISTORY, DB_ID, DIALECT, ALTERNATIVES, SOURCE_INDEX)
EXPECTED = "expected objects with the text columns instruction, input and output (the gold SQL)"
MAX_KEYS = 1000  # more distinct keys than this are data used as names, and would make a column of each
HASHED_ROWS = 1000  # a fixed number, so that the fingerprint does not depend on how Arrow chunks the table

ALPACA = "alpaca"  # the configuration of a pushed dataset that has these columns; `default` is TRL's

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def load_sft(
    source: str | os.PathLike[str] | Dataset | DatasetDict, *, split: str | None = None, revision: str | None = None
) -> Dataset | DatasetDict:
    r"""Load alpaca rows for text-to-SQL as a `Dataset` with explicit types, checked record by record.

    Args:
        source (`str`, `os.PathLike`, `Dataset` or `DatasetDict`):
            A JSON file holding an array of objects; a file of JSON lines (`.jsonl`, `.ndjson`, or a `.json` whose
            first line is one whole object and not the last); a dataset on the Hub (`user/name`); or a dataset in
            memory. What is neither a file nor looks like one (a suffix `.json`/`.jsonl`/`.ndjson`, a leading `/`, `.`
            or `~`, more than one slash) is taken for a Hub id. The rows are held in memory.
        split (`str`, *optional*):
            Split of a Hub dataset, in the syntax of `load_dataset`. Without it every split is loaded.
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub dataset.

    Columns read: `instruction`, `input`, `output` (required in every record; string or null, and null is `""`; `output`
    is the gold SQL), `system`, `db_id`, `dialect` (string or null), `history` (list of [user, assistant] string pairs,
    or null). Every other column is kept if its values are of one type, null allowed anywhere: string, int64, float64,
    bool, lists and objects of these. Integers among floats become floats if none loses a digit. A column absent from
    the source is absent from the result.

    Column added: `source_index` (int64), the record's position in the source from 0, counted before any row is
    skipped. A source that has it already, without nulls, keeps it.

    Rows with an empty gold (null or blank `output`) are skipped, logged as a warning and counted in
    `dataset.info.description`. The fingerprint is made from the content alone: the same rows have the same one whatever
    their path, date or process, so that what is cached for them is found again.

    Returns:
        `Dataset`, or `DatasetDict` for a `DatasetDict` and for a Hub dataset without `split`.

    Raises:
        [`UserError`]: the source does not exist, is not JSON in UTF-8, or a record is not as described above. The
            message names the file, the record (from 0) with its line, and the column.

    Example:

    ```py
    >>> from datasets import Dataset
    >>> from t2s_pref.load import load_sft
    >>> rows = [{"instruction": "How many singers?", "input": None, "output": "SELECT count(*) FROM singer"}]
    >>> dataset = load_sft(Dataset.from_list(rows))
    >>> dataset.column_names
    ['instruction', 'input', 'output', 'source_index']
    >>> dataset.info.description
    'load_sft: 1 rows read, 0 skipped for an empty gold'

    ```
    """
    path = find_source(source, split, revision)
    if path is None and isinstance(source, str):
        whole = from_hub(source, split, revision)
        return each_split(whole, lambda part: _from_dataset(_without_pairs(part), source))
    if path is None:
        return each_split(source, _from_dataset)
    rows = _from_file(path)
    lineage.add(rows, noted_of(path))
    return rows


# Finding the source


def find_source(source: Any, split: str | None, revision: str | None) -> Path | None:
    """Return the file that `source` names; `None` where it is a Hub id, which alone has splits, or a dataset."""
    path = _local_file(source) if isinstance(source, str | os.PathLike) else None
    if (path is not None or not isinstance(source, str)) and (split is not None or revision is not None):
        raise UserError("split= and revision= choose from a Hub dataset; pass dataset[split], or leave them out here.")
    return path


def _local_file(source: str | os.PathLike[str]) -> Path | None:
    """Return the file that `source` names, or None where it can only be a Hub id."""
    name = os.fspath(source)
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        raise UserError(f"{name!r} is a folder; give the JSON or JSON Lines file in it.")
    if path.exists():
        return path
    if looks_local(source) or not _HUB_ID.fullmatch(name):
        raise UserError(f"{name!r}: no such file (looked in {os.getcwd()}); a Hub dataset is written user/name.")
    return None


def from_hub(repo_id: str, split: str | None, revision: str | None) -> Dataset | DatasetDict:
    """A dataset of the Hub; of one that this package pushed, the configuration in alpaca's columns."""
    try:
        whole = load_dataset(repo_id, _config(repo_id, revision), split=split, revision=revision)
    except Exception as error:
        # Three libraries with no exception in common lie below, from the network's to a bare StopIteration for an empty
        # file. `DatasetGenerationError` itself says nothing: what went wrong is its cause.
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise UserError(f"{repo_id}: neither a file here nor loaded as a dataset from the Hub: {reason}") from error

    def noted(part: Dataset) -> Dataset:
        folders = {Path(file["filename"]).parent.name for file in part.cache_files}  # datasets names them by the commit
        commit = next((name for name in folders if _COMMIT.fullmatch(name)), revision)
        lineage.note(part, step=lineage.LOADED, source=repo_id, **({"revision": commit} if commit else {}))
        return part

    return each_split(whole, noted)


def _config(repo_id: str, revision: str | None) -> str | None:
    """`alpaca`, where `push_to_hub` made that configuration; `None`, the default one, where it did not."""
    with suppress(Exception):  # what is wrong with the repository shows when it is loaded
        card = Path(hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=revision))
        head = card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
        return ALPACA if f"\n- {lineage.KEY}\n" in head and f"config_name: {ALPACA}\n" in head else None
    return None


def _without_pairs(dataset: Dataset) -> Dataset:
    """The supervised rows under preference pairs, each once; any other dataset as it is.

    The gold is `output`, or where there is none `chosen`, without its reasoning and unless it is the model's own.
    """
    if not all(dataset.features.get(side) in STRINGS for side in (CHOSEN, REJECTED)):
        return dataset
    used = (*PROMPT_COLUMNS, DB_ID, OUTPUT, CHOSEN, CHOSEN_FROM)
    golds: dict[str, tuple[int, str]] = {}
    for place, row in enumerate(dataset.select_columns([name for name in used if name in dataset.column_names])):
        gold = row.get(OUTPUT) or ""
        if not gold and row.get(CHOSEN_FROM) != "own":
            parts = FORMATS[format_of(row[CHOSEN] or "")].read(row[CHOSEN] or "")
            gold = parts.sql if parts else row[CHOSEN]
        if gold:
            golds.setdefault(json.dumps([messages(row), row.get(DB_ID), row.get(OUTPUT)]), (place, gold))
    rows = dataset.select([place for place, _ in golds.values()])
    names = [name for name in rows.column_names if name in (*PAIR, *NOTED, *ROUNDS, OUTPUT)]
    return rows.remove_columns(names).add_column(OUTPUT, [gold for _, gold in golds.values()])


# From records to columns


def _from_file(path: Path) -> Dataset:
    records, origin = read_records(path, EXPECTED)
    for number, record in enumerate(records):
        for name in REQUIRED:
            if name not in record:
                raise origin.error(f"column {name!r} is missing; columns are {list(record)}; {EXPECTED}.", number)
    names = _keys("the records", records, origin)
    known = {name: [record.get(name) for record in records] for name in KNOWN if name in names}
    extra = {}
    for name in names:
        if name not in KNOWN:
            extra[name] = _array(name, [record.get(name) for record in records], None, origin)
    schema = pa.schema([(name, array.type) for name, array in extra.items()])
    return _build(known, extra, Features.from_arrow_schema(schema), origin)


# From values to Arrow


def _keys(what: str, objects: Iterable[dict[str, Any]], origin: Origin) -> list[str]:
    keys = list(dict.fromkeys(key for item in objects for key in item))
    if len(keys) > MAX_KEYS:
        raise origin.error(f"{what} have {len(keys)} different keys; data used as keys belongs in a JSON string.")
    for key in keys:
        if lone_surrogate(key):
            raise origin.error(f"key {key!a} holds half of a surrogate pair, which is not text.")
    return keys


def _array(name: str, values: list[Any], arrow_type: pa.DataType | None, origin: Origin) -> pa.Array:
    """Make the Arrow array of a column, of `arrow_type` or of the one type that its values have."""
    arrow_type = arrow_type or _arrow_type(name, values, range(len(values)), origin)
    try:
        return pa.array(values, arrow_type)
    except UnicodeEncodeError as error:
        # Arrow finds it, and names no row: the slow search is for the error only.
        for record, value in enumerate(values):
            if half := lone_surrogate(json.dumps(value, ensure_ascii=False)):
                problem = f"column {name!r} holds {half!a}, half of a surrogate pair, which is not text."
                raise origin.error(problem, record) from error
        raise


def _arrow_type(name: str, values: Sequence[Any], records: Sequence[int], origin: Origin) -> pa.DataType:
    """Return the one type of `values`, the k-th of which is from record `records[k]`; refuse a mixture."""
    kinds = set(map(type, values)) - {type(None)}
    if len(kinds) > 1 and kinds != {int, float}:
        raise _mixed(name, values, records, origin)
    _refuse(values, records, origin, lambda v: type(v) is int and not -(2**63) <= v < 2**63,
            f"column {name!r} is beyond a 64-bit integer; write such numbers as strings")  # fmt: skip
    _refuse(values, records, origin, lambda v: type(v) is float and not math.isfinite(v),
            f"column {name!r} is not a finite number; JSON has none such, write null")  # fmt: skip
    if kinds == {int, float}:
        if any(type(value) is int and int(float(value)) != value for value in values):
            raise _mixed(name, values, records, origin)
        return pa.float64()
    kind = kinds.pop() if kinds else type(None)
    if kind is list:
        parts = [(item, record) for value, record in zip(values, records, strict=True) for item in value or ()]
        return pa.list_(_arrow_type(f"{name}[]", [p[0] for p in parts], [p[1] for p in parts], origin))
    if kind is dict:
        present = [(value, record) for value, record in zip(values, records, strict=True) if value is not None]
        numbers = [record for _, record in present]
        return pa.struct([
            (key, _arrow_type(f"{name}.{key}", [value.get(key) for value, _ in present], numbers, origin))
            for key in _keys(f"the objects in column {name!r}", (value for value, _ in present), origin)
        ])  # fmt: skip
    return {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}.get(kind, pa.null())


def _refuse(
    values: Sequence[Any], records: Sequence[int], origin: Origin, bad: Callable[[Any], bool], problem: str
) -> None:
    for value, record in zip(values, records, strict=True):
        if bad(value):
            raise origin.error(f"{problem} (found {str(value)[:30]}).", record)


def _mixed(name: str, values: Sequence[Any], records: Sequence[int], origin: Origin) -> UserError:
    first: dict[type, int] = {}
    for value, record in zip(values, records, strict=True):
        if value is not None:
            first.setdefault(type(value), record)
    (kind, record), (other_kind, other_record), *_ = first.items()
    kinds = f"{KINDS[kind]} in {origin.at(record)}, {KINDS[other_kind]} in {origin.at(other_record)}"
    reason = "an integer too long for a float" if {kind, other_kind} == {int, float} else "one column has one type"
    return origin.error(f"column {name!r} mixes types: {kinds}; {reason}.")


# From columns to the dataset


def _from_dataset(dataset: Dataset, name: str = "dataset") -> Dataset:
    rows = _checked(dataset, name)
    lineage.add(rows, lineage.noted_lines(dataset))
    return rows


def _checked(dataset: Dataset, name: str) -> Dataset:
    origin = Origin(f"{name} (split {dataset.split})" if dataset.split else name, EXPECTED)
    features = dataset.features
    for column in REQUIRED:
        if column not in features:
            raise origin.error(f"column {column!r} is missing; columns are {dataset.column_names}; {EXPECTED}.")
    if not len(dataset):
        raise origin.error(f"holds no records; {EXPECTED}.")
    table = dataset.with_format("arrow")[:]
    known = {}
    for column in KNOWN:
        if column in features:
            # `Json` holds mixed types as JSON text, in which every string has quotes that are not its own.
            if isinstance(table.schema.field(column).type, pa.BaseExtensionType):
                raise origin.error(f"column {column!r} is {features[column]}, of mixed types; expected one type.")
            known[column] = table.column(column).to_pylist()
    extra = {column: table.column(column) for column in features if column not in KNOWN}
    return _build(known, extra, Features({column: features[column] for column in extra}), origin, dataset.split)


def _build(
    known: dict[str, list[Any]],
    extra: dict[str, pa.Array | pa.ChunkedArray],
    extra_features: Features,
    origin: Origin,
    split: NamedSplit | None = None,
) -> Dataset:
    rows = len(known[OUTPUT])
    for name in TEXT:
        if name in known:
            _check_values(name, known[name], str, "a string", origin)
    if HISTORY in known:
        check_history(known[HISTORY], origin.error)
    for record, golds in enumerate(known.get(ALTERNATIVES, ())):
        if golds is not None and not (isinstance(golds, list) and all(isinstance(gold, str) for gold in golds)):
            found = f"column {ALTERNATIVES!r} has {str(golds)[:40]!r}; expected a list of strings (golds) or null."
            raise origin.error(found, record)
    known.setdefault(SOURCE_INDEX, list(range(rows)))
    _check_source_index(known[SOURCE_INDEX], origin)
    for name in (INSTRUCTION, INPUT):
        known[name] = [text or "" for text in known[name]]

    types = {HISTORY: List(List(Value("string"))), SOURCE_INDEX: Value("int64"), ALTERNATIVES: List(Value("string"))}
    names = [name for name in KNOWN if name in known and name != SOURCE_INDEX]
    features = Features({name: types.get(name, Value("string")) for name in names})
    features.update(extra_features)
    features[SOURCE_INDEX] = types[SOURCE_INDEX]  # last, where an added column is looked for
    arrays = {n: _array(n, known[n], features.arrow_schema.field(n).type, origin) for n in (*names, SOURCE_INDEX)}
    table = pa.table({name: extra[name] if name in extra else arrays[name] for name in features})

    empty = [record for record, gold in enumerate(known[OUTPUT]) if not gold or gold.isspace()]
    if len(empty) == rows:
        raise origin.error(f"every one of its {rows} rows has an empty output; the gold SQL belongs there.")
    if empty:
        skipped = set(empty)
        table = table.filter(pa.array([record not in skipped for record in range(rows)]))
        first = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
        logger.warning("%s: skipped %d of %d rows with an empty gold: records %s", origin.name, len(empty), rows, first)
    description = f"load_sft: {rows} rows read, {len(empty)} skipped for an empty gold"
    info = DatasetInfo(description=description, features=features)
    return Dataset(table, info=info, split=split, fingerprint=_fingerprint(table, features))


def _check_values(name: str, values: list[Any], kind: type, expected: str, origin: Origin) -> None:
    if set(map(type, values)) <= {kind, type(None)}:
        return
    record, value = next((r, v) for r, v in enumerate(values) if v is not None and type(v) is not kind)
    found = KINDS.get(type(value), f"a {type(value).__name__}")
    raise origin.error(f"column {name!r} is {found} ({str(value)[:30]!r}); expected {expected} or null.", record)


def _check_source_index(values: list[Any], origin: Origin) -> None:
    for record, value in enumerate(values):
        if type(value) is not int or not -(2**63) <= value < 2**63:
            problem = f"column {SOURCE_INDEX!r} is {str(value)[:30]!r}; load_sft keeps integers there"
            raise origin.error(f"{problem}, rename the column.", record)


def check_history(values: Sequence[Any], error: Callable[[str, int], UserError]) -> None:
    """Raise `error(problem, row number)` at the first value that is not null or a list of two-string lists."""
    for row, turns in enumerate(values):
        pairs = [] if turns is None else turns if isinstance(turns, list) else [turns]
        for pair in pairs:
            if not (isinstance(pair, list) and len(pair) == 2 and all(type(part) is str for part in pair)):
                expected = "expected a list of [user, assistant] string pairs, or null"
                raise error(f"column {HISTORY!r} has {str(pair)[:40]!r}; {expected}.", row)


def _fingerprint(table: pa.Table, features: Features) -> str:
    digest = hashlib.blake2b(json.dumps(features.to_dict()).encode(), digest_size=16)
    for start in range(0, table.num_rows, HASHED_ROWS):
        rows = table.slice(start, HASHED_ROWS).to_pylist()
        digest.update(json.dumps(rows, default=repr).encode())  # repr: what JSON lacks, such as a timestamp
    return digest.hexdigest()

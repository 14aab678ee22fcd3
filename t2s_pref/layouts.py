"""Rows as trainers want them: TRL's conversations (`to_trl`), LLaMA-Factory's alpaca and sharegpt records.

Prompts are the messages that candidates were sampled from (`t2s_pref.prompts`). What a trainer would learn wrongly or
drop in silence is refused: an answer that is null or blank, and a pair of two equal ones (TRL 1.16 and LLaMA-Factory
0.9.5 train on it).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset, DatasetDict, Features, List, Value

from t2s_pref import lineage
from t2s_pref.cache import without_rows
from t2s_pref.columns import (
    CHOSEN,
    HISTORY,
    INPUT,
    INSTRUCTION,
    OUTPUT,
    REJECTED,
    STRINGS,
    SYSTEM,
    check_columns,
    each_split,
)
from t2s_pref.errors import UserError
from t2s_pref.load import check_history
from t2s_pref.prompts import PROMPT_COLUMNS, messages

PROMPT, COMPLETION, TEMPLATE_KWARGS = "prompt", "completion", "chat_template_kwargs"
MESSAGE = {"role": Value("string"), "content": Value("string")}
BATCH_ROWS = 1000


def to_trl(dataset: Dataset | DatasetDict, **map_kwargs: Any) -> Dataset | DatasetDict:
    """The rows in TRL's conversational format, on which its `DPOTrainer` (pairs) or `SFTTrainer` trains as they are.

    Args:
        dataset: columns read: `instruction`, `input` (`str`), where present `system` (`str`) and `history` (list of
            [user, assistant] pairs), and `chosen` and `rejected` (`str`), or `output` where there are no pairs.
        **map_kwargs: of `Dataset.map`.

    Returns:
        The other columns, with `prompt`, `chosen` and `rejected` (lists of `role`/`content` messages: what was sampled
        from, and one answer each), or for supervised rows `prompt` and `completion`. Where it is noted how the answers
        were sampled, also `chat_template_kwargs` (`enable_thinking`), which TRL hands to the chat template: so it
        trains on the prompt that was sampled from.

    Raises:
        [`UserError`]: a column is missing or not of strings, an answer is null or blank, or `rejected` equals `chosen`.

    >>> pair = {"instruction": "How many singers?", "input": "", "chosen": "SELECT count(*) FROM singer"}
    >>> pairs = to_trl(Dataset.from_list([{**pair, "rejected": "SELECT count(*) FROM song"}]))
    >>> pairs[0]["prompt"]
    [{'role': 'user', 'content': 'How many singers?'}]
    >>> pairs[0]["rejected"]
    [{'role': 'assistant', 'content': 'SELECT count(*) FROM song'}]
    """

    parts = dataset.values() if isinstance(dataset, DatasetDict) else [dataset] if isinstance(dataset, Dataset) else []
    thinking = lineage.thinking_mode(each for part in parts for each in lineage.records(part))

    def convert(part: Dataset) -> Dataset:
        answers = answer_columns(part)
        read = {*PROMPT_COLUMNS, *answers}
        names = (PROMPT, *(answers if CHOSEN in answers else (COMPLETION,)))
        features = {name: feature for name, feature in part.features.items() if name not in (*read, *names)}
        features |= dict.fromkeys(names, List(MESSAGE))
        if thinking is not None:
            features[TEMPLATE_KWARGS] = {"enable_thinking": Value("bool")}
        if not len(part):
            return without_rows(part, Features(features))
        return part.map(
            _conversations,
            batched=True,
            with_indices=True,
            fn_kwargs={"answers": answers, "thinking": thinking},
            features=Features(features),
            remove_columns=[name for name in part.column_names if name not in features],
            **{"desc": "Writing conversations", **map_kwargs},
        )

    return each_split(dataset, convert)


def _conversations(
    rows: dict[str, list], places: list[int], answers: tuple[str, ...], thinking: bool | None
) -> dict[str, list]:
    added = {PROMPT: [], **({name: [] for name in answers} if CHOSEN in answers else {COMPLETION: []})}
    names = [name for name in (*PROMPT_COLUMNS, *answers) if name in rows]
    for place, values in zip(places, zip(*(rows[name] for name in names), strict=True), strict=True):
        row = dict(zip(names, values, strict=True))
        check_row(row, answers, place)
        added[PROMPT].append(messages(row))
        for name in answers:
            added[name if CHOSEN in answers else COMPLETION].append([assistant(row[name])])
    if thinking is not None:
        added[TEMPLATE_KWARGS] = [{"enable_thinking": thinking}] * len(places)
    return added


def assistant(answer: str) -> dict[str, str]:
    """An answer as a message."""
    return {"role": "assistant", "content": answer}


def sharegpt(record: Mapping[str, Any], answers: tuple[str, ...]) -> dict[str, Any]:
    """An alpaca record in LLaMA-Factory's sharegpt layout: messages, and each side of a pair as one message.

    >>> sharegpt({"instruction": "How many?", "input": "", "output": "SELECT 1", "db_id": "x"}, ("output",))["messages"]
    [{'role': 'user', 'content': 'How many?'}, {'role': 'assistant', 'content': 'SELECT 1'}]
    """
    rest = {name: value for name, value in record.items() if name not in (*PROMPT_COLUMNS, *answers)}
    if CHOSEN in answers:
        return {"messages": messages(record), **{name: assistant(record[name]) for name in answers}, **rest}
    return {"messages": [*messages(record), *(assistant(record[name]) for name in answers)], **rest}


def answer_columns(dataset: Dataset) -> tuple[str, ...]:
    """The columns that hold answers: `chosen` and `rejected`, or `output`.

    Raises:
        [`UserError`]: where they or the prompt's are missing or not of strings.
    """
    pairs = CHOSEN in dataset.column_names or REJECTED in dataset.column_names
    answers = (CHOSEN, REJECTED) if pairs else (OUTPUT,)
    explode = "call explode_rejected first: it makes one row a reject, with chosen and rejected as strings"
    other = f"{explode}; or remove_columns({REJECTED!r}) to take supervised rows."
    check_columns(dataset, (INSTRUCTION, INPUT, *answers), other if pairs else "load_sft reads them.")
    for name in (INSTRUCTION, INPUT, *answers, SYSTEM):
        feature = dataset.features.get(name, Value("string"))
        nullable = name not in answers and feature == Value("null")
        if feature not in STRINGS and not nullable:
            hint = f"; {explode}." if name in (CHOSEN, REJECTED) else "; cast_column it to Value('string')."
            raise UserError(f"Column {name!r} is {feature}, expected strings{hint}")
    return answers


def checked_rows(dataset: Dataset, answers: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows, one by one, with their answers checked."""
    place = 0
    names = dataset.column_names
    for batch in dataset.with_format(None).iter(BATCH_ROWS):
        for values in zip(*(batch[name] for name in names), strict=True):
            row = dict(zip(names, values, strict=True))
            check_row(row, answers, place)
            yield row
            place += 1


def check_row(row: Mapping[str, Any], answers: tuple[str, ...], place: int) -> None:
    """Refuse a row that a trainer would drop or learn wrongly."""
    for name in answers:
        answer = row[name]
        if answer is None or not answer.strip():
            raise UserError(
                f"Row {place}: column {name!r} is {'null' if answer is None else 'blank'}, and a trainer would drop "
                "the row or train on nothing. Filter such rows out first: "
                f"dataset.filter(lambda r: (r[{name!r}] or '').strip())"
            )
    if REJECTED in answers and row[REJECTED] == row[CHOSEN]:
        raise UserError(
            f"Row {place}: 'rejected' equals 'chosen', and a trainer would train on the pair silently. Filter such "
            "rows out first: dataset.filter(lambda r: r['rejected'] != r['chosen'])"
        )
    if HISTORY in row:
        check_history([row[HISTORY]], lambda problem, _: UserError(f"Row {place}: {problem}"))

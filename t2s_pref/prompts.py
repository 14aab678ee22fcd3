"""A row becomes chat messages: the same for sampling, export and training."""

from collections.abc import Mapping, Sequence
from typing import Any

from t2s_pref.columns import HISTORY, INPUT, INSTRUCTION, SYSTEM

REQUEST = "First write your reasoning step by step, then end with the query in a ```sql block."
PROMPT_COLUMNS = (INSTRUCTION, INPUT, SYSTEM, HISTORY)


def messages(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The chat of one alpaca row, as LLaMA-Factory builds it: the policy sees what it was and will be trained on.

    Args:
        row: `instruction` and `input` (`str`, either may be empty); optionally `system` (`str`) and `history`
            (`list` of `[user, assistant]` pairs).

    Returns:
        `role`/`content` messages: the system message where there is one, the turns of the history, then the user turn,
        the `"\\n".join` of the non-empty ones of instruction and input. Nothing is stripped.

    >>> messages({"instruction": "Write SQL.", "input": "How many books?"})
    [{'role': 'user', 'content': 'Write SQL.\\nHow many books?'}]
    """
    chat = [{"role": "system", "content": row[SYSTEM]}] if row.get(SYSTEM) else []
    for user, assistant in row.get(HISTORY) or ():
        chat += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    question = "\n".join(part for part in (row.get(INSTRUCTION), row.get(INPUT)) if part)
    return [*chat, {"role": "user", "content": question}]


def row_of(turns: Sequence[tuple[Any, Any]]) -> dict[str, Any] | None:
    """The alpaca row of a chat in (role, text) turns, as `messages` would make the chat of it.

    `None` where, after a system message or none, they do not end in a user's after pairs of user's and assistant's.

    >>> row_of([("system", "You write SQL."), ("user", "How many books?")])
    {'instruction': 'How many books?', 'input': '', 'system': 'You write SQL.', 'history': []}
    """
    system = turns[0][1] if turns and turns[0][0] == "system" else ""
    turns = turns[1:] if turns and turns[0][0] == "system" else turns
    expected = ["user", "assistant"] * len(turns)
    if len(turns) % 2 == 0 or [role for role, _ in turns] != expected[: len(turns)]:
        return None
    said = [text for _, text in turns]
    history = [list(pair) for pair in zip(said[:-1:2], said[1::2], strict=True)]
    return {INSTRUCTION: said[-1], INPUT: "", SYSTEM: system, HISTORY: history}


TEACHER = """\
Here is a question about a database.

{question}

This query answers it:
```sql
{gold}
```

Write down how one gets from the question to this query, as somebody who works it out alone: which tables and \
columns are needed and how they join, then which conditions, groups and order the words of the question ask for. \
Never say that a query was given. End with the query in a ```sql block."""


def teacher_row(row: Mapping[str, Any], gold: str) -> dict[str, Any]:
    """The row whose prompt shows a teacher the question and its gold SQL, and asks for the reasoning between them.

    System message and history stay: the schema may be there.
    """
    question = messages({**row, SYSTEM: None, HISTORY: None})[-1]["content"]
    return {**row, INSTRUCTION: "", INPUT: TEACHER.format(question=question, gold=gold)}


def asks(row: Mapping[str, Any]) -> bool:
    """Whether the prompt ends in a request for a format."""
    return (row.get(INPUT) or row.get(INSTRUCTION) or "").endswith(REQUEST)


def asked(row: Mapping[str, Any], request: str) -> dict[str, Any]:
    """The row whose prompt ends in `request` for a format, and in no other."""
    end = INPUT if row.get(INPUT) or not row.get(INSTRUCTION) else INSTRUCTION
    text = row.get(end) or ""
    if text.endswith(REQUEST):
        text = text.removesuffix(REQUEST).removesuffix("\n")
    return {**row, end: "\n".join(part for part in (text, request) if part)}

"""A row becomes chat messages: the same for sampling, export and training."""

from collections.abc import Mapping
from typing import Any

from t2s_pref.columns import HISTORY, INPUT, INSTRUCTION, SYSTEM

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

"""Splits by prompt: `split_by_prompt`. Pairs of one prompt in two splits would test what was trained on."""

import hashlib
import json
from collections.abc import Iterator

from datasets import Dataset, DatasetDict

from t2s_pref.columns import each_split
from t2s_pref.errors import UserError
from t2s_pref.prompts import PROMPT_COLUMNS, messages


def split_by_prompt(dataset: Dataset, test_size: float, seed: int = 0) -> DatasetDict:
    """Splits `train` and `test`, such that no prompt is in both, however many pairs it has.

    A prompt goes where its hash says, whatever the other rows are: a dataset that grows keeps its test prompts out of
    `train`. The share is met on average; a split that would have no prompt gets one all the same.

    Args:
        dataset: columns read: `instruction`, `input`, and where present `system` and `history`.
        test_size: the share of prompts in `test`, above 0 and below 1.
        seed: another one gives another split.

    >>> rows = [{"instruction": "", "input": question} for question in ("How many?", "How many?", "Who?", "Where?")]
    >>> split_by_prompt(Dataset.from_list(rows), test_size=0.4)["test"]["input"][:]
    ['How many?', 'How many?']
    """
    if not 0 < test_size < 1:
        raise UserError(f"test_size is {test_size}; it must be a share of the prompts, above 0 and below 1.")
    dataset = each_split(dataset, lambda whole: whole)
    prompts = list(prompts_of(dataset))
    places = {prompt: _place(prompt, seed) for prompt in prompts}
    if len(places) < 2:
        raise UserError(f"The dataset has {len(places)} prompts; there must be two or more to split them.")
    ordered = sorted(places, key=places.__getitem__)
    number = sum(place < test_size for place in places.values())
    test = set(ordered[: min(max(number, 1), len(ordered) - 1)])
    return DatasetDict(
        {
            "train": dataset.select([row for row, prompt in enumerate(prompts) if prompt not in test]),
            "test": dataset.select([row for row, prompt in enumerate(prompts) if prompt in test]),
        }
    )


def prompts_of(dataset: Dataset) -> Iterator[str]:
    """The prompt of each row, as one text."""
    names = [name for name in PROMPT_COLUMNS if name in dataset.column_names]
    for row in dataset.select_columns(names):
        yield json.dumps(messages(row))


def _place(prompt: str, seed: int) -> float:
    """Where a prompt stands between 0 and 1."""
    digest = hashlib.blake2b(f"{seed}|{prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64

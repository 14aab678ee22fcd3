"""`dataset_info.json`, where LLaMA-Factory looks up datasets by name: read, and written under a lock.

An entry of this package says how the data came about too (`t2s_pref.lineage`): LLaMA-Factory ignores keys that it does
not know.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from t2s_pref.columns import CHOSEN, HISTORY, INPUT, INSTRUCTION, OUTPUT, REJECTED, SYSTEM
from t2s_pref.errors import UserError
from t2s_pref.files import atomic_write
from t2s_pref.lineage import KEY, SAVED, lines_of

logger = logging.getLogger(__name__)

DATASET_INFO = "dataset_info.json"
MESSAGES = "messages"

# How a message of the sharegpt layout is written, in OpenAI's words.
TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}


def entry_of(columns: list[str], layout: str = "alpaca") -> dict[str, Any]:
    """What an entry says of data with these columns: one not listed counts as absent, one listed must be there.

    >>> entry_of(["messages", "chosen", "rejected"], "sharegpt")["columns"]
    {'messages': 'messages', 'chosen': 'chosen', 'rejected': 'rejected'}
    """
    pairs = REJECTED in columns
    kind: dict[str, Any] = {} if pairs and layout == "alpaca" else {"formatting": layout}
    answers = {"chosen": CHOSEN, "rejected": REJECTED} if pairs else {}
    kind |= {"ranking": True} if pairs else {}
    if layout == "sharegpt":
        return {**kind, "columns": {"messages": MESSAGES, **answers}, "tags": TAGS}
    roles = {"prompt": INSTRUCTION, "query": INPUT, **(answers or {"response": OUTPUT})}
    return {**kind, "columns": roles | {role: role for role in (SYSTEM, HISTORY) if role in columns}}


def read_info(path: Path) -> dict[str, Any]:
    """The entries of a `dataset_info.json`, none where there is no such file.

    Raises:
        [`UserError`]: where it cannot be read, or is no object of entries.
    """
    try:
        return parse_info(path.read_bytes(), str(path))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); left as it is; mend it or move it away.") from error


def parse_info(content: bytes, name: str) -> dict[str, Any]:
    """The entries in the content of a `dataset_info.json`, with the errors of `read_info`."""
    try:
        info = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: cannot be read as JSON ({error}); left as it is; mend it or move it away.") from error
    if not isinstance(info, dict):
        raise UserError(f"{name}: is a {type(info).__name__}, expected an object of entries by name; left as it is.")
    return info


def write_info(path: Path, info: dict[str, Any]) -> None:
    """Write the entries, in ASCII: LLaMA-Factory opens this file in the platform's own encoding."""
    with atomic_write(path) as file:
        file.write(info_text(info))


def info_text(info: dict[str, Any]) -> str:
    """The text of a `dataset_info.json`."""
    return json.dumps(info, indent=2, ensure_ascii=True) + "\n"


def register(data: Path, name: str, entry: dict[str, Any], noted: list[dict[str, Any]] | None = None) -> None:
    """Enter a data file into the `dataset_info.json` beside it, in the place of one of its name.

    `noted` is what the steps before noted.
    """
    # a link to the real file stays a link, and all that share that file share its lock
    path = (data.parent / DATASET_INFO).resolve()
    with _locked(path):
        info = read_info(path)  # again: another process may have added its entry meanwhile
        if name in info:
            logger.info("%s: replaced the entry %r", path, name)
        for other in info.values():  # what is noted under another name is of what the file held before
            if isinstance(other, dict) and other.get("file_name") == data.name:
                other.pop(KEY, None)
        saved = {"step": SAVED, "bytes": data.stat().st_size}
        info[name] = {"file_name": data.name, **entry, **({KEY: [*noted, saved]} if noted else {})}
        write_info(path, info)


def noted_of(data: str | os.PathLike[str]) -> list[str]:
    """What is noted of a data file in the `dataset_info.json` beside it, as lines of a description.

    It is told for people only, so an entry that is missing or broken says nothing and stops nobody; nor does one of a
    file that was written anew by something else.
    """
    data = Path(data)
    try:
        info = read_info(data.parent / DATASET_INFO)
    except UserError:
        return []
    entries = [entry for entry in info.values() if isinstance(entry, dict) and entry.get("file_name") == data.name]
    return [line for entry in entries for line in _lines(entry.get(KEY), data.stat().st_size)]


def _lines(noted: Any, size: int) -> list[str]:
    records = noted if isinstance(noted, list) else []
    saved = [each for each in records if isinstance(each, dict) and each.get("step") == SAVED]
    if any(each.get("bytes") != size for each in saved):
        return []
    return lines_of([each for each in records if each not in saved])


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold `path` against other processes, and leave no lock file; one that a killed process left blocks nobody."""
    lock = path.with_name(f".{path.name}.lock")
    with FileLock(lock):
        try:
            yield
        finally:
            # While it is held: whoever waits on this file sees that it has no name any more and starts over. Windows
            # cannot delete an open file; there filelock does it on release.
            if sys.platform != "win32":
                lock.unlink(missing_ok=True)

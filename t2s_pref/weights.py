"""Where the weights of a run come from, and what identifies them, without loading them."""

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import xxhash
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from t2s_pref.errors import UserError, one_line
from t2s_pref.files import atomic_write, looks_local

logger = logging.getLogger(__name__)

# Left behind by training beside the weights; large, and without effect on what the model writes.
NOT_WEIGHTS = ("optimizer", "scheduler", "rng_state", "scaler", "training_args", "trainer_state", "events.out")


@dataclass(frozen=True)
class Source:
    """Weights that were found: what to hand to `from_pretrained`, and what identifies their content.

    `name` is the folder or the Hub id, `revision` the commit of a Hub id (`None` for a folder), `identity` the commit
    or a hash of the folder's files.
    """

    name: str
    revision: str | None
    identity: str

    def public(self) -> dict[str, str]:
        """What may be told of it anywhere: a Hub id with its commit, or a folder's own name with a hash."""
        if self.revision is not None:
            return {"name": self.name, "revision": self.revision}
        return {"name": Path(self.name).resolve().name, "content": self.identity}


def find_model(name: str, revision: str | None, memo: Path | None) -> Source:
    """Find base weights in a folder or on the Hub.

    Raises:
        [`UserError`]: where there are none, the name is malformed, or the Hub cannot be reached.
    """
    if looks_local(name):
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            what = "has no config.json" if folder.is_dir() else "is no folder" if folder.exists() else "does not exist"
            raise UserError(f"Base model folder {name!r} {what}; give a model folder or a Hub id (owner/name).")
        return Source(str(folder), None, content_hash(folder, memo))
    try:
        return _find_on_hub(name, "config.json", revision)
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        raise UserError(
            f"Base model {name!r} was not found on the Hub as a model you may read ({type(error).__name__}); "
            "check the name, log in with `hf auth login` where it is private, or give a folder."
        ) from error


def find_adapter(name: str, memo: Path | None) -> Source | None:
    """Find a LoRA adapter in a folder or on the Hub; `None` where there is nothing of that name.

    Raises:
        [`UserError`]: where something is there that is no adapter, or the Hub cannot be reached.
    """
    if looks_local(name):
        folder = Path(name).expanduser()
        if not folder.exists():
            return None
        if not (folder / "adapter_config.json").is_file():
            raise UserError(f"Adapter {name!r} is there but has no adapter_config.json; give the folder of a LoRA.")
        return Source(str(folder), None, content_hash(folder, memo))
    try:
        return _find_on_hub(name, "adapter_config.json", None)
    except RepositoryNotFoundError:
        return None
    except EntryNotFoundError as error:
        raise UserError(f"{name!r} on the Hub has no adapter_config.json; it is not a LoRA adapter.") from error


def _find_on_hub(name: str, file: str, revision: str | None) -> Source:
    # One small file tells the commit; offline, the Hub client answers from its cache.
    try:
        path = Path(hf_hub_download(name, file, revision=revision))
    except HFValidationError as error:
        raise UserError(f"{name!r} is neither an existing folder nor a Hub id of the form owner/name.") from error
    except GatedRepoError as error:
        raise UserError(f"{name!r} is gated; accept its terms on the Hub and log in with `hf auth login`.") from error
    except RevisionNotFoundError as error:
        raise UserError(f"Revision {revision!r} of {name!r} was not found on the Hub.") from error
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        if not isinstance(error, LocalEntryNotFoundError):
            raise
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub could not be reached"
        raise UserError(
            f"{name!r} is neither a folder here nor in the Hub cache, and {why}; check the name and the connection."
        ) from error
    except Exception as error:  # answers of 5xx, and what the HTTP client has for a connection that breaks off
        raise UserError(f"The Hub could not be reached for {name!r}: {one_line(error)}; try again.") from error
    commit = path.parent.name
    return Source(name, commit, commit)


def content_hash(folder: Path, memo: Path | None) -> str:
    """Hash of a model folder's files, whatever its path; a file that `memo` knows is not read again.

    Args:
        folder: holds config, tokenizer and weights at its top level.
        memo: a JSON file of hashes by path, size and modification time, made where it is missing; `None` for none.
    """
    files = sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and not file.name.startswith(".") and not file.name.startswith(NOT_WEIGHTS)
    )
    hashes = remembered_hashes(files, memo)
    total = xxhash.xxh3_128()
    for file in files:
        total.update(f"{file.name}\0{hashes[file]}\n".encode())
    return total.hexdigest()


def remembered_hashes(files: Iterable[Path], memo: Path | None) -> dict[Path, str]:
    """The hash of each file's bytes; one that `memo` knows by path, size, times and number is not read again."""
    known = _read_memo(memo) if memo else {}
    fresh: dict[str, str] = {}
    hashes: dict[Path, str] = {}
    for file in files:
        key = f"{file.resolve()}|{stamp(file)}"
        if key not in known:
            fresh[key] = known[key] = hash_file(file)
        hashes[file] = known[key]
    if fresh and memo:
        with atomic_write(memo) as out:
            json.dump({**_read_memo(memo), **fresh}, out, indent=0)
    return hashes


def stamp(file: Path) -> str:
    """What changes with a file's content, as far as can be told without reading it: size, times and number."""
    status = file.stat()
    return f"{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}|{status.st_ino}"


def _read_memo(memo: Path) -> dict[str, str]:
    try:
        known = json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a memo that is lost costs one reading of the weights
        return {}
    return known if isinstance(known, dict) else {}


def hash_file(path: str | os.PathLike[str]) -> str:
    """xxh3-128 of a file's bytes."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def hash_parts(parts: Iterable[bytes]) -> str:
    """xxh3-128 of byte strings, each with its length before it, so that no two lists of parts collide by joining."""
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(len(part).to_bytes(8, "big"))
        state.update(part)
    return state.hexdigest()

"""Arrow results that are found again: `Dataset.map` with a key of our own, and files that are checked before use."""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetInfo, Features, is_caching_enabled
from huggingface_hub.constants import HF_HOME

from t2s_pref.errors import UserError
from t2s_pref.files import atomic_write, own_prefix
from t2s_pref.weights import hash_file, hash_parts

logger = logging.getLogger(__name__)

# Arguments of `Dataset.map` that change neither its rows nor their key; anything else is decided here.
PASSED_ON = {"desc", "writer_batch_size", "load_from_cache_file"}


def cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    """The folder of results and samples: `cache_dir`, or `t2s_pref` under `HF_HOME`."""
    return Path(cache_dir).expanduser() if cache_dir else Path(HF_HOME) / "t2s_pref"


def check_map_kwargs(map_kwargs: dict[str, Any]) -> None:
    """Refuse arguments of `Dataset.map` that would break a result's key or its order, with the way out."""
    if "num_proc" in map_kwargs:
        raise UserError("num_proc is not supported; for several processes use `accelerate launch --num_processes N`.")
    if refused := sorted(set(map_kwargs) - PASSED_ON):
        raise UserError(f"Argument {refused[0]!r} is not known here; passed on to Dataset.map are {sorted(PASSED_ON)}.")


def find(
    dataset: Dataset,
    step: str,
    key: dict[str, Any],
    cache_dir: str | os.PathLike[str] | None,
    partial: bool = False,
) -> Dataset | None:
    """The result of `step` on `dataset` under `key`, where it was kept and is still as it was written.

    Arrow itself reads a file that was cut or altered without a word, so the file's content is compared.

    Args:
        partial: also one that its run could not complete.
    """
    path, fingerprint = _place(dataset, step, key, cache_dir)
    seal = _intact(path)
    return _open(path, _mark(fingerprint, seal), dataset) if seal and (partial or _is_whole(seal)) else None


def keep(
    dataset: Dataset,
    step: str,
    key: dict[str, Any] | None,
    cache_dir: str | os.PathLike[str] | None,
    build: Callable[[Path, str], bool],
) -> Dataset:
    """Build the result of `step` on `dataset` and keep it under `key`; in memory only where there is no key.

    Args:
        build: given a folder to work in and a fingerprint, writes `result.arrow` there. `False` where something is
            missing in it that another run may find: the next one builds it again.
    """
    if key is None:
        with draft_folder(cache_folder(cache_dir) / step) as folder:
            build(folder, mark := os.urandom(16).hex())
            return _open(folder / "result.arrow", mark, dataset, in_memory=True)
    path, fingerprint = _place(dataset, step, key, cache_dir)
    with draft_folder(path.parent) as folder:
        whole = build(folder, fingerprint)
        draft = folder / "result.arrow"
        seal = {"fingerprint": fingerprint, "size": draft.stat().st_size, "xxh3": hash_file(draft), "whole": whole}
        # without its seal a file is not found: whatever happens between these three lines, none is found by half
        _seal(path).unlink(missing_ok=True)
        os.replace(draft, path)
    with atomic_write(_seal(path)) as file:
        json.dump(seal, file)
    return _open(path, _mark(fingerprint, seal), dataset)


def _is_whole(seal: dict[str, Any]) -> bool:
    return seal.get("whole", True)


def _mark(fingerprint: str, seal: dict[str, Any]) -> str:
    """The fingerprint of a result; a part of one has its own, or what follows from it would pass for the whole's."""
    return fingerprint if _is_whole(seal) else hash_parts([fingerprint.encode(), seal["xxh3"].encode()])


def without_rows(dataset: Dataset, features: Features) -> Dataset:
    """What a step makes of a dataset without rows, which `map` would hand back with the columns that it had."""
    info = DatasetInfo(description=dataset.info.description, features=features)
    return Dataset(features.arrow_schema.empty_table(), info=info, split=dataset.split)


def _place(
    dataset: Dataset, step: str, key: dict[str, Any], cache_dir: str | os.PathLike[str] | None
) -> tuple[Path, str]:
    fingerprint = hash_parts([step.encode(), dataset._fingerprint.encode(), json.dumps(key, sort_keys=True).encode()])
    return cache_folder(cache_dir) / step / f"{fingerprint}.arrow", fingerprint


def _open(path: Path, fingerprint: str, source: Dataset, in_memory: bool = False) -> Dataset:
    result = Dataset.from_file(str(path), split=source.split, in_memory=in_memory)
    result._fingerprint = fingerprint
    result.info.description = source.info.description
    return result


def cached_map(
    dataset: Dataset,
    function: Callable[..., dict[str, list]],
    *,
    step: str,
    key: dict[str, Any] | None,
    features: Features,
    remove_columns: list[str] | None = None,
    cache_dir: str | os.PathLike[str] | None,
    map_kwargs: dict[str, Any],
    prepare: Callable[[], bool] = lambda: True,
) -> Dataset:
    """A batched `Dataset.map` whose result is found again.

    Args:
        key: what decides the result beside the dataset; `None` where that is not known, and nothing is kept.
        prepare: called before the first batch, where the result is not found; `False` where it is not to be kept.
    """
    check_map_kwargs(map_kwargs)
    passed = {"desc": step.capitalize(), **map_kwargs}
    reuse = may_reuse(passed)
    if not len(dataset):
        return without_rows(dataset, features)
    if key is not None and reuse and (found := find(dataset, step, key, cache_dir)) is not None:
        return found
    if not prepare() or key is None:
        mark = os.urandom(16).hex()  # what comes after is not to be found again either
        passed |= {"keep_in_memory": True, "load_from_cache_file": False, "new_fingerprint": mark}
        return dataset.map(function, batched=True, features=features, remove_columns=remove_columns, **passed)

    def build(folder: Path, fingerprint: str) -> bool:
        dataset.map(
            function,
            batched=True,
            features=features,
            remove_columns=remove_columns,
            cache_file_name=str(folder / "result.arrow"),
            new_fingerprint=fingerprint,
            load_from_cache_file=False,
            **passed,
        )
        return True

    return keep(dataset, step, key, cache_dir, build)


def may_reuse(map_kwargs: dict[str, Any]) -> bool:
    """Take `load_from_cache_file` out of `map_kwargs`; by default what `datasets.enable_caching` says."""
    asked = map_kwargs.pop("load_from_cache_file", None)
    return is_caching_enabled() if asked is None else asked


def _seal(path: Path) -> Path:
    return path.with_suffix(".json")


def _intact(path: Path) -> dict[str, Any] | None:
    """The seal of a file that is as it was written."""
    try:
        seal = json.loads(_seal(path).read_text(encoding="utf-8"))
        if {**seal, "fingerprint": path.stem, "size": path.stat().st_size, "xxh3": hash_file(path)} == seal:
            return seal
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        pass
    logger.warning("%s is damaged; computing it again.", path)
    return None


@contextmanager
def draft_folder(parent: Path) -> Iterator[Path]:
    """A folder of this process's own, so that two runs of one key do not write into each other's files."""
    parent.mkdir(parents=True, exist_ok=True)
    prefix = own_prefix(parent, ".draft-")
    with tempfile.TemporaryDirectory(dir=parent, prefix=prefix, ignore_cleanup_errors=True) as folder:
        yield Path(folder)

"""What training starts from, and may not overwrite: the base model and adapter that are given, against those that pairs
were sampled from."""

import logging
import os
from pathlib import Path
from typing import Any

from t2s_pref.entries import Entry, noted
from t2s_pref.errors import UserError
from t2s_pref.files import looks_local
from t2s_pref.lineage import SAMPLED
from t2s_pref.weights import find_adapter, find_model

logger = logging.getLogger(__name__)

MERGE = "merge it first (llamafactory-cli export), give the merged model as base_model (--base-model) and no adapter"


def starting_model(
    entries: list[Entry], given: str | os.PathLike[str] | None, revision: str | None
) -> tuple[str, str | None]:
    """The base model, an absolute folder or a Hub id, and the revision of the latter.

    Raises:
        [`UserError`]: it is neither given nor one Hub model that the pairs were sampled from, or it is not there.
    """
    sampled = _sampled(entries, "model")
    if given is None:
        if len(sampled) != 1 or not sampled[0].get("revision"):
            told = " and ".join(repr(each.get("name")) for each in sampled)
            why = f"the pairs were sampled from {told}, which is not one model of the Hub" if told else "none is noted"
            raise UserError(f"base_model is not given, and {why}; pass base_model= (--base-model), folder or Hub id.")
        given = sampled[0]["name"]
    name = os.fspath(given)
    if looks_local(given):
        folder = Path(absolute(name))
        if revision is not None:
            raise UserError(f"revision is for a model from the Hub; {name!r} is a folder.")
        if not (folder / "config.json").is_file():
            what = "has no config.json" if folder.is_dir() else "does not exist"
            raise UserError(f"Base model folder {name!r} {what}; give a model folder or a Hub id (owner/name).")
        name = str(folder)
    else:
        revision = revision or next((each.get("revision") for each in sampled if each.get("name") == name), None)
        find_model(name, revision, None)
    _warn_of_another("model", name, sampled)
    return name, revision


def starting_adapter(entries: list[Entry], given: str | os.PathLike[str] | None) -> str | None:
    """The adapter, an absolute folder or a Hub id; `None` where there is none to be.

    Raises:
        [`UserError`]: it is not there, or the pairs were sampled with one and nothing is given.
    """
    sampled = _sampled(entries, "adapter")
    if given is None and sampled:
        raise UserError(
            f"The pairs were sampled with the adapter {sampled[0].get('name')!r}; pass it, adapter_path= "
            '(--adapter-path), or "" to train the base model without it.'
        )
    if not given:
        return None
    name = os.fspath(given)
    if "," in name:
        raise UserError(f"adapter_path is {name!r}; it must be one adapter, without commas; of several, {MERGE}.")
    if looks_local(given):
        if not (Path(absolute(name)) / "adapter_config.json").is_file():
            raise UserError(f"Adapter {name!r} has no adapter_config.json; give the folder of a LoRA, or a Hub id.")
        name = absolute(name)
    elif find_adapter(name, None) is None:
        raise UserError(f"Adapter {name!r} was found neither as a folder nor on the Hub; mend adapter_path.")
    if not sampled and noted(entries, SAMPLED):
        logger.warning("the pairs were sampled without an adapter, but training starts from %r", name)
    _warn_of_another("adapter", name, sampled)
    return name


def check_finetuning(finetuning: str, adapter: str | None, on_cpu: bool) -> None:
    """Raise [`UserError`] where the finetuning does not go with an adapter, or with a CPU."""
    if finetuning == "full" and adapter:
        raise UserError(f"finetuning is full, and LLaMA-Factory takes an adapter for LoRA only: {MERGE}.")
    if finetuning == "qlora" and adapter:
        raise UserError(
            "finetuning is qlora with an adapter, which needs create_new_adapter, and quantised weights take no merge: "
            f"use lora, or {MERGE}."
        )
    if finetuning == "qlora" and on_cpu:
        raise UserError(
            "finetuning is qlora, which needs CUDA; use lora, or device cuda where it will be trained on one."
        )


def check_output(output_dir: str, model: str, adapter: str | None) -> None:
    """Raise [`UserError`] where training would overwrite what it starts from; relative folders are those from here."""
    output = os.path.realpath(absolute(output_dir))
    for what, source in (("adapter", adapter), ("base model", model)):
        if not (source and os.path.isabs(source)):
            continue
        start = os.path.realpath(source)
        # a checkpoint may be written anew by the run that has its parent for an output
        run = os.path.dirname(start) if os.path.basename(start).startswith("checkpoint-") else start
        if output in (start, run):
            raise UserError(
                f"output_dir is {output_dir!r}, and training starts from the {what} there, {start!r}, which would be "
                "overwritten; give another, output_dir= (--output-dir)."
            )


def absolute(path: str | os.PathLike[str]) -> str:
    """A path that means the same from every working directory."""
    return os.path.abspath(os.path.expanduser(path))


def _sampled(entries: list[Entry], what: str) -> list[dict[str, Any]]:
    """The different models or adapters that pairs were sampled from. A teacher is none: it is not what is trained."""
    found = [record.get(what) for record in noted(entries, SAMPLED)]
    named = [each for each in found if each and each.get("name")]
    return [each for place, each in enumerate(named) if each not in named[:place]]


def _warn_of_another(what: str, name: str, sampled: list[dict[str, Any]]) -> None:
    # a server's model has a name of its own, and neither a commit nor a hash
    others = [str(each.get("name")) for each in sampled if each.get("revision") or each.get("content")]
    own = Path(name).resolve().name if os.path.isabs(name) else Path(name).name
    if others and own not in [Path(other).name for other in others]:
        logger.warning("the pairs were sampled from the %s %s, but %r is trained", what, " and ".join(others), name)

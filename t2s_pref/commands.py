"""What each command of the command line does, given its parsed arguments."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t2s_pref.errors import UserError
from t2s_pref.ranks import rank
from t2s_pref.settings import DEFAULT_MODEL, GOLD_TIMEOUT, SAMPLING_DEFAULTS, TIMEOUT, SamplingSettings

# Options of `reject` that say how SQL is run or chosen by its verdict, with their defaults.
NEED_DATABASES = {
    **dict.fromkeys(("max_candidates", "database_version", "keep", "workers")),
    "timeout": TIMEOUT,
    "gold_timeout": GOLD_TIMEOUT,
    "select": "first",
    "chosen": None,
}

# The exit code where a server gave less than was asked for.
INCOMPLETE = 1

# Options on a model that is loaded here, with their defaults.
MODEL_HERE = {
    "adapter_path": "",
    "strict_adapter": False,
    "revision": None,
    "trust_remote_code": False,
    "dtype": "auto",
    "device": "auto",
    "continuous_batching": False,
}

# Everything large is imported by the command that needs it: `--help` and mistakes are answered at once.


def reject(args: argparse.Namespace) -> int | None:
    """Rows to preference pairs."""
    from datasets import disable_progress_bars

    from t2s_pref.chains import attach_cot
    from t2s_pref.formats import format_of
    from t2s_pref.generate import generate_rejected
    from t2s_pref.llamafactory import check_destination, save_llamafactory
    from t2s_pref.load import load_sft
    from t2s_pref.pairs import explode_rejected
    from t2s_pref.preferences import load_pairs
    from t2s_pref.rounds import merge_pairs
    from t2s_pref.sql import check_dialect
    from t2s_pref.tally import summary

    if rank():
        disable_progress_bars()  # one set of bars is enough
    check_destination(args.output, args.dataset_name)  # now, not after hours of sampling
    _check_files(args, "sft_data", "output", also=(*args.merge, args.cot_data))
    _check_most(args)
    check_dialect(args.dialect)
    _check_cot(args)
    chosen = args.chosen or ("own_or_gold" if args.cot else "gold")
    how = {"keep": args.keep, "chosen": chosen, "select": args.select, "max_per_row": args.max_per_row}
    how["seed"] = args.seed
    proving: dict[str, Any] = {}
    if args.databases is not None:
        proving = {"databases": args.databases, "timeout": args.timeout, "max_candidates": args.max_candidates}
        proving |= {"chosen": chosen, **_running(args)}
    else:
        _refuse(args, NEED_DATABASES, "needs --databases.")
    # what is wanted with databases are so many distinct ones
    dedup = args.dedup_rejects or ("none" if args.databases is None else "normalized")
    settings = _settings(args)
    engine = _engine(args)
    rows = _rows(args)
    if not args.cot and (reasoning := [row for row, gold in enumerate(rows["output"]) if format_of(gold) != "sql"]):
        raise UserError(
            f"Row {reasoning[0]} of {args.sft_data!r} has a chain of thought in its output; candidates without one "
            "make no pair with it: pass --cot."
        )
    earlier = [load_pairs(path) for path in args.merge]
    if args.cot_data:
        proof = {"timeout": args.timeout, "cache_dir": args.cache_dir, **_running(args)}
        rows = attach_cot(rows, load_sft(args.cot_data), args.cot, args.databases, **proof)
    rows = generate_rejected(rows, engine, settings, cache_dir=args.cache_dir, **proving)
    if rank() > 0:
        return None
    pairs = explode_rejected(rows, dedup, args.dialect, cache_dir=args.cache_dir, **how)
    counts = summary(rows, dedup, args.dialect, cache_dir=args.cache_dir, **how)
    print(counts)
    if not len(pairs):
        raise UserError(f"No reject is left, as the summary says; {args.output!r} was not written.")
    if earlier:
        merged = merge_pairs(*earlier, pairs, dialect=args.dialect)
        before = sum(map(len, earlier))
        print(f"merged {len(pairs)} pairs with {before} of earlier rounds: {len(merged)}, each once")
        pairs = merged
    print(f"wrote {save_llamafactory(pairs, args.output, args.dataset_name, formatting=args.formatting)}")
    return _done(args, counts.drops)


def cot(args: argparse.Namespace) -> int | None:
    """Rows to rows with chains of thought."""
    from datasets import disable_progress_bars

    from t2s_pref.chains import cot_summary, explode_cot
    from t2s_pref.cot import generate_cot
    from t2s_pref.llamafactory import check_destination, save_llamafactory

    if rank():
        disable_progress_bars()
    check_destination(args.output, args.dataset_name)
    _check_files(args, "sft_data", "output")
    _check_most(args)
    proving: dict[str, Any] = {}
    if args.databases is not None:
        proving = {"databases": args.databases, "timeout": args.timeout, **_running(args)}
    else:
        proof = ("database_version", "timeout", "gold_timeout", "workers")
        _refuse(args, {name: NEED_DATABASES[name] for name in proof}, "needs --databases.")
    args.cot, args.round = args.answer_format, None
    settings = _settings(args)
    engine = _engine(args)
    rows = _rows(args)
    rows = generate_cot(rows, engine, settings, dialect=args.dialect, cache_dir=args.cache_dir, **proving)
    if rank() > 0:
        return None
    counts = cot_summary(rows)
    print(counts)
    kept = explode_cot(rows, args.max_per_row, cache_dir=args.cache_dir)
    if not len(kept):
        raise UserError(f"No chain of thought is left, as the summary says; {args.output!r} was not written.")
    print(f"wrote {save_llamafactory(kept, args.output, args.dataset_name, formatting=args.formatting)}")
    return _done(args, counts.drops)


def _done(args: argparse.Namespace, drops: dict[str, int]) -> int | None:
    """Say how to train on what was written, and what is still lacking; the exit code."""
    from t2s_pref.columns import FAILED

    written = Path(args.output)
    where = ["--dataset-dir", str(written.parent), "--dataset", args.dataset_name or written.stem]
    print(f"train on it: t2s-pref train-config {shlex.join(where)} --base-model ... --output train.yaml")
    if lacking := drops.get(FAILED, 0):
        print(f"t2s-pref: {lacking} answers failed; run the same command again to ask for these.", file=sys.stderr)
        return INCOMPLETE
    return None


def _check_cot(args: argparse.Namespace) -> None:
    """Refuse what does not go together with chains of thought, or needs them."""
    if args.cot is None:
        if args.cot_data:
            raise UserError("--cot-data holds chains of thought for --cot, which is not given.")
    elif args.databases is None:
        raise UserError("--cot pairs right answers with wrong ones, and only --databases tells these apart.")
    elif args.chosen == "gold" and not args.cot_data:
        raise UserError("--chosen gold with --cot needs chains of thought of the golds: --cot-data, from t2s-pref cot.")


def verify(args: argparse.Namespace) -> None:
    """A preference file to one without the pairs that are not proven."""
    from t2s_pref.cleaning import clean_preferences
    from t2s_pref.verdicts import WRONG

    _check_files(args, "data", "output", "report")
    found = clean_preferences(
        args.data,
        args.databases,
        args.output,
        split=args.split,
        dataset_name=args.dataset_name,
        keep=args.keep or WRONG,
        timeout=args.timeout,
        cache_dir=args.cache_dir,
        **_running(args),
    )
    _report(found, args.report)
    if not found.kept:
        raise UserError(f"No pair of {args.data!r} is proven wrong; {args.output!r} was not written.")
    print(f"wrote {args.output}")


def audit(args: argparse.Namespace) -> None:
    """Rows to a report on their golds."""
    from t2s_pref.audit import audit_golds

    _check_files(args, "sft_data", "report")
    found = audit_golds(_rows(args), args.databases, cache_dir=args.cache_dir, **_running(args))
    _report(found, args.report)


def evaluate(args: argparse.Namespace) -> None:
    """Rows to the execution accuracy of a model."""
    from datasets import disable_progress_bars

    from t2s_pref.accuracy import evaluate

    if rank():
        disable_progress_bars()
    _check_files(args, "sft_data", "report")
    settings = _settings(args)
    engine = _engine(args)
    rows = _rows(args)
    running = _running(args)
    found = evaluate(rows, engine, args.databases, settings, timeout=args.timeout, cache_dir=args.cache_dir, **running)
    if found is None:
        return
    _report(found, args.report)


def train_config(args: argparse.Namespace) -> None:
    """Datasets that LLaMA-Factory finds to its training file."""
    from t2s_pref.training import train_config

    given = {name: value for name, value in vars(args).items() if name not in ("command", "run", "dataset", "output")}
    print(train_config(args.output, args.dataset, **given))


def push(args: argparse.Namespace) -> None:
    """A file of pairs, or of supervised rows, to the Hub."""
    from t2s_pref.hub import push_to_hub
    from t2s_pref.load import load_sft
    from t2s_pref.preferences import holds_pairs, load_pairs

    rows = (load_pairs if holds_pairs(args.data) else load_sft)(args.data)
    pushed = push_to_hub(
        rows,
        args.repo_id,
        private=args.private or None,
        revision=args.revision,
        create_pr=args.create_pr,
        test_size=args.test_size,
        license=args.license,
        source_datasets=args.source_datasets,
    )
    print(f"pushed {len(rows)} rows: {pushed.pr_url or pushed.commit_url}")


def demo(args: argparse.Namespace) -> None:
    """The whole road on the bundled files."""
    # The bundled model is too small for threads to help, and on a busy machine they wait for each other's cores. It has
    # to be said before torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from t2s_pref.demo import run_cot_demo, run_demo

    run = (run_cot_demo if args.cot else run_demo)(args.output, args.cache_dir)
    for counts in run.summaries:
        print(counts, end="\n\n")
    for pair in run.examples:
        print("\n".join(f"{name:>8}: {text}" for name, text in pair.items()), end="\n\n")
    print("wrote " + "\n      ".join(map(str, run.written)))


def _report(found: Any, path: str | None) -> None:
    """Print what a command found, and write it as JSON where a file is named."""
    from t2s_pref.files import atomic_write

    print(found)
    if path:
        with atomic_write(os.path.expanduser(path)) as file:
            json.dump(found.to_dict(), file, indent=2, ensure_ascii=False)
            file.write("\n")
        print(f"wrote {path}")


def _check_most(args: argparse.Namespace) -> None:
    if args.max_per_row is not None and args.max_per_row < 1:
        raise UserError(f"--max-per-row is {args.max_per_row}; it must be 1 or more.")


def _check_files(args: argparse.Namespace, *names: str, also: Sequence[str | None] = ()) -> None:
    """What is written is neither what is read, `also` included, nor written twice, and the report can be."""
    for path in also:
        if path and os.path.realpath(os.path.expanduser(path)) == os.path.realpath(os.path.expanduser(args.output)):
            raise UserError(f"--output is {path!r}, which is read and would be overwritten; name another file.")
    if path := getattr(args, "report", None):
        from t2s_pref.files import check_writable

        if os.path.basename(path).lower() == "dataset_info.json":
            raise UserError(f"--report is {path!r}, where datasets are registered; name another file.")
        check_writable(Path(os.path.expanduser(path)))
    seen: dict[str, str] = {}
    for name in names:
        if path := getattr(args, name):
            option = "--" + name.replace("_", "-")
            other = seen.setdefault(os.path.realpath(os.path.expanduser(path)), option)
            if other != option:
                raise UserError(f"{option} is {other}, {path!r}, which would be overwritten; name another file.")


def _settings(args: argparse.Namespace) -> SamplingSettings:
    given = {name: getattr(args, name) for name in SAMPLING_DEFAULTS if hasattr(args, name)}
    return SamplingSettings(**{**given, "answer_format": args.cot or "sql"})


def _refuse(args: argparse.Namespace, defaults: dict[str, Any], why: str) -> None:
    """Refuse the first of these options that has another value than its default."""
    for name, default in defaults.items():
        if getattr(args, name) != default:
            raise UserError(f"--{name.replace('_', '-')} {why}")


def _engine(args: argparse.Namespace) -> Any:
    parallel = {} if args.parallel is None else {"parallel": args.parallel}  # the engines have defaults of their own
    if args.endpoint is not None:
        from t2s_pref.endpoint import EndpointEngine

        _refuse(args, MODEL_HERE, "is for a model here; with --endpoint the server decides.")
        _refuse(args, dict.fromkeys(("base_url", "model")), "is for another kind of server than --endpoint; give one.")
        return EndpointEngine(
            args.endpoint,
            model=args.served_model,
            # the default itself, not a name like it: that was asked for
            tokenizer=None if args.base_model is DEFAULT_MODEL else args.base_model,
            model_version=args.model_version,
            **parallel,
        )
    if args.base_url is not None:
        from t2s_pref.chat import ChatEngine

        here = {**MODEL_HERE, "base_model": DEFAULT_MODEL}
        _refuse(args, here, "is for a model here; with --base-url the server decides.")
        _refuse(args, {"served_model": None}, "needs --endpoint; with --base-url the name goes into --model.")
        if args.model is None:
            raise UserError("--base-url needs --model, the model's name there.")
        return ChatEngine(args.base_url, args.model, model_version=args.model_version, **parallel)
    _refuse(args, {"model": None}, "needs --base-url; a model here is --base-model, a vLLM server's --served-model.")
    _refuse(args, {"served_model": None}, "needs --endpoint.")
    _refuse(args, dict.fromkeys(("model_version", "parallel")), "needs --endpoint or --base-url.")
    from t2s_pref.continuous import ContinuousEngine
    from t2s_pref.engines import TransformersEngine

    return (ContinuousEngine if args.continuous_batching else TransformersEngine)(
        args.base_model,
        adapter_path=args.adapter_path,
        strict_adapter=args.strict_adapter,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        dtype=args.dtype,
        device=args.device,
    )


def _rows(args: argparse.Namespace) -> Any:
    """The rows of `--sft-data`, as many as `--max-samples` wants."""
    from t2s_pref.load import load_sft

    if args.max_samples < 0:
        raise UserError(f"--max-samples is {args.max_samples}; it must be 0 (all rows) or more.")
    rows = load_sft(args.sft_data, split=args.split)
    if isinstance(rows, dict):
        raise UserError(f"{args.sft_data!r} has the splits {list(rows)}; choose one with --split.")
    return rows.select(range(min(args.max_samples, len(rows)))) if args.max_samples else rows


def _running(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that say how golds are run, the same for all commands."""
    return {
        "gold_timeout": args.gold_timeout,
        "database_version": args.database_version,
        "workers": args.workers,
    }

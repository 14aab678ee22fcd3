"""What each command of the command line does, given its parsed arguments."""

import argparse
import json
import os
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
}

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


def reject(args: argparse.Namespace) -> None:
    """Rows to preference pairs."""
    from datasets import disable_progress_bars

    from t2s_pref.generate import generate_rejected
    from t2s_pref.llamafactory import check_destination, save_llamafactory
    from t2s_pref.pairs import explode_rejected
    from t2s_pref.sql import check_dialect
    from t2s_pref.tally import summary

    if rank():
        disable_progress_bars()  # one set of bars is enough
    check_destination(args.output, args.dataset_name)  # now, not after hours of sampling
    _check_files(args, "sft_data", "output")
    check_dialect(args.dialect)
    chosen = {"keep": args.keep, "select": args.select, "max_per_row": args.max_per_row}
    proving: dict[str, Any] = {}
    if args.databases is not None:
        proving = {"databases": args.databases, "timeout": args.timeout, "max_candidates": args.max_candidates}
        proving |= _running(args)
    else:
        _refuse(args, NEED_DATABASES, "needs --databases.")
    # what is wanted with databases are so many distinct ones
    dedup = args.dedup_rejects or ("none" if args.databases is None else "normalized")
    settings = _settings(args)
    engine = _engine(args)
    rows = _rows(args)
    rows = generate_rejected(rows, engine, settings, cache_dir=args.cache_dir, **proving)
    if rank() > 0:
        return
    pairs = explode_rejected(rows, dedup, args.dialect, cache_dir=args.cache_dir, **chosen)
    print(summary(rows, dedup, args.dialect, cache_dir=args.cache_dir, **chosen))
    if not len(pairs):
        raise UserError(f"No reject is left, as the summary says; {args.output!r} was not written.")
    print(f"wrote {save_llamafactory(pairs, args.output, args.dataset_name)}")


def verify(args: argparse.Namespace) -> None:
    """A preference file to one without the pairs that are not proven."""
    from t2s_pref.cleaning import clean_preferences
    from t2s_pref.verdicts import WRONG

    _check_files(args, "data", "output", "report")
    found = clean_preferences(
        args.data,
        args.databases,
        args.output,
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


def demo(args: argparse.Namespace) -> None:
    """The whole road on the bundled files."""
    # The bundled model is too small for threads to help, and on a busy machine they wait for each other's cores. It has
    # to be said before torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from t2s_pref.demo import run_demo

    run = run_demo(args.output, args.cache_dir)
    print(run.summary)
    for pair in run.examples:
        print("\n" + "\n".join(f"{name:>8}: {text}" for name, text in pair.items()))
    print("\nwrote " + "\n      ".join(map(str, run.written)))


def _report(found: Any, path: str | None) -> None:
    """Print what a command found, and write it as JSON where a file is named."""
    from t2s_pref.files import atomic_write

    print(found)
    if path:
        with atomic_write(os.path.expanduser(path)) as file:
            json.dump(found.to_dict(), file, indent=2, ensure_ascii=False)
            file.write("\n")
        print(f"wrote {path}")


def _check_files(args: argparse.Namespace, *names: str) -> None:
    """What is written is neither what is read nor written twice, and the report can be."""
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
    return SamplingSettings(**{name: getattr(args, name) for name in SAMPLING_DEFAULTS})


def _refuse(args: argparse.Namespace, defaults: dict[str, Any], why: str) -> None:
    """Refuse the first of these options that has another value than its default."""
    for name, default in defaults.items():
        if getattr(args, name) != default:
            raise UserError(f"--{name.replace('_', '-')} {why}")


def _engine(args: argparse.Namespace) -> Any:
    if args.endpoint is not None:
        from t2s_pref.endpoint import EndpointEngine

        _refuse(args, MODEL_HERE, "is for a model here; with --endpoint the server decides.")
        return EndpointEngine(
            args.endpoint,
            model=args.served_model,
            # the default itself, not a name like it: that was asked for
            tokenizer=None if args.base_model is DEFAULT_MODEL else args.base_model,
            model_version=args.model_version,
        )
    _refuse(args, dict.fromkeys(("served_model", "model_version")), "needs --endpoint.")
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

"""The command line: parse, call, exit code."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields

from t2s_pref import __version__
from t2s_pref.errors import UserError
from t2s_pref.ranks import rank, started_alone
from t2s_pref.settings import DEDUPS, DEFAULT_MODEL, DTYPES, SamplingSettings

DEFAULTS = {field.name: field.default for field in fields(SamplingSettings)}

logger = logging.getLogger(__name__)

INTERRUPTED = 130  # 128 + SIGINT, what shells report
MISTAKEN = 2  # as argparse has it
FAILED = 1


def build_parser() -> argparse.ArgumentParser:
    """The parser of `t2s-pref`."""
    parser = argparse.ArgumentParser(
        prog="t2s-pref",
        description="Preference pairs for text-to-SQL: the SQL that a model itself writes, beside the gold.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    reject = commands.add_parser(
        "reject",
        help="from an SFT file to preference pairs that LLaMA-Factory trains on",
        description="Sample rejected SQL for every row of an SFT file and write one preference pair a reject. "
        "A run that was stopped goes on where it was when it is started again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    model = reject.add_argument_group("model")
    model.add_argument(
        "--base-model",
        default=DEFAULT_MODEL,
        help="folder or Hub id of the model that is to be trained",
    )
    model.add_argument("--adapter-path", default="", help="LoRA adapter on it, folder or Hub id; empty for none")
    model.add_argument("--strict-adapter", action="store_true", help="refuse an adapter that does not exist")
    model.add_argument("--revision", help="branch, tag or commit of a base model from the Hub")
    model.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with the weights")
    model.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help="of the weights; auto is bfloat16 on CUDA, float32 on a CPU",
    )
    model.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu")

    data = reject.add_argument_group("data")
    data.add_argument("--sft-data", required=True, help="JSON array, JSONL or Hub id of alpaca rows")
    data.add_argument("--split", help="the split of a dataset from the Hub")
    data.add_argument("--output", required=True, help="file of preference pairs to write, .json or .jsonl")
    data.add_argument("--dataset-name", help="its name in the dataset_info.json beside it (default: the file's stem)")
    data.add_argument("--max-samples", type=int, default=0, help="use only the first rows; 0 for all")
    data.add_argument(
        "--dedup-rejects",
        nargs="?",
        const="exact",
        default="none",
        choices=DEDUPS,
        help="drop rejects of a row that repeat, as text or after normalisation; exact where no value is given",
    )
    data.add_argument("--dialect", default="sqlite", help="SQL dialect, by its sqlglot name")
    data.add_argument("--cache-dir", help="folder of samples and results (default: t2s_pref under HF_HOME)")

    sampling = reject.add_argument_group("sampling")
    for name, kind, text in (
        ("num_rejects", int, "candidates sampled a row"),
        ("seed", int, "base seed; a row's own is seed + 1000 * its position in the file"),
        ("max_new_tokens", int, "length cap of an answer in tokens; what reaches it is dropped and counted"),
        ("temperature", float, "0 is greedy: one candidate a row"),
        ("top_p", float, "nucleus sampling; 1 keeps the whole vocabulary"),
    ):
        sampling.add_argument(f"--{name.replace('_', '-')}", type=kind, default=DEFAULTS[name], help=text)
    sampling.add_argument("--enable-thinking", action="store_true", help="let a thinking model think before its SQL")
    reject.set_defaults(run=_reject)

    demo = commands.add_parser(
        "demo",
        help="the whole road on the bundled model and databases, without network or GPU",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Sample rejects for the bundled questions with the bundled model, and write SFT and DPO data.",
    )
    demo.add_argument("--output", default="demo_output", help="folder to write into")
    demo.add_argument("--cache-dir", help="folder of samples and results (default: t2s_pref under HF_HOME)")
    demo.set_defaults(run=_demo)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 only if what was asked for is complete."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.ERROR if rank() else logging.WARNING)
    if started_alone():
        logger.warning(
            "accelerate started a single process: without GPUs it needs --multi_gpu beside --num_processes, and then "
            "uses gloo between CPU processes. Going on with one."
        )
    try:
        args.run(args)
    except UserError as error:
        print(f"t2s-pref: {error}", file=sys.stderr)
        return MISTAKEN
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"t2s-pref: {error}; what was sampled is kept, run the same command again.", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("t2s-pref: interrupted; what was sampled is kept, run the same command again to go on.", file=sys.stderr)
        return INTERRUPTED
    return 0


def _reject(args: argparse.Namespace) -> None:
    from datasets import disable_progress_bars

    from t2s_pref.engines import TransformersEngine
    from t2s_pref.generate import generate_rejected
    from t2s_pref.llamafactory import check_destination, save_llamafactory
    from t2s_pref.load import load_sft
    from t2s_pref.pairs import explode_rejected
    from t2s_pref.sql import check_dialect
    from t2s_pref.tally import summary

    if args.max_samples < 0:
        raise UserError(f"--max-samples is {args.max_samples}; it must be 0 (all rows) or more.")
    if rank():
        disable_progress_bars()  # one set of bars is enough
    check_destination(args.output, args.dataset_name)  # now, not after hours of sampling
    if os.path.realpath(args.output) == os.path.realpath(args.sft_data):
        raise UserError(f"--output is --sft-data, {args.output!r}, which would be overwritten; name another file.")
    check_dialect(args.dialect)
    settings = SamplingSettings(**{name: getattr(args, name) for name in DEFAULTS})
    engine = TransformersEngine(
        args.base_model,
        adapter_path=args.adapter_path,
        strict_adapter=args.strict_adapter,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        dtype=args.dtype,
        device=args.device,
    )
    rows = load_sft(args.sft_data, split=args.split)
    if isinstance(rows, dict):
        raise UserError(f"{args.sft_data!r} has the splits {list(rows)}; choose one with --split.")
    if args.max_samples:
        rows = rows.select(range(min(args.max_samples, len(rows))))
    rows = generate_rejected(rows, engine, settings, cache_dir=args.cache_dir)
    if rank() > 0:
        return
    pairs = explode_rejected(rows, args.dedup_rejects, args.dialect, cache_dir=args.cache_dir)
    print(summary(rows, args.dedup_rejects, args.dialect, cache_dir=args.cache_dir))
    print(f"wrote {save_llamafactory(pairs, args.output, args.dataset_name)}")


def _demo(args: argparse.Namespace) -> None:
    # The bundled model is too small for threads to help, and on a busy machine they wait for each other's cores. It has
    # to be said before torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from t2s_pref.demo import run_demo

    run = run_demo(args.output, args.cache_dir)
    print(run.summary)
    for pair in run.examples:
        print("\n" + "\n".join(f"{name:>8}: {text}" for name, text in pair.items()))
    print("\nwrote " + "\n      ".join(map(str, run.written)))

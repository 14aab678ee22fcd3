"""The command line: parse, call, exit code."""

import argparse
import logging
import sys
from collections.abc import Sequence

from t2s_pref import __version__, commands
from t2s_pref.errors import UserError
from t2s_pref.ranks import rank, started_alone
from t2s_pref.settings import (
    ANSWER_FORMATS,
    CHOSENS,
    DEDUPS,
    DEFAULT_MODEL,
    DTYPES,
    GOLD_TIMEOUT,
    LAYOUTS,
    SAMPLING_DEFAULTS,
    SELECTS,
    TIMEOUT,
)
from t2s_pref.verdicts import VERDICTS

logger = logging.getLogger(__name__)

INTERRUPTED = 130  # 128 + SIGINT, what shells report
MISTAKEN = 2  # as argparse has it
FAILED = 1


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one that the text does not explain itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required:
            return f"{action.help} (required)"
        if (
            action.default is None
            or action.default is False
            or action.default == ""
            or "(default:" in (action.help or "")
        ):
            return action.help
        return super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """The parser of `t2s-pref`."""
    parser = argparse.ArgumentParser(
        prog="t2s-pref",
        description="Preference pairs for text-to-SQL: SQL that a model itself writes and gets wrong, beside the gold.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    added = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, description: str) -> argparse.ArgumentParser:
        new = added.add_parser(name, help=text, description=description, formatter_class=_Help)
        new.set_defaults(run=getattr(commands, name.replace("-", "_")))
        return new

    reject = command(
        "reject",
        "from an SFT file to preference pairs that LLaMA-Factory trains on",
        "Sample SQL for every row of an SFT file and write one preference pair a reject. With --databases, only what "
        "is proven wrong by execution becomes a reject. A run that was stopped goes on where it was when it is started "
        "again.",
    )
    _add_model(reject)
    data = _add_data(reject)
    _add_output(data)
    _add_formatting(data)
    data.add_argument(
        "--dedup-rejects",
        nargs="?",
        const="exact",
        choices=DEDUPS,
        help="drop rejects of a row that repeat, as text or after normalisation; exact where no value is given "
        "(default: none, and normalized with --databases)",
    )
    _add_dialect(data)
    data.add_argument(
        "--cot-data", help="file of t2s-pref cot: the chains of thought that are chosen where the model has none"
    )
    data.add_argument(
        "--merge", nargs="+", metavar="FILE", default=(), help="pairs of earlier rounds that --output is to hold too"
    )
    _add_sampling(reject, "candidates sampled a row; with --databases, proven rejects wanted a row")
    _add_cot(reject)
    reject.add_argument(
        "--round", type=int, help="of on-policy training, from 1: seeds of its own, and the pairs carry it"
    )
    proof = _add_databases(reject, required=False)
    proof.add_argument("--max-candidates", type=int, help="most candidates a row (default: 4 * --num-rejects)")
    _add_keep(proof)
    proof.add_argument(
        "--chosen",
        choices=CHOSENS,
        help="the gold, or a candidate of the model that is proven right (default: gold, and own_or_gold with --cot)",
    )
    proof.add_argument(
        "--select",
        default="first",
        choices=SELECTS,
        help="which pairs come first where a row has more than --max-per-row, and which right answer each one takes",
    )
    proof.add_argument("--max-per-row", type=int, help="most pairs of a row (default: one for each reject)")

    cot = command(
        "cot",
        "from an SFT file to one with chains of thought, written by a teacher that sees the gold SQL",
        "Have a teacher write the reasoning from each question to its gold SQL, and keep what ends in right SQL and "
        "does not betray that it was given. A run that was stopped goes on where it was when it is started again.",
    )
    _add_model(cot)
    data = _add_data(cot)
    _add_output(data, "SFT rows with chains of thought")
    _add_formatting(data)
    data.add_argument(
        "--answer-format", default="fenced", choices=ANSWER_FORMATS[1:], help="reasoning and a block, or a think block"
    )
    data.add_argument("--max-per-row", type=int, help="most chains of thought of a row (default: all)")
    _add_dialect(data)
    _add_sampling(cot, "samples a row", "--num-samples")
    _add_databases(cot, required=False)

    verify = command(
        "verify",
        "from a preference file of any tool to one without wrongly rejected SQL",
        "Run both sides of every pair of a preference file and write the pairs whose rejected side is proven wrong.",
    )
    data = verify.add_argument_group("data")
    data.add_argument("--data", required=True, help="JSON array, JSONL or Hub id of records with chosen and rejected")
    data.add_argument("--split", help="the split of a dataset from the Hub")
    _add_output(data)
    data.add_argument("--report", help="JSON file to write: every pair that was dropped, and why")
    _add_cache(data)
    _add_keep(_add_databases(verify))

    audit = command(
        "audit",
        "which golds of an SFT file fail, time out, return nothing or are not determined by the data",
        "Run every gold of an SFT file and list those that can prove nothing, with the engine's message.",
    )
    data = _add_data(audit)
    data.add_argument("--report", help="JSON file to write")
    _add_databases(audit, candidates=False)

    evaluate = command(
        "evaluate",
        "execution accuracy of a model: strict, BIRD's and Spider's, greedy and pass@k",
        "Answer every row of an SFT file greedily and with --num-rejects samples, and count the right answers.",
    )
    _add_model(evaluate)
    data = _add_data(evaluate)
    data.add_argument("--report", help="JSON file to write")
    _add_sampling(evaluate, "the k of pass@k")
    _add_cot(evaluate)
    _add_databases(evaluate)

    _add_training(
        command(
            "train-config",
            "from data that LLaMA-Factory finds to the YAML that it trains with",
            "Write the training file for datasets in a dataset_info.json: DPO for preference pairs, SFT for supervised "
            "rows. Template and thinking mode are those of the prompts that were sampled from; rows are measured.",
        )
    )

    push = command(
        "push",
        "from a file of pairs to a dataset on the Hub that trains and explains itself",
        "Push preference pairs, or supervised rows, in one commit: for TRL, for LLaMA-Factory, with a card from the "
        "run. The token is in HF_TOKEN or where `hf auth login` put it. Pushed again, what is ours there is replaced.",
    )
    data = push.add_argument_group("data")
    data.add_argument("--data", required=True, help="JSON array or JSONL of preference pairs or supervised rows")
    data.add_argument("--test-size", type=float, default=0.0, help="share of prompts that go into a split test")
    to = push.add_argument_group("Hub")
    to.add_argument(
        "--repo-id", required=True, metavar="OWNER/NAME", help="dataset on the Hub, made where there is none"
    )
    to.add_argument("--private", action="store_true", help="make a new one private")
    to.add_argument("--revision", help="branch to push to, made where it is not there")
    to.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    to.add_argument("--license", help="as the Hub writes it, cc-by-4.0 say")
    to.add_argument(
        "--source-datasets",
        nargs="+",
        default=(),
        metavar="ID",
        help="Hub ids of datasets that the rows come from",
    )

    demo = command(
        "demo",
        "the whole road on the bundled model and databases, without network or GPU",
        "Sample rejects for the bundled questions with the bundled model, prove them wrong, write SFT and DPO data.",
    )
    demo.add_argument("--output", default="demo_output", help="folder to write into")
    demo.add_argument(
        "--cot", action="store_true", help="with chains of thought: a teacher, then pairs that carry them"
    )
    _add_cache(demo)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument(
        "--base-model", default=DEFAULT_MODEL, help="folder or Hub id of the model that is to be trained"
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
    model.add_argument(
        "--continuous-batching", action="store_true", help="decode by transformers' continuous batching, on a GPU"
    )
    model.add_argument(
        "--endpoint",
        metavar="URL",
        help="sample from the vLLM server there; --base-model then names its tokenizer only",
    )
    model.add_argument("--served-model", help="its name on the server (default: the only one)")
    model.add_argument(
        "--base-url",
        metavar="URL",
        help="sample from any OpenAI-compatible server there, by messages; its key is in T2S_PREF_API_KEY",
    )
    model.add_argument("--model", metavar="NAME", help="the model's name at --base-url")
    model.add_argument("--model-version", help="what you call the weights that are served now")
    model.add_argument("--parallel", type=int, help="requests under way at a time (default: the engine's own)")


def _add_data(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    data = parser.add_argument_group("data")
    data.add_argument("--sft-data", required=True, help="JSON array, JSONL or Hub id of alpaca rows")
    data.add_argument("--split", help="the split of a dataset from the Hub")
    data.add_argument("--max-samples", type=int, default=0, help="use only the first rows; 0 for all")
    _add_cache(data)
    return data


def _add_cache(group: argparse._ActionsContainer) -> None:
    group.add_argument("--cache-dir", help="folder of samples, verdicts and results (default: t2s_pref under HF_HOME)")


def _add_dialect(data: argparse._ArgumentGroup) -> None:
    data.add_argument("--dialect", default="sqlite", help="SQL dialect, by its sqlglot name")


def _add_cot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cot",
        nargs="?",
        const="fenced",
        choices=ANSWER_FORMATS[1:],
        help="answers with a chain of thought: reasoning and a block (fenced, without a value), or a think block",
    )


def _add_output(data: argparse._ArgumentGroup, what: str = "preference pairs") -> None:
    data.add_argument("--output", required=True, help=f"file of {what} to write, .json or .jsonl")
    data.add_argument("--dataset-name", help="its name in the dataset_info.json beside it (default: the file's stem)")


def _add_formatting(data: argparse._ArgumentGroup) -> None:
    data.add_argument(
        "--formatting", default="alpaca", choices=LAYOUTS, help="layout of the file: columns of strings, or messages"
    )


def _add_sampling(parser: argparse.ArgumentParser, wanted: str, count: str = "--num-rejects") -> None:
    sampling = parser.add_argument_group("sampling")
    for name, kind, text in (
        ("num_rejects", int, wanted),
        ("seed", int, "base seed; a row's own is seed + 1000 * its position in the file"),
        ("max_new_tokens", int, "length cap of an answer in tokens; what reaches it is dropped and counted"),
        ("temperature", float, "0 is greedy: one candidate a row"),
        ("top_p", float, "nucleus sampling; 1 keeps the whole vocabulary"),
        ("top_k", int, "draw from so many of the likeliest tokens only; 0 is off"),
        ("repetition_penalty", float, "above 1, tokens of the prompt and the answer so far are less likely; 1 is off"),
    ):
        option = count if name == "num_rejects" else f"--{name.replace('_', '-')}"
        sampling.add_argument(option, dest=name, type=kind, default=SAMPLING_DEFAULTS[name], help=text)
    sampling.add_argument(
        "--stop", nargs="+", default=(), metavar="TEXT", help="an answer ends before the first of these"
    )
    sampling.add_argument("--enable-thinking", action="store_true", help="let a thinking model think before its SQL")


def _add_databases(
    parser: argparse.ArgumentParser, required: bool = True, candidates: bool = True
) -> argparse._ArgumentGroup:
    proof = parser.add_argument_group("verification")
    proof.add_argument(
        "--databases",
        required=required,
        help="folder of <db_id>/<db_id>.sqlite, one SQLite file, or a SQLAlchemy URL with {db_id}",
    )
    proof.add_argument(
        "--database-version", help="what you call the content of a server; without it nothing found there is cached"
    )
    if candidates:
        proof.add_argument(
            "--timeout",
            type=float,
            default=TIMEOUT,
            help="seconds that an SQL may take; ten times its gold's where that is more",
        )
    proof.add_argument("--gold-timeout", type=float, default=GOLD_TIMEOUT, help="seconds that a gold may take")
    proof.add_argument("--workers", type=int, help="processes that run SQL (default: one a core, 16 at most)")
    return proof


def _add_training(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument(
        "--base-model", help="folder or Hub id (default: the Hub model that the pairs were sampled from)"
    )
    model.add_argument("--revision", help="branch, tag or commit of a base model from the Hub")
    model.add_argument(
        "--adapter-path",
        help='LoRA adapter to start from, folder or Hub id; "" for none, though pairs were sampled with one',
    )
    model.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with the weights")
    model.add_argument("--template", help="LLaMA-Factory's (default: the one that gives the prompts sampled from)")
    method = parser.add_argument_group("method")
    method.add_argument("--finetuning", default="lora", help="lora, qlora (on 4-bit weights) or full")
    method.add_argument("--lora-rank", type=int, default=32, help="of the adapter that is trained")
    method.add_argument("--pref-loss", default="sigmoid", help="sigmoid (DPO), orpo or simpo")
    method.add_argument("--pref-beta", type=float, help="how strongly preferences count (default: 0.1, for simpo 2.0)")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset-dir", required=True, help="folder of dataset_info.json, or REMOTE:user/repo of a dataset on the Hub"
    )
    data.add_argument("--dataset", required=True, nargs="+", metavar="NAME", help="names in it; several are mixed")
    data.add_argument("--mix", help="concat, interleave_under or interleave_over (default: concat)")
    data.add_argument(
        "--probs",
        nargs="+",
        type=float,
        metavar="P",
        help="how likely a row is drawn from each dataset; interleaves them",
    )
    data.add_argument("--cutoff-len", type=int, help="most tokens of a row (default: those of the longest)")
    data.add_argument("--max-samples", type=int, default=0, help="only the first rows of each dataset; 0 for all")
    data.add_argument("--output", required=True, help="file to write, .yaml or .yml")
    train = parser.add_argument_group("training")
    train.add_argument("--output-dir", help="folder of what is trained (default: saves/MODEL/FINETUNING/DATASET)")
    train.add_argument("--save-steps", type=int, default=500, help="steps from one checkpoint to the next")
    train.add_argument("--report-to", default="none", help="none, wandb, tensorboard, swanlab, mlflow or trackio")
    train.add_argument("--batch-size", type=int, default=1, help="rows that a device computes at a time")
    train.add_argument("--gradient-accumulation", type=int, default=8, help="batches of a step")
    train.add_argument(
        "--learning-rate", type=float, help="the highest (default: 5e-6; without rejects 1e-4, and 1e-5 for full)"
    )
    train.add_argument("--epochs", type=float, default=3.0, help="passes over the data")
    train.add_argument("--device", default="auto", help="what it will be trained on: cuda, cpu, or auto, what is here")


def _add_keep(proof: argparse._ArgumentGroup) -> None:
    proof.add_argument(
        "--keep",
        nargs="+",
        choices=VERDICTS,
        metavar="VERDICT",
        help="verdicts whose rejects are kept (default: those that prove a reject wrong; sampling counts these always)",
    )


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
        return args.run(args) or 0
    except UserError as error:
        print(f"t2s-pref: {error}", file=sys.stderr)
        return MISTAKEN
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"t2s-pref: {error}; what was found is kept, run the same command again.", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("t2s-pref: interrupted; what was found is kept, run the same command again to go on.", file=sys.stderr)
        return INTERRUPTED

"""What the package ships to be tried on: databases, questions over them, and a small real model that errs."""

import os
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from t2s_pref.chains import CotSummary, cot_summary, explode_cot
from t2s_pref.cot import generate_cot
from t2s_pref.engines import TransformersEngine
from t2s_pref.generate import generate_rejected
from t2s_pref.llamafactory import save_llamafactory
from t2s_pref.load import load_sft
from t2s_pref.pairs import explode_rejected
from t2s_pref.settings import SamplingSettings
from t2s_pref.tally import Summary, summary

# Its answers have some twenty tokens.
DEMO_SETTINGS = SamplingSettings(num_rejects=3, max_new_tokens=128)
DEMO_CANDIDATES = 9

# With reasoning they have some sixty, and fewer rows show as much.
COT_SETTINGS = SamplingSettings(num_rejects=3, max_new_tokens=256, temperature=1.0, answer_format="fenced")
COT_ROWS = 100


class DemoFiles(NamedTuple):
    """Paths of the bundled model, SFT rows, held-out rows, databases (`<db_id>/<db_id>.sqlite`) and the model that
    writes its reasoning, as a policy and as a teacher."""

    model: str
    train: str
    heldout: str
    databases: str
    reasoner: str


def demo_files() -> DemoFiles:
    """Where the bundled files are; `README.md` beside them says how they were made.

    >>> sorted(os.listdir(demo_files().databases))
    ['flights', 'library', 'shop']
    """
    home = Path(__file__).parent / "demo_data"
    return DemoFiles(*(str(home / name) for name in ("model", "train.json", "heldout.json", "databases", "reasoner")))


class DemoRun(NamedTuple):
    """What the demo did and wrote."""

    summaries: tuple[CotSummary | Summary, ...]
    examples: list[dict[str, str]]
    written: list[Path]


def run_demo(output: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> DemoRun:
    """The whole road on the bundled files: load, sample and prove, explode, save SFT and DPO data into `output`."""
    files = demo_files()
    rows = load_sft(files.train)
    sampled = generate_rejected(
        rows,
        TransformersEngine(files.model),
        DEMO_SETTINGS,
        databases=files.databases,
        max_candidates=DEMO_CANDIDATES,
        cache_dir=cache_dir,
    )
    pairs = explode_rejected(sampled, dedup="normalized", cache_dir=cache_dir)
    sft = save_llamafactory(rows, Path(output) / "demo_sft.json")
    dpo = save_llamafactory(pairs, Path(output) / "demo_dpo.json")
    counts = summary(sampled, dedup="normalized", cache_dir=cache_dir)
    return DemoRun((counts,), _examples(pairs), [sft, dpo, dpo.with_name("dataset_info.json")])


def run_cot_demo(output: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> DemoRun:
    """The road with chains of thought: a teacher writes them for the golds, the policy its own, right ones and wrong.

    One bundled model is both; what is saved is SFT data with the teacher's, and pairs whose two sides have reasoning.
    """
    files = demo_files()
    engine = TransformersEngine(files.reasoner)
    rows = load_sft(files.train).select(range(COT_ROWS))
    taught = generate_cot(rows, engine, COT_SETTINGS, databases=files.databases, cache_dir=cache_dir)
    sampled = generate_rejected(
        taught,
        engine,
        COT_SETTINGS,
        databases=files.databases,
        max_candidates=DEMO_CANDIDATES,
        chosen="own_or_gold",
        cache_dir=cache_dir,
    )
    pairs = explode_rejected(sampled, dedup="normalized", chosen="own_or_gold", cache_dir=cache_dir)
    sft = save_llamafactory(explode_cot(taught, cache_dir=cache_dir), Path(output) / "demo_cot_sft.json")
    dpo = save_llamafactory(pairs, Path(output) / "demo_cot_dpo.json")
    counts = summary(sampled, dedup="normalized", chosen="own_or_gold", cache_dir=cache_dir)
    return DemoRun((cot_summary(taught), counts), _examples(pairs), [sft, dpo, dpo.with_name("dataset_info.json")])


def _examples(pairs: Dataset) -> list[dict[str, str]]:
    """Three pairs from all over the dataset, for people."""
    return [
        {
            "question": row["input"].rpartition("Question: ")[2].partition("\n")[0],
            "chosen": row["chosen"],
            "rejected": row["rejected"],
        }
        for row in pairs.select(range(0, len(pairs), max(1, len(pairs) // 3))).take(3)
    ]

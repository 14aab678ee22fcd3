"""What the package ships to be tried on: databases, questions over them, and a small real model that errs."""

import os
from pathlib import Path
from typing import NamedTuple

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


class DemoFiles(NamedTuple):
    """Paths of the bundled model, SFT rows, held-out rows and databases (`<db_id>/<db_id>.sqlite`)."""

    model: str
    train: str
    heldout: str
    databases: str


def demo_files() -> DemoFiles:
    """Where the bundled files are; `README.md` beside them says how they were made.

    >>> sorted(os.listdir(demo_files().databases))
    ['flights', 'library', 'shop']
    """
    home = Path(__file__).parent / "demo_data"
    return DemoFiles(*(str(home / name) for name in ("model", "train.json", "heldout.json", "databases")))


class DemoRun(NamedTuple):
    """What the demo did and wrote."""

    summary: Summary
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
    examples = [
        {"question": row["input"].rpartition("Question: ")[2], "chosen": row["chosen"], "rejected": row["rejected"]}
        for row in pairs.select(range(0, len(pairs), max(1, len(pairs) // 3))).take(3)
    ]
    counts = summary(sampled, dedup="normalized", cache_dir=cache_dir)
    return DemoRun(counts, examples, [sft, dpo, dpo.with_name("dataset_info.json")])

"""Write tests/golden_candidates.json: what the bundled model's first rows are answered, under SAMPLING_VERSION.

Run it after raising `SAMPLING_VERSION` (or after training another bundled model), never to silence the test: users'
stored samples are keyed by that version, and a change without a new one would serve old samples for new code.

    python scripts/update_golden.py
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from t2s_pref import SamplingSettings, demo_files, generate_rejected, load_sft
from t2s_pref.settings import SAMPLING_VERSION
from t2s_pref.weights import content_hash

GOLDEN = Path(__file__).parent.parent / "tests" / "golden_candidates.json"
SETTINGS = SamplingSettings(num_rejects=3, max_new_tokens=64, temperature=1.0, top_p=0.95)


def candidates() -> dict[str, Any]:
    """The first rows' answers and what was taken out of them, with what they depend on."""
    files = demo_files()
    with tempfile.TemporaryDirectory() as folder:
        rows = load_sft(files.train).select(range(12))
        sampled = generate_rejected(rows, files.model, SETTINGS, keep_raw=True, cache_dir=folder)
        return {
            "sampling_version": SAMPLING_VERSION,
            "model": content_hash(Path(files.model), Path(folder) / "memo.json"),
            "candidates": sampled.select_columns(["raw_answers", "candidate_status", "rejected"]).to_list(),
        }


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(candidates(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {GOLDEN}")

"""How many rejects of the demo are right after all: the pairs' SQL is run on the bundled databases.

python scripts/measure_rejects.py
"""

import tempfile
from pathlib import Path

from train_demo_model import is_right

from t2s_pref import demo_files, explode_rejected, generate_rejected, load_sft
from t2s_pref.demo import DEMO_SETTINGS


def main() -> None:
    """Print the share of pairs whose reject returns the same rows as the gold."""
    files = demo_files()
    with tempfile.TemporaryDirectory() as folder:
        rows = generate_rejected(load_sft(files.train), files.model, DEMO_SETTINGS, cache_dir=folder)
        pairs = explode_rejected(rows, dedup="normalized", cache_dir=folder)
        right = sum(is_right(pair, pair["rejected"], Path(files.databases)) for pair in pairs)
        print(f"{right} of {len(pairs)} rejects ({100 * right / len(pairs):.0f} %) return the rows of their gold")


if __name__ == "__main__":
    main()

"""What the demo's rejects are if nobody proves them: sampled, deduplicated, then run on the bundled databases.

python scripts/measure_rejects.py
"""

import tempfile
from collections import Counter

from t2s_pref import WRONG, demo_files, explode_rejected, generate_rejected, load_sft, verify_rejected
from t2s_pref.demo import DEMO_SETTINGS
from t2s_pref.verdicts import RIGHT, VERDICTS


def main() -> None:
    """Print how many of the rejects that differ from their gold as text are wrong, and how many are right."""
    files = demo_files()
    with tempfile.TemporaryDirectory() as folder:
        rows = generate_rejected(load_sft(files.train), files.model, DEMO_SETTINGS, cache_dir=folder)
        pairs = explode_rejected(rows, dedup="normalized", cache_dir=folder)
        found = Counter(verify_rejected(pairs, files.databases, cache_dir=folder)["verdict"])
    for title, verdicts in (("right", RIGHT), ("proven wrong", WRONG)):
        count = sum(found[verdict] for verdict in verdicts)
        print(f"{count} of {len(pairs)} rejects ({100 * count / len(pairs):.0f} %) are {title}")
    for verdict in VERDICTS:
        if found[verdict]:
            print(f"  {verdict:<20}{found[verdict]:>6}")


if __name__ == "__main__":
    main()

"""What sampling until proven saves: proven pairs for a thousand generated tokens, against a fixed number of candidates.

python benchmarks/adaptive.py [--rows 300] [--num-rejects 3] [--max-candidates 12]

On the bundled questions, model and databases. Counts depend on seeds only, so they are the same on every machine.
"""

import argparse
import tempfile
from dataclasses import replace

from t2s_pref import (
    SamplingSettings,
    TransformersEngine,
    demo_files,
    explode_rejected,
    generate_rejected,
    load_sft,
    verify_rejected,
)


def main() -> None:
    """Print a table of tokens and proven, distinct pairs: fixed with few and with many candidates, and adaptive."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--num-rejects", type=int, default=3, help="proven rejects wanted a row (default: 3)")
    parser.add_argument("--max-candidates", type=int, default=12, help="most candidates a row (default: 12)")
    arguments = parser.parse_args()
    files = demo_files()
    rows = load_sft(files.train)
    rows = rows.select(range(min(arguments.rows, len(rows))))
    engine = TransformersEngine(files.model)
    settings = SamplingSettings(num_rejects=arguments.num_rejects, max_new_tokens=128)
    most = arguments.max_candidates
    print(f"{'':34}{'tokens':>10}{'pairs':>8}{'rows with one':>15}{'pairs/1,000 tokens':>20}")
    with tempfile.TemporaryDirectory() as cache:

        def fixed(candidates: int) -> object:
            sampled = generate_rejected(rows, engine, replace(settings, num_rejects=candidates), cache_dir=cache)
            return verify_rejected(sampled, files.databases, cache_dir=cache)

        runs = {
            f"fixed, {arguments.num_rejects} candidates a row": fixed(arguments.num_rejects),
            f"fixed, {most} candidates a row": fixed(most),
            f"until {arguments.num_rejects} are proven, at most {most}": generate_rejected(
                rows, engine, settings, databases=files.databases, max_candidates=most, cache_dir=cache
            ),
        }
        for name, found in runs.items():
            pairs = explode_rejected(found, dedup="normalized", max_per_row=arguments.num_rejects, cache_dir=cache)
            tokens = sum(map(sum, found["generated_tokens"]))
            with_one = len(set(pairs["source_index"]))
            print(f"{name:34}{tokens:>10,}{len(pairs):>8,}{with_one:>15,}{1000 * len(pairs) / tokens:>20.1f}")


if __name__ == "__main__":
    main()

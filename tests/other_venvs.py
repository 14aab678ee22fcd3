"""Axolotl and Unsloth, each in an environment of its own, for the slow tests.

Both are installed without their dependencies, which bring CUDA, and then with what loading data and a step on a CPU
import. `axolotl train` imports triton and bitsandbytes, so it is not among what these environments can run.
"""

from pathlib import Path

from own_venv import own_venv

AXOLOTL = (
    ("torch==2.13.0",),
    ("--no-deps", "axolotl==0.19.0"),
    (
        "torch==2.13.0",
        "transformers==5.16.1",
        "tokenizers==0.23.1",
        "huggingface_hub==1.17.0",
        "datasets==4.8.4",
        "accelerate==1.13.0",
        "peft==0.20.0",
        "trl==1.9.0",
        "pydantic==2.12.5",
        "typer==0.25.1",
        "posthog==6.7.11",
        "python-dotenv==1.0.1",
        "addict",
        "colorama",
        "fire",
        "numba",
        "pillow",
        "requests",
    ),
)
UNSLOTH = (
    ("torch==2.13.0",),
    ("--no-deps", "unsloth==2026.10.9", "unsloth_zoo==2026.10.9"),
    (
        "torch==2.13.0",
        "transformers==5.17.0",
        "datasets==4.8.5",
        "accelerate==1.15.0",
        "peft==0.21.2",
        "trl==1.15.0",
    ),
)


def axolotl_venv() -> Path:
    """Return the folder of an environment with axolotl; skip the calling test where no index can be reached."""
    return own_venv("axolotl", AXOLOTL)


def unsloth_venv() -> Path:
    """Return the folder of an environment with Unsloth; skip the calling test where no index can be reached."""
    return own_venv("unsloth", UNSLOTH)

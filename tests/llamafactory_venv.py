"""LLaMA-Factory in an environment of its own, for the slow tests."""

from pathlib import Path

from own_venv import own_venv

# The smallest set that trains on a CPU: without --no-deps, LLaMA-Factory brings a web stack and replaces torch.
INSTALLS = (
    ("torch==2.13.0",),
    ("--no-deps", "llamafactory==0.9.5"),
    (
        "torch==2.13.0",
        "transformers==5.6.0",
        "datasets==4.0.0",
        "accelerate==1.11.0",
        "peft==0.18.1",
        "trl==0.24.0",
        "omegaconf",
        "av==16.0.0",
        "matplotlib",
    ),
)
# It imports torchaudio whatever it trains, and torchaudio has no CPU build for every platform: an empty one will do.
EMPTY_MODULES = ("torchaudio",)


def llamafactory_venv() -> Path:
    """Return the folder of an environment with LLaMA-Factory; skip the calling test where no index can be reached."""
    return own_venv("llamafactory", INSTALLS, EMPTY_MODULES)

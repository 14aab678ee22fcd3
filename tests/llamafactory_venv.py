"""LLaMA-Factory in an environment of its own, for the slow tests: made on first use, kept for later ones.

Its pins (transformers, datasets, peft, trl) exclude this package's own stack, so the two never share an environment.
It lies in `$T2S_PREF_TEST_CACHE`, or in `~/.cache/t2s_pref`, and takes about 2 GB there.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

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

# What pip says where it reaches no index at all. Anything else that goes wrong is a failure, not a reason to skip.
NO_INDEX = re.compile(
    r"connection broken by .*^ERROR: .*\(from versions: none\)"
    r"|^ERROR: .*(Max retries exceeded|Read timed out|HTTP error 5\d\d)",
    re.MULTILINE | re.DOTALL,
)


def llamafactory_venv() -> Path:
    """Return the folder of an environment with LLaMA-Factory; skip the calling test where no index can be reached."""
    cache = Path(os.environ.get("T2S_PREF_TEST_CACHE") or Path.home() / ".cache" / "t2s_pref")
    recipe = repr((INSTALLS, EMPTY_MODULES, sys.version, sys.base_prefix, platform.machine()))
    venv = cache / f"llamafactory-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{venv}.lock"):
        # An environment cannot be moved once made, so it is built in its place, and the stamp, written last, tells a
        # whole one from what a killed installation left.
        stamp = venv / "complete"
        if not stamp.exists():
            shutil.rmtree(venv, ignore_errors=True)
            _install(venv)
            stamp.touch()
    return venv


def _install(venv: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", venv], check=True, stdin=subprocess.DEVNULL)
    python = venv / "bin" / "python"
    for arguments in INSTALLS:
        pip = [python, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
        done = subprocess.run(
            pip, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if done.returncode:
            shutil.rmtree(venv)
            if NO_INDEX.search(done.stdout):
                last = done.stdout.strip().splitlines()[-1]
                pytest.skip(f"LLaMA-Factory is not installed yet, and pip reaches no package index: {last}")
            raise RuntimeError(f"pip install {' '.join(arguments)} failed:\n{done.stdout[-5000:]}")
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(where, check=True, text=True, stdout=subprocess.PIPE).stdout.strip())
    for name in EMPTY_MODULES:
        (packages / name).mkdir()
        (packages / name / "__init__.py").touch()

"""Another trainer in an environment of its own, for the slow tests: made on first use, kept for later ones.

Such a trainer's pins exclude this package's own stack, so the two never share an environment. It lies in
`$T2S_PREF_TEST_CACHE`, or in `~/.cache/t2s_pref`, and takes about 2 GB there.
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

# What pip says where it reaches no index at all. Anything else that goes wrong is a failure, not a reason to skip.
NO_INDEX = re.compile(
    r"connection broken by .*^ERROR: .*\(from versions: none\)"
    r"|^ERROR: .*(Max retries exceeded|Read timed out|HTTP error 5\d\d)",
    re.MULTILINE | re.DOTALL,
)


def own_venv(name: str, installs: tuple[tuple[str, ...], ...], empty_modules: tuple[str, ...] = ()) -> Path:
    """Return the folder of an environment made by `pip install` with each of `installs`, in this order.

    `empty_modules` are made as empty packages: what the trainer imports and never uses. Skips the calling test where
    no index can be reached.
    """
    cache = Path(os.environ.get("T2S_PREF_TEST_CACHE") or Path.home() / ".cache" / "t2s_pref")
    recipe = repr((installs, empty_modules, sys.version, sys.base_prefix, platform.machine()))
    venv = cache / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{venv}.lock"):
        # An environment cannot be moved once made, so it is built in its place, and the stamp, written last, tells a
        # whole one from what a killed installation left.
        stamp = venv / "complete"
        if not stamp.exists():
            shutil.rmtree(venv, ignore_errors=True)
            _install(name, venv, installs, empty_modules)
            stamp.touch()
    return venv


def _install(name: str, venv: Path, installs: tuple[tuple[str, ...], ...], empty_modules: tuple[str, ...]) -> None:
    subprocess.run([sys.executable, "-m", "venv", venv], check=True, stdin=subprocess.DEVNULL)
    python = venv / "bin" / "python"
    for arguments in installs:
        pip = [python, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
        done = subprocess.run(
            pip, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if done.returncode:
            shutil.rmtree(venv)
            if NO_INDEX.search(done.stdout):
                last = done.stdout.strip().splitlines()[-1]
                pytest.skip(f"{name} is not installed yet, and pip reaches no package index: {last}")
            raise RuntimeError(f"pip install {' '.join(arguments)} failed:\n{done.stdout[-5000:]}")
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(where, check=True, text=True, stdout=subprocess.PIPE).stdout.strip())
    for module in empty_modules:
        (packages / module).mkdir()
        (packages / module / "__init__.py").touch()

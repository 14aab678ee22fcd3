"""Before `datasets` and `huggingface_hub` are imported: no network, and caches that are the tests' own."""

import os
import shutil
import tempfile

HOME = tempfile.mkdtemp(prefix="t2s_pref-tests-")
for name in ("HF_HUB_CACHE", "HF_ASSETS_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
    os.environ.pop(name, None)  # each would win over HF_HOME
os.environ |= {"HF_HOME": HOME, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def pytest_unconfigure() -> None:
    """Leave nothing behind."""
    shutil.rmtree(HOME, ignore_errors=True)

"""Scripts that push to a stand-in Hub and load from it, each in a process of its own: the clients read the address when
they are imported. Arguments and results are JSON; what a script raises comes back by its kind and its one line.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from loopback_hub import LoopbackHub

REPOSITORY = Path(__file__).parent.parent

HEAD = """
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from t2s_pref import *
import json, sys
from t2s_pref import lineage, patience
from t2s_pref.cleaning import clean_preferences
patience.FIRST_PAUSE, patience.LONGEST_PAUSE = 0.01, 0.05
given, results = json.loads(sys.argv[1]), []

def attempt(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except (UserError, OSError) as error:
        return f"{type(error).__name__}: {error}"

def push(pairs, repo_id="user/pairs", **kwargs):
    done = attempt(push_to_hub, pairs, repo_id, **kwargs)
    results.append(done if type(done) is str else [done.oid, done.pr_url])
"""
TAIL = "\nprint('RESULTS', json.dumps(results))"


def run(
    hub: LoopbackHub, home: Path, script: str, token: str | None = None, offline: bool = False, **given: Any
) -> list[Any]:
    """Run a script that fills `results`; `given` is what it finds there by that name."""
    environment = {**hub.environment(home, token), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", HEAD + script + TAIL, json.dumps(given, default=str)],
        env={**environment, "HF_HUB_OFFLINE": "1"} if offline else environment,
        text=True,
        capture_output=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.rpartition("RESULTS ")[2])

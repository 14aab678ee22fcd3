import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_candidates_do_not_change_without_a_new_sampling_version():
    update = script("update_golden")
    golden, now = json.loads(update.GOLDEN.read_text(encoding="utf-8")), update.candidates()
    assert now["sampling_version"] == golden["sampling_version"], "run scripts/update_golden.py and commit its file"
    assert now["model"] == golden["model"], "another bundled model: run scripts/update_golden.py"
    assert now["candidates"] == golden["candidates"], (
        "the same settings and weights give other candidates: raise SAMPLING_VERSION in t2s_pref/settings.py, then run "
        "scripts/update_golden.py"
    )

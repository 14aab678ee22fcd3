"""Preference pairs for text-to-SQL: the SQL that a model itself writes and gets wrong, beside the SQL that is right.

```python
from t2s_pref import SamplingSettings, explode_rejected, generate_rejected, load_sft, save_llamafactory, summary

rows = load_sft("my_sft.json")
settings = SamplingSettings(num_rejects=4)
rows = generate_rejected(rows, "Qwen/Qwen3-4B-Instruct-2507", settings, databases="my_databases")
pairs = explode_rejected(rows, dedup="normalized")
save_llamafactory(pairs, "my_dpo.json")
print(summary(rows, dedup="normalized"))
```
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t2s_pref.accuracy import Evaluation, evaluate
    from t2s_pref.audit import Audit, audit_golds
    from t2s_pref.chains import CotSummary, cot_summary, explode_cot
    from t2s_pref.chat import ChatEngine
    from t2s_pref.continuous import ContinuousEngine
    from t2s_pref.cot import generate_cot
    from t2s_pref.demo import demo_files
    from t2s_pref.endpoint import EndpointEngine
    from t2s_pref.engines import TransformersEngine
    from t2s_pref.errors import UserError
    from t2s_pref.formats import FORMATS
    from t2s_pref.generate import generate_rejected
    from t2s_pref.hub import push_to_hub
    from t2s_pref.layouts import to_trl
    from t2s_pref.llamafactory import save_llamafactory
    from t2s_pref.load import load_sft
    from t2s_pref.models import release_models
    from t2s_pref.pairs import explode_rejected
    from t2s_pref.preferences import load_pairs
    from t2s_pref.rounds import merge_pairs
    from t2s_pref.settings import SamplingSettings
    from t2s_pref.splits import split_by_prompt
    from t2s_pref.tally import Summary, summary
    from t2s_pref.training import write_dpo_config, write_sft_config
    from t2s_pref.verdicts import WRONG
    from t2s_pref.verify import verify_rejected

__version__ = "0.1.0"

__all__ = [
    "FORMATS",
    "WRONG",
    "Audit",
    "ChatEngine",
    "ContinuousEngine",
    "CotSummary",
    "EndpointEngine",
    "Evaluation",
    "SamplingSettings",
    "Summary",
    "TransformersEngine",
    "UserError",
    "audit_golds",
    "cot_summary",
    "demo_files",
    "evaluate",
    "explode_cot",
    "explode_rejected",
    "generate_cot",
    "generate_rejected",
    "load_pairs",
    "load_sft",
    "merge_pairs",
    "push_to_hub",
    "release_models",
    "save_llamafactory",
    "split_by_prompt",
    "summary",
    "to_trl",
    "verify_rejected",
    "write_dpo_config",
    "write_sft_config",
]

_HOME = {
    "FORMATS": "formats",
    "WRONG": "verdicts",
    "Audit": "audit",
    "ChatEngine": "chat",
    "ContinuousEngine": "continuous",
    "CotSummary": "chains",
    "EndpointEngine": "endpoint",
    "Evaluation": "accuracy",
    "SamplingSettings": "settings",
    "Summary": "tally",
    "TransformersEngine": "engines",
    "UserError": "errors",
    "audit_golds": "audit",
    "cot_summary": "chains",
    "demo_files": "demo",
    "evaluate": "accuracy",
    "explode_cot": "chains",
    "explode_rejected": "pairs",
    "generate_cot": "cot",
    "generate_rejected": "generate",
    "load_pairs": "preferences",
    "load_sft": "load",
    "merge_pairs": "rounds",
    "push_to_hub": "hub",
    "release_models": "models",
    "save_llamafactory": "llamafactory",
    "split_by_prompt": "splits",
    "summary": "tally",
    "to_trl": "layouts",
    "verify_rejected": "verify",
    "write_dpo_config": "training",
    "write_sft_config": "training",
}


def __getattr__(name: str) -> Any:
    """Import what is first asked for: `import t2s_pref` costs nothing, and a name brings only what it needs."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

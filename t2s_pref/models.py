"""Models: on which device and in which type, whether they fit, loaded and adapted, and what identifies one in hand.

torch, transformers and peft are imported when a function here needs them.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from t2s_pref import ranks
from t2s_pref.errors import UserError, one_line
from t2s_pref.weights import Source, hash_parts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from t2s_pref.kv import Beginnings

logger = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A model that is ready to sample from, its tokenizer, what it was loaded from, and what it has read before."""

    key: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    beginnings: Beginnings | None


# The last model loaded: an engine of the same weights takes it over.
_loaded: Loaded | None = None


def release_models() -> None:
    """Forget the model that is kept between calls and give its memory back."""
    global _loaded
    if _loaded is not None:
        _loaded = None
        free_cached_memory()


def free_cached_memory() -> None:
    """Give back what Python and the CUDA allocator hold without need."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# -- device and dtype ------------------------------------------------------------------------------------------------


def check_device(device: str) -> None:
    """Refuse anything but `auto`, `cpu`, `cuda` and `cuda:N`."""
    kind, colon, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (colon and (kind != "cuda" or not number.isdigit())):
        raise UserError(f"device is {device!r}; it must be auto, cpu, cuda or cuda:N.")


def resolve_device(device: str) -> str:
    """The device that `device` means on this machine and in this rank: `cpu`, `cuda` or `cuda:N`."""
    if device == "cpu":
        return "cpu"
    import torch

    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not available:
        return "cpu"
    if ranks.world_size() > 1:
        return str(ranks.state().device)
    if ":" in device and int(device.partition(":")[2]) >= available:
        raise UserError(f"device is {device!r}, but the GPUs are cuda:0 to cuda:{available - 1}.")
    return device if ":" in device else "cuda"


def resolve_dtype(dtype: str, device: str) -> str:
    """`auto` is bfloat16 on CUDA and float32 on a CPU, where it is faster and exact."""
    if dtype != "auto":
        return dtype
    return "float32" if device == "cpu" else "bfloat16"


# -- loading ---------------------------------------------------------------------------------------------------------


def load(base: Source, adapter: Source | None, dtype: str, device: str, trust_remote_code: bool) -> Loaded:
    """The model of these weights: the one kept from the last call, or read and kept.

    Raises:
        [`UserError`]: where weights or adapter are broken, do not fit each other, or do not fit the memory.
    """
    global _loaded
    key = json.dumps([base.identity, adapter and adapter.identity, dtype, device])
    if _loaded is None or _loaded.key != key:
        release_models()
        model, tokenizer = _read(base, dtype, device, trust_remote_code)
        if adapter is not None:
            model = _adapted(model, adapter, base.name)
        from t2s_pref.kv import Beginnings

        _loaded = Loaded(key, model.eval(), tokenizer, Beginnings())
    return _loaded


def _read(
    base: Source, dtype: str, device: str, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"revision": base.revision, "trust_remote_code": trust_remote_code}
    try:
        placement = _place(base.name, where, getattr(torch, dtype), device)
        tokenizer = AutoTokenizer.from_pretrained(base.name, **where)
        model, report = AutoModelForCausalLM.from_pretrained(
            base.name, dtype=getattr(torch, dtype), device_map=placement, output_loading_info=True, **where
        )
    except UserError:
        raise
    except Exception as error:  # each file format fails in its own way
        hint = "; --trust-remote-code runs the code that comes with it" if "trust_remote_code" in str(error) else ""
        raise UserError(f"Base model {base.name!r} cannot be loaded: {one_line(error)}{hint}") from error
    if missing := sorted(report["missing_keys"]):
        # transformers makes these up at random
        raise UserError(
            f"Base model {base.name!r} cannot be loaded: its files lack {len(missing)} weights, {missing[0]!r} among "
            "them."
        )
    if not tokenizer("SELECT", add_special_tokens=False)["input_ids"]:
        # transformers makes up a tokenizer without words
        raise UserError(f"Base model {base.name!r} cannot be loaded: its tokenizer files are missing.")
    return model, tokenizer


def _place(name: str, where: dict[str, Any], dtype: torch.dtype, device: str) -> str | dict[str, str]:
    """The `device_map`, from the weights' size against free memory, before anything large is read."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(name, **where)
    if getattr(config, "quantization_config", None) is not None:
        # its size is known to the quantiser alone, which places it over what there is
        return "auto" if device == "cuda" else {"": device}
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=where["trust_remote_code"])
    empty.tie_weights()
    needed = sum(weight.numel() for weight in empty.parameters()) * dtype.itemsize
    free, everywhere = free_memory(device), 0
    if device == "cuda" and ranks.world_size() == 1:  # one rank has one GPU; a single process may use all
        everywhere = sum(free_memory(f"cuda:{number}") for number in range(torch.cuda.device_count()))
    if needed < free:
        return {"": device}
    if needed < everywhere:
        return "auto"
    smaller = "" if dtype.itemsize == 2 else "--dtype bfloat16, "
    more = "" if device == "cpu" else "more GPUs in one process, --device cpu, "
    raise UserError(
        f"{name!r} needs {needed / 1e9:.1f} GB for its weights in {str(dtype)[6:]}, and "
        f"{max(free, everywhere) / 1e9:.1f} GB are free on {device}; use {smaller}{more}or a smaller model."
    )


def free_memory(device: str) -> int:
    """Bytes that are free on `device`."""
    if device == "cpu":
        import psutil

        return psutil.virtual_memory().available
    import torch

    return torch.cuda.mem_get_info(device)[0]


def token_bytes(model: PreTrainedModel) -> int:
    """Bytes of keys and values of one token, from the model's config."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None) or 1  # none where all layers are recurrent
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    return 2 * config.num_hidden_layers * kept * width * model.dtype.itemsize


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model as it answers; one in hand may be in the middle of its training, or parts of it."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _adapted(model: PreTrainedModel, adapter: Source, base_name: str) -> PreTrainedModel:
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    try:
        weights = load_peft_weights(adapter.name, device="cpu", revision=adapter.revision)
        model = PeftModel.from_pretrained(model, adapter.name, revision=adapter.revision)
        kind = model.peft_config["default"]
        expected = get_peft_model_state_dict(model)
    except Exception as error:  # peft raises what torch, safetensors and its own checks raise
        raise UserError(
            f"Adapter {adapter.name!r} is broken or does not fit {base_name!r}: {one_line(error)}"
        ) from error
    if kind.is_prompt_learning:  # it would be put before every token, not before the prompt
        raise UserError(
            f"Adapter {adapter.name!r} is of type {kind.peft_type.value}; only LoRA and its like are supported."
        )
    # peft leaves out what it cannot place and says so in a warning at most
    if strange := sorted(set(weights) ^ set(expected)):
        raise UserError(
            f"Adapter {adapter.name!r} does not fit {base_name!r}: {len(strange)} weights have no counterpart, "
            f"{strange[0]!r} among them; it was trained on another base model."
        )
    return model


# -- a model in hand -------------------------------------------------------------------------------------------------


def hash_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of a model in hand, through its weights: they may have been trained since the last call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = {"vocab": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
    words |= {"truncation": None, "padding": None}  # those of the last call
    adapters = {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}
    # which adapters are on, and how strongly, is said layer by layer
    adapters["layers"] = [
        (name, layer.active_adapters, layer.disable_adapters, getattr(layer, "scaling", None))
        for name, layer in (model.named_modules() if adapters else ())
        if isinstance(getattr(layer, "disable_adapters", None), bool)
    ]
    settings = [words, tokenizer.chat_template, model.config.to_dict(), adapters]
    weights = model.state_dict()
    return hash_parts(
        [json.dumps([settings, end_tokens(model, tokenizer)], sort_keys=True, default=_plain).encode()]
        + [part for name in sorted(weights) for part in _bytes_of(name, weights[name])]
    )


def _plain(value: Any) -> Any:
    # a set is written in an order that changes from process to process
    return sorted(value) if isinstance(value, set) else str(value)


def _bytes_of(name: str, weight: torch.Tensor) -> list[bytes]:
    import torch

    raw = weight.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    return [f"{name} {weight.dtype} {tuple(weight.shape)}".encode(), memoryview(raw)]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """What ends an answer: the one thing that is taken from the model's generation_config."""
    ends: set[int] = set()
    for value in (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id):
        ends.update(value if isinstance(value, list) else [] if value is None else [value])
    return ends

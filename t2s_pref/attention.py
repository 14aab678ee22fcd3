"""Attention around shared beginnings: their keys and values are stored once and met by all sequences in one product.

Hydragen's decomposition (Juravsky et al., arXiv 2402.05099): the queries of all sequences meet the shared keys in one
matrix product, each sequence meets its own keys in another, and the two parts are joined by their log-sum-exp, which is
exact. It hooks into transformers' own attention interface, so the models stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from threading import RLock
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from t2s_pref.kv import Beginning

NAME = "t2s_pref_shared"

# For what must not be seen. Finite, because a row of nothing but -inf would become NaN; within what float16 can hold.
HIDDEN = -6e4


@dataclass(frozen=True)
class Sharing:
    """Which sequences of the step share which beginning; `members` (`[n]` int64) is `None` for all of them."""

    beginning: Beginning
    members: torch.Tensor | None


# What the attention of this thread works on; `None` while prompts are read, which is ordinary attention.
_step: ContextVar[Sequence[Sharing] | None] = ContextVar("t2s_pref_step", default=None)


_switching = RLock()


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model below an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def attention_of(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The model with another attention implementation, put back at the end; one thread at a time has it."""
    base = base_of(model)
    with _switching:
        before = base.config._attn_implementation
        if before == name:
            yield
            return
        base.set_attn_implementation(name)
        try:
            yield
        finally:
            base.set_attn_implementation(before)


@contextmanager
def decoding(sharings: Sequence[Sharing]) -> Iterator[None]:
    """A step of decoding: sequences beside the beginnings that they share."""
    token = _step.set(sharings)
    try:
        yield
    finally:
        _step.reset(token)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    sharings = _step.get()
    if sharings is None:
        # a mask of one element says: nothing but causal
        mask = None if attention_mask is None or attention_mask.numel() == 1 else attention_mask
        kwargs.pop("is_causal", None)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=scaling, **kwargs)
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise NotImplementedError("an attention variant that does not split into parts")
    sequences, heads, _, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    # the query heads that share a key head side by side
    query = query.reshape(sequences, key.shape[1], -1, width)
    own, own_weight = _part(query, key, value, scale, attention_mask)
    joined = own.float()
    for sharing in sharings:
        if not sharing.beginning.tokens:
            continue
        layer = sharing.beginning.layers[module.layer_idx]
        members = None if sharing.members is None else sharing.members.to(query.device)
        part = query if members is None else query[members]
        shared, weight = (
            each.unflatten(2, (len(part), -1)).squeeze(0).transpose(0, 1)
            for each in _part(part.transpose(0, 1).flatten(1, 2)[None], layer.keys, layer.values, scale, None)
        )
        if members is None:
            joined = torch.lerp(joined, shared.float(), torch.sigmoid(weight - own_weight))
        else:
            share = torch.sigmoid(weight - own_weight[members])
            joined[members] = torch.lerp(joined[members], shared.float(), share)
    return joined.to(query.dtype).reshape(sequences, 1, heads, -1), None


def _part(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of `[n, heads, queries, width]` over one set of keys: the output, and the log-sum-exp of the scores."""
    if mask is None and query.device.type == "cpu" and _flash_on_cpu():
        output, weight = _FLASH(query, key, value, 0.0, False, scale=scale)
        return output, weight[..., None]
    scores = (query @ key.transpose(2, 3)).float().mul_(scale)
    if mask is not None:
        scores += mask
    weight = scores.logsumexp(-1, keepdim=True)
    return scores.sub_(weight).exp_().to(value.dtype) @ value, weight


# Torch's own kernel behind scaled_dot_product_attention, which alone also returns the log-sum-exp. It is not public: it
# is used where it is there and does what it did, and the plain products above where not. The one for CUDA has never
# been measured here, so CUDA takes the plain products.
_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


@lru_cache(maxsize=1)
def _flash_on_cpu() -> bool:
    if _FLASH is None:
        return False
    query, key, value = (torch.linspace(-1, 1, 2 * tokens * 8).reshape(1, 2, tokens, 8) for tokens in (3, 5, 5))
    try:
        output, weight = _FLASH(query, key, value, 0.0, False, scale=0.5)
    except RuntimeError:
        return False
    scores = query @ key.transpose(2, 3) * 0.5
    expected = scores.logsumexp(-1)
    if weight.shape != expected.shape or not torch.allclose(weight, expected, atol=1e-5):
        return False
    return torch.allclose(output, scores.softmax(-1) @ value, atol=1e-5)


AttentionInterface.register(NAME, _attend)

"""Which way of decoding a model can do, found out by trying: what it would get wrong silently is never used.

Three ways give the same tokens in float32, the fastest first:

- `SHARED`: what prompts have in common is held once, and attention joins it with each sequence's own part;
- `COPIED`: what prompts have in common is read once and copied for each sequence, and attention is the model's own;
- `GENERATE`: transformers' own generation, one prompt at a time with its candidates: sliding windows, recurrent states,
  and whatever else the others do not know.
"""

from __future__ import annotations

import logging

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from t2s_pref.attention import base_of
from t2s_pref.choice import Sampling, candidate_key
from t2s_pref.decoding import Decoder, Ends, out_of_memory
from t2s_pref.errors import one_line
from t2s_pref.protocol import Request
from t2s_pref.reading import forward_takes

logger = logging.getLogger(__name__)

SHARED, COPIED, GENERATE = "shared", "copied", "generate"
WORDS = {
    SHARED: "prompts' common beginnings held once",
    COPIED: "prompts' common beginnings read once and copied",
    GENERATE: "transformers' generate, prompt by prompt",
}

# Architectures whose tokens under SHARED are shown by a test to be those of a plain forward pass. Not knowing one costs
# speed; a wrong one would cost the truth, which the check at start-up is there to see too.
SHARING = frozenset(
    {
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "llama",
        "mistral",
        "mixtral",
        "phi",
        "phi3",
        "gemma",
        "granite",
        "olmo",
        "olmo2",
        "starcoder2",
        "stablelm",
        "cohere",
        "glm",
        "glm4",
        "smollm3",
        "ernie4_5",
        "seed_oss",
    }
)

# How far logits may be from a plain forward pass, as a share of their own spread. What attends to a part of the prompt
# only is off by about as much as they spread.
EXACT, ROUNDED = 1e-3, 0.2


def method_of(model: PreTrainedModel) -> str:
    """The fastest way of decoding that is right for this model."""
    if not _plain_attention(model):
        return GENERATE
    tries = (SHARED, COPIED) if base_of(model).config.model_type in SHARING else (COPIED,)
    for method in tries:
        try:
            found = difference(model, method)
        except Exception as error:  # a model that does not take what it is given fails in its own way
            if out_of_memory(error):
                raise
            logger.warning("%s: %s does not work here (%s).", type(model).__name__, WORDS[method], one_line(error))
            continue
        if found <= (EXACT if is_exact(model) else ROUNDED):
            return method
        logger.warning("%s: %s gives other logits (off by %.2g).", type(model).__name__, WORDS[method], found)
    return GENERATE


def is_exact(model: PreTrainedModel) -> bool:
    """Whether logits are the same whatever is computed beside them, but for the last bits of float32."""
    if getattr(base_of(model), "is_quantized", False) or torch.is_autocast_enabled():
        return False
    return all(weight.dtype == torch.float32 for weight in model.parameters() if weight.is_floating_point())


def _plain_attention(model: PreTrainedModel) -> bool:
    """Whether every layer keeps all keys and values of all tokens and nothing else, each by its own position alone."""
    if not all(forward_takes(model, name) for name in ("past_key_values", "position_ids", "attention_mask")):
        return False
    config = base_of(model).config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):  # its angles depend on the longest sequence of a batch
        return False
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


@torch.inference_mode()
def difference(model: PreTrainedModel, method: str) -> float:
    """How far the logits of a few tokens, drawn by `method`, are from those of plain forward passes."""
    words = base_of(model).config.get_text_config(decoder=True).vocab_size
    tokens = [(number * 7919 + 11) % words for number in range(34)]
    prompts = (tokens[:21], tokens[:16] + tokens[21:34], tokens[1:9])
    asked = [
        Request(prompt, row, [0, 1], 3, shared)
        for row, prompt, shared in zip(range(3), prompts, (16, 16, 7), strict=True)
    ]
    seen: dict[tuple[int, int], torch.Tensor] = {}

    def choose(logits, keys, steps, *_):
        drawn = (keys.abs() % 97 + 13 * steps) % words
        for key, step, row in zip(keys.tolist(), steps.tolist(), logits.float(), strict=True):
            seen[key, step] = row
        return drawn, None

    decoder = Decoder(model, method == SHARED)
    decoder.choose = choose
    drawn = list(decoder.draw(asked, Sampling(0), Ends(frozenset()), 1 << 12))
    worst = 0.0
    for place, candidate, answer, _ in drawn:
        prompt = prompts[place]
        ids = torch.tensor([[*prompt, *answer[:-1]]], device=decoder.device)
        plain = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float()
        key = candidate_key(place, candidate)
        ours = torch.stack([seen[key, step].to(plain.device) for step in range(len(answer))])
        worst = max(worst, ((ours - plain).norm() / (plain - plain.mean(-1, keepdim=True)).norm()).item())
    return worst

"""Draw the candidates of a batch: one prefill a row, the cache expanded to its candidates, noise of each one's own.

The only module that imports torch at its top; the engine imports it when it first samples.
"""

import hashlib
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import DynamicCache, PreTrainedModel

# Logits are ranked this far before the whole vocabulary is sorted; a wider nucleus is rare and still drawn exactly.
WIDTH = 256


@dataclass(frozen=True)
class Request:
    """Candidates to draw of one row: its prompt's token ids, its seed, their numbers, and the most tokens of each."""

    prompt: Sequence[int]
    row_seed: int
    candidates: Sequence[int]
    cap: int


@dataclass(frozen=True)
class Drawn:
    """The token ids of one candidate, without the end token; `ended` is False where the length cap cut it."""

    tokens: list[int]
    ended: bool


# -- noise -----------------------------------------------------------------------------------------------------------


def candidate_key(row_seed: int, candidate: int) -> int:
    """The 64-bit key of one candidate's noise, as a signed integer, which is what torch can hold."""
    digest = hashlib.blake2b(f"{row_seed}|{candidate}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): int64 wraps as needed, the masks undo sign extension."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniform_noise(keys: torch.Tensor, steps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in (0, 1) that depend on (key, step, token) and on nothing else.

    Args:
        keys: `[n]` int64, of `candidate_key`.
        steps: `[n]` int64, the position in the answer.
        tokens: `[n, m]` int64 token ids.

    Returns:
        `[n, m]` float64.
    """
    bits = _mix(_mix(keys + steps * -0x61C8864680B583EB)[:, None] + tokens * -0x2E4AB5CD2E6D12FD)
    return (((bits >> 11) & ((1 << 53) - 1)).double() + 0.5) / (1 << 53)


# -- one token -------------------------------------------------------------------------------------------------------


def choose(
    logits: torch.Tensor, keys: torch.Tensor, steps: torch.Tensor, temperature: float, top_p: float
) -> torch.Tensor:
    """The next token of each sequence: `[n, vocabulary]` logits to `[n]` token ids.

    Temperature first, then the nucleus (Holtzman et al., arXiv 1904.09751): the likeliest tokens up to and including
    the one that brings their probability to `top_p`. The draw adds Gumbel noise and takes the largest, so that the same
    noise gives the same token whatever else is in the batch.
    """
    scores = logits.float()
    if temperature == 0:
        return scores.argmax(-1)
    scores = scores / temperature
    if top_p >= 1:
        tokens = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
        return (scores.double() + _gumbel(keys, steps, tokens)).argmax(-1)
    normaliser = scores.logsumexp(-1, keepdim=True)
    top, tokens = scores.topk(min(WIDTH, scores.shape[-1]), -1)
    chosen, mass = _draw(top, tokens, normaliser, keys, steps, top_p)
    # what the ranked part leaves out belongs to the nucleus too where it does not reach top_p
    wide = (mass < top_p).nonzero()[:, 0] if top.shape[-1] < scores.shape[-1] else []
    if len(wide):
        top, tokens = scores[wide].sort(-1, descending=True)
        chosen[wide] = _draw(top, tokens, normaliser[wide], keys[wide], steps[wide], top_p)[0]
    return chosen


def _draw(
    top: torch.Tensor,
    tokens: torch.Tensor,
    normaliser: torch.Tensor,
    keys: torch.Tensor,
    steps: torch.Tensor,
    top_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw from scores in descending order; also the probability that they hold together."""
    likelihood = (top - normaliser).exp()
    before = likelihood.cumsum(-1) - likelihood
    outside = before >= top_p
    outside[:, 0] = False
    top = top.masked_fill(outside, float("-inf"))
    best = (top.double() + _gumbel(keys, steps, tokens)).argmax(-1, keepdim=True)
    return tokens.gather(1, best)[:, 0], before[:, -1] + likelihood[:, -1]


def _gumbel(keys: torch.Tensor, steps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return -torch.log(-torch.log(uniform_noise(keys, steps, tokens)))


# -- a batch ---------------------------------------------------------------------------------------------------------


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that an allocation failed, on a GPU or in main memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and any(text in str(error) for text in ("out of memory", "can't allocate memory", "not enough memory"))
    )


def halve(requests: Sequence[Request]) -> tuple[list[Request], list[Request]]:
    """Two batches of half the rows each, or of half the candidates where there is only one row."""
    if len(requests) > 1:
        middle = len(requests) // 2
        return list(requests[:middle]), list(requests[middle:])
    only, middle = requests[0], len(requests[0].candidates) // 2
    return (
        [replace(only, candidates=only.candidates[:middle])],
        [replace(only, candidates=only.candidates[middle:])],
    )


def forward_takes(model: PreTrainedModel, argument: str) -> bool:
    """Whether the model's forward, below an adapter if there is one, has this argument."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return argument in inspect.signature(base.forward).parameters


@torch.inference_mode()
def draw(
    model: PreTrainedModel,
    requests: Sequence[Request],
    *,
    temperature: float,
    top_p: float,
    end_tokens: Iterable[int],
    pad_token: int,
) -> list[list[Drawn]]:
    """Draw every candidate of `requests` in one batch.

    Returns:
        For each request, in order, a [`Drawn`] for each of its candidates, in order.
    """
    device = model.get_input_embeddings().weight.device
    width = max(len(request.prompt) for request in requests)
    # Padding on the left: all sequences then write their next token at the same place of the cache.
    ids = [[pad_token] * (width - len(request.prompt)) + list(request.prompt) for request in requests]
    mask = [[0] * (width - len(request.prompt)) + [1] * len(request.prompt) for request in requests]
    ids, mask = torch.tensor(ids, device=device), torch.tensor(mask, device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        # the others would be [rows, prompt, vocabulary]: gigabytes that nobody reads
        **({"logits_to_keep": 1} if forward_takes(model, "logits_to_keep") else {}),
    )

    # From one sequence a row to one a candidate.
    owner = [(row, place) for row, request in enumerate(requests) for place in range(len(request.candidates))]
    row_of = torch.tensor([row for row, _ in owner], device=device)
    cache.reorder_cache(row_of)
    logits, mask, position = output.logits[row_of, -1], mask[row_of], positions[row_of, -1]
    keys = torch.tensor([candidate_key(requests[r].row_seed, requests[r].candidates[p]) for r, p in owner])
    keys = keys.to(device)
    caps = torch.tensor([requests[row].cap for row, _ in owner], device=device)
    ends = torch.tensor(sorted(set(end_tokens)), device=device)
    steps = torch.zeros_like(caps)
    alive = torch.arange(len(owner), device=device)  # which candidate each sequence of the batch is

    written: list[list[int]] = [[] for _ in owner]
    ended = [False] * len(owner)
    while True:
        token = choose(logits, keys, steps, temperature, top_p)
        steps = steps + 1
        end = torch.isin(token, ends)
        for candidate, value, is_end in zip(alive.tolist(), token.tolist(), end.tolist(), strict=True):
            if is_end:
                ended[candidate] = True
            else:
                written[candidate].append(value)
        keep = (~(end | (steps >= caps))).nonzero()[:, 0]
        if len(keep) == 0:
            break
        if len(keep) < len(alive):  # what has ended costs nothing more
            cache.reorder_cache(keep)
            alive, keys, caps, steps = alive[keep], keys[keep], caps[keep], steps[keep]
            token, mask, position = token[keep], mask[keep], position[keep]
        position = position + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
        logits = model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=position[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]

    drawn: list[list[Drawn]] = [[] for _ in requests]
    for candidate, (row, _) in enumerate(owner):
        drawn[row].append(Drawn(written[candidate], ended[candidate]))
    return drawn

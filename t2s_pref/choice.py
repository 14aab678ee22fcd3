"""The next token: exact temperature, top-k, top-p and repetition penalty, with noise of each candidate's own.

The noise is counter-based: it depends on (row seed, candidate, step, token) and on nothing else, so a candidate is the
same whatever is decoded beside it. One token costs no sort of the whole vocabulary but where the nucleus is very wide.
"""

from dataclasses import dataclass

import torch

from t2s_pref.protocol import candidate_digest
from t2s_pref.settings import SamplingSettings

# Logits are ranked this far, and where the nucleus is wider, which is rare, farther, up to the whole vocabulary.
WIDTH = 256
FARTHER = 4096

# On a CPU, so many logits are looked at together: they stay in its cache from one operation to the next.
AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the part of `SamplingSettings` that a step needs."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, settings: SamplingSettings) -> "Sampling":
        """That part."""
        return cls(settings.temperature, settings.top_p, settings.top_k, settings.repetition_penalty)


def candidate_key(row_seed: int, candidate: int) -> int:
    """The 64-bit key of one candidate's noise, as a signed integer, which is what torch can hold."""
    return int.from_bytes(candidate_digest(row_seed, candidate), "big", signed=True)


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


def choose(
    logits: torch.Tensor,
    keys: torch.Tensor,
    steps: torch.Tensor,
    sampling: Sampling,
    seen: torch.Tensor | None = None,
    sort: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The next token of each sequence.

    Temperature first, then the `top_k` likeliest tokens, then of these the nucleus (Holtzman et al., arXiv 1904.09751):
    the likeliest up to and including the one that brings their probability to `top_p`. The draw adds Gumbel noise and
    takes the largest, so that the same noise gives the same token whatever else is in the batch.

    Args:
        logits: `[n, vocabulary]`.
        keys, steps: `[n]` int64: the noise of each sequence, and how many tokens it has.
        seen: `[n, vocabulary]` bool, the tokens of prompt and answer; needed where there is a repetition penalty.
        sort: `[m]` int64, the sequences whose nucleus may be wider than `WIDTH` tokens: of these the whole vocabulary
            is sorted. `None` finds out which they are; on a GPU, that waits for it.

    Returns:
        `[n]` token ids; and `[n]` bool, which of them are not valid, because their nucleus is wider than `WIDTH` tokens
        and they were not in `sort`. `None` where all are valid.
    """
    if logits.device.type == "cpu" and logits.numel() > AT_ONCE and len(logits) > 1 and sort is None:
        half = len(logits) // 2
        parts = [
            choose(logits[part], keys[part], steps[part], sampling, None if seen is None else seen[part])[0]
            for part in (slice(half), slice(half, None))
        ]
        return torch.cat(parts), None
    scores = logits.float()
    if sampling.repetition_penalty != 1:
        penalised = torch.where(scores > 0, scores / sampling.repetition_penalty, scores * sampling.repetition_penalty)
        scores = torch.where(seen, penalised, scores)
    if sampling.temperature == 0:
        return scores.argmax(-1), None
    scores = scores / sampling.temperature
    vocabulary = scores.shape[-1]
    top_k = sampling.top_k if 0 < sampling.top_k < vocabulary else 0
    if sampling.top_p >= 1 and not top_k:
        tokens = torch.arange(vocabulary, device=scores.device).expand_as(scores)
        return (scores.double() + _gumbel(keys, steps, tokens)).argmax(-1), None
    top, tokens = scores.topk(top_k or min(WIDTH, vocabulary), -1)
    normaliser = (top if top_k else scores).logsumexp(-1, keepdim=True)
    chosen, mass = _draw(top, tokens, normaliser, keys, steps, sampling.top_p)
    if top.shape[-1] == (top_k or vocabulary):
        return chosen, None
    # what the ranked part leaves out belongs to the nucleus too where that does not reach top_p
    wide = mass < sampling.top_p

    def draw_again(rows: torch.Tensor, width: int) -> torch.Tensor:
        """Draw these sequences from their `width` likeliest tokens; those that need still more."""
        part = scores[rows]
        top, tokens = part.topk(width, -1) if width < vocabulary else part.sort(-1, descending=True)
        chosen[rows], mass = _draw(top, tokens, normaliser[rows], keys[rows], steps[rows], sampling.top_p)
        return mass < sampling.top_p

    if sort is not None:
        if len(sort):
            draw_again(sort, vocabulary)
            wide = wide.index_fill(0, sort, False)
        return chosen, wide
    rows = wide.nonzero()[:, 0]
    if len(rows) and vocabulary > FARTHER:
        rows = rows[draw_again(rows, FARTHER)]
    if len(rows):
        draw_again(rows, vocabulary)
    return chosen, None


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

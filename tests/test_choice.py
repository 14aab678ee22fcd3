"""What the choice of a token promises: the distribution that was asked for, and noise of its own for each candidate."""

import math

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from t2s_pref import choice
from t2s_pref.choice import Sampling, candidate_key, choose, uniform_noise


def distribution_of(logits, sampling, seen=()):
    """What should be drawn from, by transformers' own processors, in their order."""
    ids, scores = torch.tensor([list(seen)], dtype=torch.long), logits[None].double()
    if sampling.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores)
    scores = scores / sampling.temperature
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    return scores.softmax(-1)[0]


def drawn(logits, sampling, seed, draws, step=11, seen=()):
    """How often each token is drawn."""
    keys = torch.tensor([candidate_key(seed, candidate) for candidate in range(draws)])
    mask = torch.zeros(len(logits), dtype=torch.bool)
    mask[list(seen)] = True
    rows = logits.expand(draws, -1)
    tokens, unsure = choose(rows, keys, torch.full_like(keys, step), sampling, mask.expand(draws, -1))
    assert unsure is None
    return tokens.bincount(minlength=len(logits)).double()


def chi_square_is_plausible(counts, expected):
    """Within five standard deviations of its mean; tokens of few expected draws are counted with their neighbours."""
    assert counts[expected == 0].sum() == 0
    cells = (expected.cumsum(0) / 20).long()
    cells[expected >= 20] = cells.max() + 1 + torch.arange(int((expected >= 20).sum()))
    observed, wanted = (torch.zeros(int(cells.max()) + 1).double().index_add(0, cells, x) for x in (counts, expected))
    observed, wanted = observed[wanted > 5], wanted[wanted > 5]
    statistic = ((observed - wanted) ** 2 / wanted).sum().item()
    freedom = len(wanted) - 1
    assert freedom > 0
    return abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


CASES = {
    "few tokens": (50, 2.0, Sampling(0.7, 0.9)),
    "many tokens": (600, 1.0, Sampling(1.3, 0.95)),
    "no nucleus": (600, 1.0, Sampling(1.0)),
    "a nucleus wider than what is ranked": (2000, 0.3, Sampling(1.0, 0.99)),
    "a nucleus wider than what is ranked then": (6000, 0.1, Sampling(1.0, 0.97)),
    "top k": (600, 1.0, Sampling(1.0, 1.0, 20)),
    "a nucleus of the top k": (600, 1.0, Sampling(0.9, 0.8, 300)),
    "more than there are": (40, 1.0, Sampling(0.9, 0.8, 300)),
    "a repetition penalty": (60, 2.0, Sampling(1.0, 0.95, 0, 1.3)),
    "everything": (600, 2.0, Sampling(1.1, 0.9, 30, 1.5)),
}


@pytest.mark.parametrize("seed", [1234, 7, -5])
@pytest.mark.parametrize("case", CASES)
def test_tokens_are_drawn_from_the_distribution_that_was_asked_for(seed, case):
    vocabulary, spread, sampling = CASES[case]
    draws = 4_000 if vocabulary > 1000 else 12_000
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(3)) * spread
    seen = logits.topk(8).indices.tolist()[::2]
    counts = drawn(logits, sampling, seed, draws, seen=seen)
    assert chi_square_is_plausible(counts, distribution_of(logits, sampling, seen) * draws)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("case", ["few tokens", "many tokens", "a nucleus wider than what is ranked"])
def test_the_choice_agrees_with_torch_multinomial(seed, case):
    vocabulary, spread, sampling = CASES[case]
    draws = 8_000
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * spread
    generator = torch.Generator().manual_seed(100 + seed)
    theirs = torch.multinomial(distribution_of(logits, sampling), draws, replacement=True, generator=generator)
    first, second = drawn(logits, sampling, seed, draws), theirs.bincount(minlength=vocabulary).double()
    common = first + second > 10
    statistic = ((first - second) ** 2 / (first + second))[common].sum().item()
    assert abs(statistic - int(common.sum())) < 5 * math.sqrt(2 * int(common.sum()))


def test_a_token_is_the_same_however_many_are_chosen_together(monkeypatch):
    logits = torch.randn(40, 5000, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.05, 4, 40)[:, None]
    keys, steps = torch.arange(40) * 7919, torch.arange(40)
    for sampling in (Sampling(0.7, 0.9), Sampling(1.0), Sampling(0.0), Sampling(1.0, 0.9, 50)):
        together = choose(logits, keys, steps, sampling)[0]
        alone = [choose(logits[i : i + 1], keys[i : i + 1], steps[i : i + 1], sampling)[0] for i in range(40)]
        assert together.tolist() == torch.cat(alone).tolist()
        monkeypatch.setattr(choice, "AT_ONCE", 12_000)
        assert choose(logits, keys, steps, sampling)[0].tolist() == together.tolist()
        monkeypatch.undo()


def test_where_nothing_may_be_waited_for_a_wide_nucleus_is_told_and_then_drawn_when_it_is_named():
    logits = torch.randn(40, 5000, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.05, 4, 40)[:, None]
    keys, steps, sampling = torch.arange(40) * 7919, torch.arange(40), Sampling(0.7, 0.9)
    expected = choose(logits, keys, steps, sampling)[0]
    nothing = torch.tensor([], dtype=torch.long)
    tokens, unsure = choose(logits, keys, steps, sampling, sort=nothing)
    assert 0 < unsure.sum() < 40
    assert torch.equal(tokens[~unsure], expected[~unsure])
    tokens, unsure = choose(logits, keys, steps, sampling, sort=unsure.nonzero()[:, 0])
    assert not unsure.any()
    assert torch.equal(tokens, expected)


def test_greedy_is_the_likeliest_token_after_the_penalty():
    logits = torch.tensor([[1.0, 3.0, 2.9], [-1.0, -3.0, -1.1]])
    seen = torch.tensor([[False, True, False], [True, False, False]])
    keys = steps = torch.tensor([0, 0])
    assert choose(logits, keys, steps, Sampling(0.0))[0].tolist() == [1, 0]
    assert choose(logits, keys, steps, Sampling(0.0, repetition_penalty=1.2), seen)[0].tolist() == [2, 2]


def test_draws_at_different_steps_are_independent():
    draws = 20_000
    logits = torch.zeros(4).expand(draws, -1)
    keys = torch.tensor([candidate_key(1, candidate) for candidate in range(draws)])
    first, second = (choose(logits, keys, torch.full_like(keys, step), Sampling(1.0))[0] for step in (0, 1))
    counts = (first * 4 + second).bincount(minlength=16).double()
    assert chi_square_is_plausible(counts, torch.full((16,), draws / 16).double())


def test_noise_depends_on_key_step_and_token_alone():
    tokens = torch.arange(100).expand(3, -1)
    keys, steps = torch.tensor([candidate_key(1, 0), candidate_key(1, 1), candidate_key(2, 0)]), torch.tensor([0, 0, 9])
    noise = uniform_noise(keys, steps, tokens)
    assert ((noise > 0) & (noise < 1)).all()
    assert torch.equal(noise[2], uniform_noise(keys[2:], steps[2:], tokens[:1])[0])
    assert torch.equal(noise[:, 40:60], uniform_noise(keys, steps, tokens[:, 40:60]))
    assert len(noise.unique()) == noise.numel()


def test_the_noise_of_a_known_key_is_pinned():
    assert candidate_key(1234, 0) == -4801010868894378210
    noise = uniform_noise(torch.tensor([candidate_key(1234, 0)]), torch.tensor([3]), torch.tensor([[0, 7, 151_935]]))
    assert noise[0].tolist() == [0.4087292585463576, 0.5425149063349539, 0.04040155637158588]

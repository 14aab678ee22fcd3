import math

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from t2s_pref.decoding import Request, candidate_key, choose, draw, halve, out_of_memory, uniform_noise

END, PAD = 1, 0
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "bos_token_id": 2,
}
CONFIGS = {
    "qwen2": transformers.Qwen2Config(**SHAPE),
    "qwen3": transformers.Qwen3Config(**SHAPE, head_dim=16),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SHAPE, head_dim=16, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2
    ),
    "llama": transformers.LlamaConfig(**SHAPE),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=None),
    "mistral with a window": transformers.MistralConfig(**SHAPE, sliding_window=16),
    "gemma3": transformers.Gemma3TextConfig(**SHAPE, head_dim=16, sliding_window=16),
    "phi3": transformers.Phi3Config(**SHAPE),
    "gpt2": transformers.GPT2Config(
        vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=512, bos_token_id=2, eos_token_id=END
    ),
    "qwen3_next": transformers.Qwen3NextConfig(
        **SHAPE,
        head_dim=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        shared_expert_intermediate_size=32,
        layer_types=["linear_attention", "full_attention"],
    ),
}
KEYWORDS = {"temperature": 1.0, "top_p": 0.95, "end_tokens": [END], "pad_token": PAD}


def model_of(kind):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()


def requests(candidates=range(3), cap=30):
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 512, (length,), generator=generator).tolist() for length in (5, 40, 23, 31)]
    return [Request(prompt, 1234 + 1000 * row, list(candidates), cap) for row, prompt in enumerate(prompts)]


def one_by_one(model, wanted):
    return [
        [draw(model, [Request(r.prompt, r.row_seed, [c], r.cap)], **KEYWORDS)[0][0] for c in r.candidates]
        for r in wanted
    ]


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_batch_gives_the_tokens_that_each_candidate_has_alone(kind):
    model = model_of(kind)
    assert draw(model, requests(), **KEYWORDS) == one_by_one(model, requests())


@pytest.mark.parametrize("kind", CONFIGS)
def test_greedy_tokens_are_those_of_transformers_generate(kind):
    model = model_of(kind)
    for request in requests([0]):
        ours = draw(model, [request], **{**KEYWORDS, "temperature": 0.0})[0][0]
        theirs = model.generate(
            torch.tensor([request.prompt]), max_new_tokens=30, do_sample=False, eos_token_id=END, pad_token_id=PAD
        )[0, len(request.prompt) :].tolist()
        assert ours.tokens + [END] * ours.ended == theirs


def test_a_batch_gives_the_same_tokens_under_a_lora_adapter():
    model = model_of("qwen3")
    plain = draw(model, requests(), **KEYWORDS)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    adapted = draw(model, requests(), **KEYWORDS)
    assert adapted == one_by_one(model, requests())
    assert adapted != plain


def test_a_prompt_is_read_once_however_many_candidates_it_has():
    model = model_of("qwen3")
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    draw(model, requests(range(5)), **KEYWORDS)
    assert shapes[0] == (4, 40)  # four prompts, the longest of 40 tokens
    assert shapes[1] == (20, 1)
    assert all(tokens == 1 for _, tokens in shapes[1:])


def test_a_candidate_does_not_depend_on_which_others_are_drawn():
    model = model_of("qwen3")
    five = draw(model, requests(range(5)), **KEYWORDS)
    two = draw(model, requests([3, 4]), **KEYWORDS)
    assert [row[3:] for row in five] == two
    assert len({tuple(drawn.tokens) for row in five for drawn in row}) == 20


def test_a_candidate_ends_at_any_of_the_end_tokens_or_at_its_own_cap():
    model = model_of("qwen3")
    wanted = [
        Request(request.prompt, request.row_seed, [0, 1], cap)
        for request, cap in zip(requests(), (1, 7, 30, 30), strict=True)
    ]
    free = draw(model, wanted, **{**KEYWORDS, "end_tokens": [END]})
    assert [len(drawn.tokens) for drawn in free[0]] == [1, 1]
    assert not free[0][0].ended
    assert not free[1][0].ended
    another = free[2][0].tokens[5]
    ended = draw(model, wanted, **{**KEYWORDS, "end_tokens": [END, another]})
    first = free[2][0].tokens.index(another)
    assert ended[2][0].tokens == free[2][0].tokens[:first]
    assert ended[2][0].ended


def test_an_end_token_on_the_last_step_still_ends_the_candidate():
    model = model_of("qwen3")
    request = requests([0])[0]
    tokens = draw(model, [request], **KEYWORDS)[0][0].tokens
    end = tokens[4]
    place = tokens.index(end)
    capped = Request(request.prompt, request.row_seed, [0], place + 1)
    drawn = draw(model, [capped], **{**KEYWORDS, "end_tokens": [end]})[0][0]
    assert drawn.ended
    assert len(drawn.tokens) == place


# -- the sampler -----------------------------------------------------------------------------------------------------


def nucleus(logits, temperature, top_p):
    """The distribution that should be drawn from, by the textbook: one full sort."""
    probability = torch.softmax(logits.double() / temperature, -1)
    ranked, order = probability.sort(descending=True)
    kept = ranked.cumsum(0) - ranked < top_p
    kept[0] = True
    result = torch.zeros_like(probability)
    result[order[kept]] = ranked[kept]
    return result / result.sum()


def chi_square_is_plausible(counts, expected):
    """Within five standard deviations of its mean; cells of fewer than 5 expected draws are thrown together."""
    assert counts[expected == 0].sum() == 0
    large = expected >= 5
    observed = torch.cat([counts[large], counts[~large].sum()[None]])
    wanted = torch.cat([expected[large], expected[~large].sum()[None]])
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum().item()
    freedom = len(wanted) - 1
    return abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("seed", [1234, 7, -5])
@pytest.mark.parametrize(
    ("vocabulary", "spread", "temperature", "top_p"),
    [(50, 2.0, 0.7, 0.9), (600, 1.0, 1.3, 0.95), (600, 1.0, 1.0, 1.0), (2000, 0.3, 1.0, 0.99)],
    ids=["few tokens", "many tokens", "no nucleus", "nucleus wider than what is ranked"],
)
def test_tokens_are_drawn_from_the_nucleus_of_the_distribution(seed, vocabulary, spread, temperature, top_p):
    draws = 12_000
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(3)) * spread
    keys = torch.tensor([candidate_key(seed, candidate) for candidate in range(draws)])
    tokens = torch.cat(
        [
            choose(logits.expand(len(part), -1), part, torch.full_like(part, 11), temperature, top_p)
            for part in keys.split(4000)
        ]
    )
    counts = tokens.bincount(minlength=vocabulary).double()
    assert chi_square_is_plausible(counts, nucleus(logits, temperature, top_p) * draws)


def test_the_sampler_agrees_with_torch_multinomial():
    draws = 12_000
    logits = torch.randn(300, generator=torch.Generator().manual_seed(5))
    distribution = nucleus(logits, 0.8, 0.9)
    theirs = torch.multinomial(distribution, draws, replacement=True, generator=torch.Generator().manual_seed(9))
    keys = torch.tensor([candidate_key(1, candidate) for candidate in range(draws)])
    ours = choose(logits.expand(draws, -1), keys, torch.zeros_like(keys), 0.8, 0.9)
    first, second = (tokens.bincount(minlength=300).double() for tokens in (ours, theirs))
    seen = first + second > 10
    statistic = ((first - second) ** 2 / (first + second))[seen].sum().item()
    assert abs(statistic - int(seen.sum())) < 5 * math.sqrt(2 * int(seen.sum()))


def test_draws_at_different_steps_are_independent():
    draws = 20_000
    logits = torch.zeros(4).expand(draws, -1)
    keys = torch.tensor([candidate_key(1, candidate) for candidate in range(draws)])
    first, second = (choose(logits, keys, torch.full_like(keys, step), 1.0, 1.0) for step in (0, 1))
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


# -- memory ----------------------------------------------------------------------------------------------------------


def test_halving_keeps_every_candidate_exactly_once():
    wanted = requests(range(5))
    while len(wanted) > 1 or len(wanted[0].candidates) > 1:
        first, second = halve(wanted)
        together = [(r.row_seed, c) for r in [*first, *second] for c in r.candidates]
        assert together == [(r.row_seed, c) for r in wanted for c in r.candidates]
        wanted = second


def test_a_failed_allocation_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 60)
    assert out_of_memory(failed.value)
    with pytest.raises(RuntimeError) as other:
        torch.ones(2) @ torch.ones(3)
    assert not out_of_memory(other.value)

"""Continuous batching of transformers: the same candidates as without it, each of them once, or an error."""

import gc
import logging
import threading
from collections import Counter

import pytest
import tiny_models
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingManager

from t2s_pref import SamplingSettings, TransformersEngine, UserError, demo_files, load_sft
from t2s_pref.choice import Sampling, candidate_key, choose
from t2s_pref.continuous import PAGE, ContinuousEngine, _as_it_was, _decode, _in_order, _quiet
from t2s_pref.decoding import Ends
from t2s_pref.protocol import Request, Work
from t2s_pref.turns import Draw, Wanted

END = 1
SHAPE = {**tiny_models.SHAPE, "max_position_embeddings": 2048}
CONFIGS = {
    "qwen2": transformers.Qwen2Config(**SHAPE),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SHAPE, head_dim=16, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2
    ),
    "llama": transformers.LlamaConfig(**SHAPE),
    "mistral with a window": transformers.MistralConfig(**SHAPE, sliding_window=16),
    "gemma3": transformers.Gemma3TextConfig(**SHAPE, head_dim=16, sliding_window=16),
    "eager": transformers.LlamaConfig(**SHAPE, attn_implementation="eager"),
}
REFUSED = {
    "linear attention": (
        transformers.Qwen3NextConfig(
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
        "Invalid layer type: linear_attention",
    ),
    "attention of its own": (
        transformers.BloomConfig(vocab_size=512, hidden_size=64, n_layer=2, n_head=4, eos_token_id=END),
        "it loses 100% of what the prompt says",
    ),
    "attention that breaks": (
        transformers.FalconConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
        "a candidate failed: The size of tensor",
    ),
    "a soft cap": (transformers.Gemma2Config(**SHAPE, head_dim=16, sliding_window=16), "its soft cap on attention"),
}
SAMPLING = Sampling(1.0, 0.95)


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """transformers collects garbage after each batch: what was there before takes no part, or it would take minutes."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def loops():
    """The threads of transformers that are still running."""
    return [thread for thread in threading.enumerate() if "generation_loop" in thread.name]


def made(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def candidates(lengths=(5, 40, 23, 31), number=3, cap=16):
    """Of random prompts of these lengths."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 512, (length,), generator=generator).tolist() for length in lengths]
    return {
        f"{row}/{each}": Wanted(row, each, prompt, candidate_key(1234 + 1000 * row, each), cap)
        for row, prompt in enumerate(prompts)
        for each in range(number)
    }


def decoded(model, wanted, sampling=SAMPLING, ends=(END,), held=8 * PAGE, step=64, work=None):
    draw = Draw(wanted, sampling, ends if isinstance(ends, Ends) else Ends(frozenset(ends)), work or Work())
    with _as_it_was(model), _quiet():
        return {name: (tokens, ended) for name, tokens, ended in _decode(model, draw, held, step)}


@torch.no_grad()
def by_hand(model, wanted, sampling=SAMPLING, ends=(END,)):
    """One candidate after another, without any cache."""
    answers = {}
    for name, each in wanted.items():
        tokens = list(each.prompt)
        for step in range(each.cap):
            logits = model(input_ids=torch.tensor([tokens])).logits[:, -1]
            seen = torch.zeros_like(logits, dtype=torch.bool)
            seen[0, tokens] = True
            tokens.append(choose(logits, torch.tensor([each.key]), torch.tensor([step]), sampling, seen)[0].item())
            if tokens[-1] in ends:
                break
        ended = tokens[-1] in ends
        answers[name] = (tokens[len(each.prompt) : len(tokens) - ended], ended)
    return answers


# -- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_each_candidate_has_the_tokens_that_it_has_alone(kind):
    model = made(CONFIGS[kind])
    wanted = candidates(number=2)
    assert decoded(model, wanted) == by_hand(model, wanted)


def test_greedy_tokens_are_those_of_transformers_generate():
    model = made(CONFIGS["qwen2"])
    wanted = candidates(number=1, cap=24)
    for name, (tokens, ended) in decoded(model, wanted, Sampling(0.0)).items():
        prompt = wanted[name].prompt
        theirs = model.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=END, pad_token_id=0
        )
        assert tokens + [END] * ended == theirs[0, len(prompt) :].tolist()


def test_a_repetition_penalty_counts_prompt_and_answer():
    model = made(CONFIGS["qwen2"])
    sampling = Sampling(1.0, 0.95, 20, 1.5)
    wanted = candidates()
    penalised = decoded(model, wanted, sampling)
    assert penalised == by_hand(model, wanted, sampling)
    assert penalised != decoded(model, wanted, Sampling(1.0, 0.95, 20))


def test_a_lora_adapter_takes_part():
    model = made(CONFIGS["qwen2"])
    wanted = candidates(number=2)
    plain = decoded(model, wanted)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    adapted = decoded(model, wanted)
    assert adapted == by_hand(model, wanted)
    assert adapted != plain


def test_tokens_are_drawn_from_the_distribution_of_the_model():
    model = made(CONFIGS["qwen2"])
    wanted = candidates(lengths=(8,), number=900, cap=1)
    counts = Counter(tokens[0] for tokens, _ in decoded(model, wanted, Sampling(0.7, 0.9), ends=(), step=512).values())
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([wanted["0/0"].prompt])).logits[0, -1].double() / 0.7
    ranked, order = logits.softmax(0).sort(descending=True)
    nucleus = int((ranked.cumsum(0) - ranked < 0.9).sum())
    assert set(counts) <= set(order[:nucleus].tolist())
    expected = 900 * ranked[:nucleus] / ranked[:nucleus].sum()
    observed = torch.tensor([counts[token] for token in order[:nucleus].tolist()]).double()
    large = expected > 5
    statistic = ((observed - expected) ** 2 / expected)[large].sum().item()
    assert abs(statistic - int(large.sum())) < 5 * (2 * int(large.sum())) ** 0.5


def test_whole_blocks_of_a_prompt_are_read_once_for_all_of_its_candidates():
    model = made(CONFIGS["llama"])
    wanted = candidates(lengths=(600, 530), number=4, cap=12)
    alone = by_hand(model, wanted)
    roomy, narrow = Work(), Work()
    assert decoded(model, wanted, held=40 * PAGE, step=600 + 530, work=roomy) == alone
    # Of the first of each row all, of the others what is beyond the last whole block of 256 tokens.
    assert roomy.prompt_computed == 600 + 530 + 3 * (600 - 512) + 3 * (530 - 512)
    assert roomy.generated == sum(len(tokens) + ended for tokens, ended in alone.values())
    # Where hardly more than one sequence fits, they come one after another.
    assert decoded(model, wanted, held=4 * PAGE, step=600 + 530, work=narrow) == alone
    assert narrow.prompt_computed >= roomy.prompt_computed
    assert narrow.most_held <= 4 * PAGE < roomy.most_held <= 40 * PAGE


def test_interrupted_candidates_go_on_with_the_noise_of_their_place():
    model = made(CONFIGS["llama"])
    wanted = candidates(lengths=(250, 251, 252, 253), number=1, cap=20)  # each comes to need a second block
    work = Work()
    assert decoded(model, wanted, Sampling(1.0, 0.95, 0, 1.2), held=5 * PAGE, step=1100, work=work) == by_hand(
        model, wanted, Sampling(1.0, 0.95, 0, 1.2)
    )
    assert work.prompt_computed > 250 + 251 + 252 + 253


def test_the_first_candidates_of_as_many_rows_as_are_read_at_a_time_come_first():
    wanted = candidates(lengths=(40, 40, 40), number=2)
    names = list(_in_order(wanted, 70))
    assert sorted(names) == sorted(wanted)
    rows = [name[0] for name in names]
    assert rows[:2] == rows[2:4]
    assert rows[0] != rows[1]
    assert rows[4] == rows[5]


# -- ends ------------------------------------------------------------------------------------------------------------


def test_each_candidate_ends_at_its_own_cap_or_at_any_of_the_end_tokens():
    model = made(CONFIGS["qwen2"])
    caps = [1, 7, 16, 2]
    wanted = {name: each._replace(cap=caps[each.place]) for name, each in candidates().items()}
    free = decoded(model, wanted, ends=())
    assert [len(free[name][0]) for name in wanted] == [caps[each.place] for each in wanted.values()]
    assert not any(ended for _, ended in free.values())
    another = free["2/0"][0][5]
    cut = decoded(model, wanted, ends=(END, another))
    assert cut["2/0"] == (free["2/0"][0][: free["2/0"][0].index(another)], True)
    assert cut == by_hand(model, wanted, ends=(END, another))


def test_an_end_token_on_the_last_step_still_ends_the_candidate():
    model = made(CONFIGS["qwen2"])
    wanted = candidates(lengths=(9,), number=1)
    tokens = decoded(model, wanted, ends=())["0/0"][0]
    first = tokens.index(tokens[4])
    wanted = {"0/0": wanted["0/0"]._replace(cap=first + 1)}
    assert decoded(model, wanted, ends=(tokens[4],)) == {"0/0": (tokens[:first], True)}


@pytest.mark.parametrize("tokens", [(END,), ()], ids=["with an end token", "without"])
def test_an_answer_that_is_over_before_its_end_token_ends_there(tokens):
    model = made(CONFIGS["qwen2"])
    wanted = candidates(number=2)
    free = decoded(model, wanted, ends=tokens)
    watched = free["1/0"][0][3]
    ends = Ends(frozenset(tokens), frozenset([watched]), lambda _, answer: len(answer) >= 3)
    work = Work()
    over = decoded(model, wanted, ends=ends, work=work)
    for name, (whole, ended) in free.items():
        cut = next((n for n, token in enumerate(whole, 1) if token == watched and n >= 3), None)
        assert over[name] == ((whole[:cut], True) if cut else (whole, ended))
    assert over["1/0"][0][-1] == watched
    assert over["1/0"][1]


# -- the engine ------------------------------------------------------------------------------------------------------

SETTINGS, BUDGET = SamplingSettings(temperature=0.9, top_p=0.95), 1 << 14


@pytest.fixture(scope="module")
def bundled():
    """Model and tokenizer that ship with the package."""
    model = AutoModelForCausalLM.from_pretrained(demo_files().model, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(demo_files().model)


@pytest.fixture
def tiny(tiny_model):
    """A model in hand that nobody else uses, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(tiny_model)


def engine_of(model, tokenizer, kind=ContinuousEngine):
    return kind(model, tokenizer=tokenizer)


def asked(engine, rows=4, each=3, cap=48):
    chats = [
        [{"role": "user", "content": f"{row['instruction']}\n{row['input']}"}]
        for row in load_sft(demo_files().train).select(range(rows))
    ]
    prompts = engine.encode_chats(chats, False)
    return [Request(prompt, 1234 + 1000 * row, range(each), cap) for row, prompt in enumerate(prompts)]


def by_candidate(sampled):
    sampled = list(sampled)
    answers = {(one.place, one.candidate): one.answer for one in sampled}
    assert len(answers) == len(sampled)
    return answers


def test_every_candidate_comes_once_as_the_plain_engine_has_it(bundled):
    engine, plain = engine_of(*bundled), engine_of(*bundled, TransformersEngine)
    requests = asked(engine, rows=6)
    answers = by_candidate(engine.sample(requests, SETTINGS, BUDGET))
    assert set(answers) == {(row, each) for row in range(6) for each in range(3)}
    assert answers == by_candidate(plain.sample(requests, SETTINGS, BUDGET))
    assert any("SELECT" in answer.text for answer in answers.values())
    assert engine.work.prompt_asked == sum(3 * len(request.prompt) for request in requests)
    assert engine.work.generated >= sum(answer.tokens for answer in answers.values())


def test_the_same_batch_gives_the_same_answers_in_the_same_order(bundled):
    engine = engine_of(*bundled)
    requests = asked(engine)
    assert list(engine.sample(requests, SETTINGS, BUDGET)) == list(
        engine_of(*bundled).sample(requests, SETTINGS, BUDGET)
    )


def test_candidates_are_kept_apart_from_those_of_the_plain_engine(bundled, tmp_path):
    engine, plain = engine_of(*bundled), engine_of(*bundled, TransformersEngine)
    memo = tmp_path / "weights.json"
    assert engine.identity(memo) == {**plain.identity(memo), "continuous_batching": transformers.__version__}
    assert not engine.whole_batches
    assert engine.method() == "continuous batching of transformers"


def test_nothing_of_the_models_own_generation_config_but_its_end_tokens_takes_effect(tiny):
    model, tokenizer = tiny
    engine = engine_of(model, tokenizer)
    requests = asked(engine, cap=24)
    answers = by_candidate(engine.sample(requests, SETTINGS, BUDGET))
    leaky = {"temperature": 0.01, "top_p": 0.1, "top_k": 1, "repetition_penalty": 3.0, "do_sample": True}
    leaky |= {"max_new_tokens": 2, "num_return_sequences": 2, "suppress_tokens": [5, 6], "min_p": 0.9}
    for name, value in leaky.items():
        setattr(model.generation_config, name, value)
    assert by_candidate(engine.sample(requests, SETTINGS, BUDGET)) == answers
    words = tokenizer(answers[0, 0].text, add_special_tokens=False)["input_ids"]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, words[0]]
    assert by_candidate(engine.sample(requests, SETTINGS, BUDGET))[0, 0].ended


def test_a_model_in_training_is_left_as_it_was(tiny):
    model, tokenizer = tiny
    model.set_attn_implementation("eager")
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    generation, random, level = model.generation_config.to_dict(), torch.get_rng_state(), logging.root.level
    engine = engine_of(model, tokenizer)
    assert len(list(engine.sample(asked(engine), SETTINGS, BUDGET))) == 12
    assert [module.training for module in model.modules()] == before
    assert model.config._attn_implementation == "eager"
    assert model.generation_config.to_dict() == generation
    assert torch.equal(torch.get_rng_state(), random)
    assert logging.root.level == level
    assert not model._forward_pre_hooks
    assert not hasattr(model, "_cached_continuous_batching_manager")


def test_a_caller_who_looks_away_leaves_no_thread_behind(tiny):
    model, tokenizer = tiny
    model.train()
    engine = engine_of(model, tokenizer)
    sampled = engine.sample(asked(engine), SETTINGS, BUDGET)
    next(sampled)
    assert loops()
    sampled.close()
    assert not loops()
    assert model.training
    assert model.config._attn_implementation == "sdpa"


# -- failures --------------------------------------------------------------------------------------------------------


def failing(model, error, calls):
    """Let the forward passes of these numbers fail."""
    count = iter(range(1 << 30))

    def hook(*_):
        if next(count) in calls:
            raise error

    return model.register_forward_pre_hook(hook)


def test_a_forward_pass_that_fails_is_an_error_and_what_came_before_is_right(tiny):
    model, tokenizer = tiny
    engine = engine_of(model, tokenizer)
    requests = [Request(r.prompt, r.row_seed, r.candidates, 4 + 4 * row) for row, r in enumerate(asked(engine))]
    answers = by_candidate(engine.sample(requests, SETTINGS, BUDGET))
    failing(model, RuntimeError("the GPU has fallen off the bus"), [9])
    came = []
    with pytest.raises(UserError) as failed:
        came.extend(engine.sample(requests, SETTINGS, BUDGET))
    assert 0 < len(came) < 12
    assert all(answers[one.place, one.candidate] == one.answer for one in came)
    assert str(failed.value) == (
        "Continuous batching of 'Qwen3ForCausalLM' has failed: a candidate failed: the GPU has fallen off the bus, and "
        f"{12 - len(came)} candidates are missing; leave continuous batching off. What was sampled is kept."
    )
    assert not loops()
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("fault", ["cut short", "failed", "twice", "lost"])
def test_a_result_that_is_no_whole_answer_is_never_taken_for_one(tiny, monkeypatch, fault):
    engine = engine_of(*tiny)
    requests = asked(engine)
    list(engine.sample(requests[:1], SETTINGS, BUDGET))
    honest, seen = ContinuousBatchingManager.get_result, []

    def dishonest(self, request_id=None, timeout=None):
        result = honest(self, request_id, timeout)
        if result is not None:
            seen.append(result)
            if fault == "cut short":
                result.generated_tokens = [5]
            elif fault == "failed":
                result.error = "no reason\ngiven"
            elif fault == "twice":
                return seen[0]
            else:
                self.stop(hard_stop=True)
                return None
        return result

    monkeypatch.setattr(ContinuousBatchingManager, "get_result", dishonest)
    said = {
        "cut short": "stopped after 1 of 48 tokens without an end token",
        "failed": "failed: no reason given",
        "twice": "came twice",
        "lost": "never came",
    }
    with pytest.raises(UserError) as failed:
        list(engine.sample(requests, SETTINGS, BUDGET))
    assert f"a candidate {said[fault]}" in str(failed.value)
    assert "\n" not in str(failed.value)


def test_a_lack_of_memory_takes_half_as_much_and_loses_nothing(tiny, caplog):
    model, tokenizer = tiny
    engine = engine_of(model, tokenizer)
    requests = asked(engine, cap=16)
    answers = by_candidate(engine.sample(requests, SETTINGS, BUDGET))
    failing(model, torch.OutOfMemoryError("CUDA out of memory."), [5])
    assert by_candidate(engine.sample(requests, SETTINGS, BUDGET)) == answers
    assert "Out of memory with keys and values of" in caplog.text
    assert engine.ceiling < 1 << 14


def test_a_candidate_that_does_not_even_fit_alone_is_an_error(tiny, monkeypatch):
    engine = engine_of(*tiny)
    requests = asked(engine)
    list(engine.sample(requests[:1], SETTINGS, BUDGET))
    failing(tiny[0], torch.OutOfMemoryError("CUDA out of memory."), range(1000))
    with pytest.raises(UserError, match="Out of memory with a single candidate of up to .* lower --max-new-tokens"):
        list(engine.sample(requests, SETTINGS, BUDGET))


def test_keys_and_values_stay_within_the_budget(tiny):
    engine = engine_of(*tiny)
    requests = asked(engine, cap=24)
    answers = by_candidate(engine.sample(requests, SETTINGS, BUDGET))
    assert engine.work.most_held > 3 * PAGE
    narrow = engine_of(*tiny)
    assert by_candidate(narrow.sample(requests, SETTINGS, 3 * PAGE)) == answers
    assert narrow.work.most_held <= 3 * PAGE


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_it_would_get_wrong_is_refused(kind, bundled):
    config, reason = REFUSED[kind]
    model = made(config)
    attention = model.config._attn_implementation
    engine = engine_of(model, bundled[1])
    requests = [Request(list(range(3, 43)), 1, range(2), 8)]
    with pytest.raises(UserError) as refused:
        next(engine.sample(requests, SETTINGS, BUDGET))
    assert reason in str(refused.value)
    assert str(refused.value).endswith("; leave continuous batching off.")
    assert "\n" not in str(refused.value)
    assert model.config._attn_implementation == attention
    assert not loops()


def test_a_model_on_several_devices_and_an_old_transformers_are_refused(tiny, monkeypatch):
    model, tokenizer = tiny
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(UserError, match="it is spread over 0, 1; leave continuous batching off"):
        next(engine_of(model, tokenizer).sample([Request([5, 6, 7], 1, [0], 4)], SETTINGS, BUDGET))
    monkeypatch.setattr("transformers.__version__", "5.19.1")
    with pytest.raises(UserError, match=r"transformers is 5\.19\.1, and 5\.23 is the first that will do"):
        next(engine_of(model, tokenizer).sample([Request([5, 6, 7], 1, [0], 4)], SETTINGS, BUDGET))


def test_a_manager_that_the_caller_keeps_on_the_model_is_left_alone(tiny):
    model, tokenizer = tiny
    manager = model.init_continuous_batching()
    model._cached_continuous_batching_manager = manager
    with pytest.raises(UserError, match="destroy_cached_continuous_batching_manager"):
        next(engine_of(model, tokenizer).sample([Request([5, 6, 7], 1, [0], 4)], SETTINGS, BUDGET))
    assert model._cached_continuous_batching_manager is manager

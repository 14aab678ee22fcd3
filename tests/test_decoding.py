"""What decoding promises: the tokens that each candidate has alone, whatever it is decoded with and in whatever way."""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import accelerate
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny_models import SHAPE
from torch.utils._python_dispatch import TorchDispatchMode

from t2s_pref import choice, demo_files
from t2s_pref.attention import base_of
from t2s_pref.choice import Sampling, candidate_key, choose
from t2s_pref.decoding import Decoder, Ends, OutOfMemoryError, _Batch, out_of_memory
from t2s_pref.fallback import GenerateDecoder
from t2s_pref.kv import Beginnings, SlotCache
from t2s_pref.methods import COPIED, GENERATE, SHARED, SHARING, difference, is_exact, method_of
from t2s_pref.plan import cut_batches
from t2s_pref.protocol import Request, Work

END, PAD = SHAPE["eos_token_id"], SHAPE["pad_token_id"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 2,
}
OLD = {"vocab_size": 512, "bos_token_id": 2, "eos_token_id": END, "pad_token_id": PAD, "initializer_range": 0.15}

# By the fastest way that is right for them; those that share are the allow-list, one each.
MODELS = {
    SHARED: {
        "qwen2": lambda: transformers.Qwen2Config(**SHAPE),
        "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**SHAPE, **EXPERTS, shared_expert_intermediate_size=64),
        "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=16),
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=16),
        "llama": lambda: transformers.LlamaConfig(**SHAPE),
        "mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=None),
        "mixtral": lambda: transformers.MixtralConfig(**SHAPE, num_local_experts=4, sliding_window=None),
        "phi": lambda: transformers.PhiConfig(**SHAPE),
        "phi3": lambda: transformers.Phi3Config(**SHAPE),
        "gemma": lambda: transformers.GemmaConfig(**SHAPE, head_dim=16),
        "granite": lambda: transformers.GraniteConfig(**SHAPE),
        "olmo": lambda: transformers.OlmoConfig(**SHAPE),
        "olmo2": lambda: transformers.Olmo2Config(**SHAPE),
        "starcoder2": lambda: transformers.Starcoder2Config(**SHAPE, sliding_window=None),
        "stablelm": lambda: transformers.StableLmConfig(**SHAPE),
        "cohere": lambda: transformers.CohereConfig(**SHAPE),
        "glm": lambda: transformers.GlmConfig(**SHAPE, head_dim=16),
        "glm4": lambda: transformers.Glm4Config(**SHAPE, head_dim=16),
        "smollm3": lambda: transformers.SmolLM3Config(**SHAPE),
        "ernie4_5": lambda: transformers.Ernie4_5Config(**SHAPE, head_dim=16),
        "seed_oss": lambda: transformers.SeedOssConfig(**SHAPE, head_dim=16),
    },
    COPIED: {
        "gpt2": lambda: transformers.GPT2Config(**OLD, n_embd=64, n_layer=2, n_head=4, n_positions=512),
        "opt": lambda: transformers.OPTConfig(
            **OLD, hidden_size=64, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64
        ),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(
            **OLD, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ),
        "falcon": lambda: transformers.FalconConfig(**OLD, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
        "deepseek_v2": lambda: transformers.DeepseekV2Config(**{**SHAPE, **LATENT}),
        "deepseek_v3": lambda: transformers.DeepseekV3Config(**{**SHAPE, **LATENT}),
    },
    GENERATE: {
        "mistral with a window": lambda: transformers.MistralConfig(**SHAPE, sliding_window=16),
        "gemma2": lambda: transformers.Gemma2Config(**SHAPE, head_dim=16, sliding_window=16),
        "gemma3": lambda: transformers.Gemma3TextConfig(**SHAPE, head_dim=16, sliding_window=16),
        "gpt_oss": lambda: transformers.GptOssConfig(
            **SHAPE, head_dim=16, sliding_window=16, num_local_experts=4, num_experts_per_tok=2
        ),
        "bloom": lambda: transformers.BloomConfig(**OLD, hidden_size=64, n_layer=2, n_head=4),
        "mamba2": lambda: transformers.Mamba2Config(
            **OLD, hidden_size=64, num_hidden_layers=2, num_heads=8, head_dim=16, state_size=16, n_groups=1
        ),
        "qwen3_next": lambda: transformers.Qwen3NextConfig(
            **{**SHAPE, **EXPERTS},
            head_dim=16,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            shared_expert_intermediate_size=32,
            layer_types=["linear_attention", "full_attention"],
        ),
    },
}
METHODS = {kind: method for method, kinds in MODELS.items() for kind in kinds}
SAMPLING = Sampling(1.0, 0.95)
LARGE = 100_000


@cache
def model_of(kind):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(MODELS[METHODS[kind]][kind]()).eval()


def prompts():
    """Two schemas that share a system prompt, one row of its own, a row twice, and one that begins another."""
    generator = torch.Generator().manual_seed(1)

    def tokens(count):
        return torch.randint(3, 512, (count,), generator=generator).tolist()

    system = tokens(10)
    one, other = [*system, *tokens(70)], [*system, *tokens(90)]
    rows = [[*one, *tokens(5)], [*other, *tokens(23)], tokens(31), [*one, *tokens(12)], [*other, *tokens(1)]]
    return [*rows, rows[0], rows[3][:-2]]


def requests_of(candidates=range(2), cap=12, budget=LARGE, once=True, rows=None):
    """Batches as the plan cuts them, and the rows of their requests."""
    rows = prompts() if rows is None else rows
    for batch in cut_batches(rows, [6] * len(rows), [candidates] * len(rows), budget, once):
        yield [Request(rows[each.row], 1000 * each.row, list(each.candidates), cap, each.shared, 6) for each in batch]


def drawer_of(model, method, work=None):
    return GenerateDecoder(model, work) if method == GENERATE else Decoder(model, method == SHARED, work=work)


def draw(drawer, batches, sampling=SAMPLING, ends=(END,), budget=LARGE):
    """Tokens and whether they ended, by row seed and candidate; each exactly once."""
    found = {}
    for batch in batches:
        for drawn in drawer.draw(batch, sampling, ends if isinstance(ends, Ends) else Ends(frozenset(ends)), budget):
            key = batch[drawn.place].row_seed, drawn.candidate
            assert key not in found
            found[key] = drawn.tokens, drawn.ended
    return found


def row_by_row(model, sampling=SAMPLING, cap=12, candidates=range(2), rows=None):
    """Each candidate alone, every token after a plain forward pass over all before it: no cache, no batch."""
    found = {}
    for row, prompt in enumerate(prompts() if rows is None else rows):
        for candidate in candidates:
            ids, ended = list(prompt), False
            key = torch.tensor([candidate_key(1000 * row, candidate)])
            for step in range(cap):
                with torch.inference_mode():
                    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[:, -1]
                seen = torch.zeros_like(logits, dtype=torch.bool)
                seen[0, ids] = True
                token = choose(logits, key, torch.tensor([step]), sampling, seen)[0].item()
                if token == END:
                    ended = True
                    break
                ids.append(token)
            found[1000 * row, candidate] = ids[len(prompt) :], ended
    return found


@cache
def alone(kind):
    return row_by_row(model_of(kind))


def test_every_architecture_that_may_share_is_shown_here_to_do_it_right():
    assert set(MODELS[SHARED]) == SHARING


@pytest.mark.parametrize("kind", METHODS)
def test_a_model_is_decoded_in_the_fastest_way_that_is_right_for_it(kind):
    assert method_of(model_of(kind)) == METHODS[kind]


@pytest.mark.parametrize("kind", METHODS)
def test_a_batch_has_the_tokens_that_each_candidate_has_alone(kind):
    method = METHODS[kind]
    found = draw(drawer_of(model_of(kind), method), requests_of(once=method == SHARED))
    assert found == alone(kind)
    assert len({tuple(tokens) for tokens, _ in found.values()}) > len(found) // 2


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.filterwarnings("ignore")  # of peft, about what is made here
def test_a_batch_under_a_lora_adapter_has_the_tokens_that_each_candidate_has_alone(kind):
    torch.manual_seed(0)
    method = METHODS[kind]
    model = transformers.AutoModelForCausalLM.from_config(MODELS[method][kind]())
    where = ["in_proj"] if kind == "mamba2" else "all-linear"  # peft refuses its others
    model = get_peft_model(model, LoraConfig(r=4, target_modules=where, init_lora_weights=False)).eval()
    assert method_of(model) == method
    found = draw(drawer_of(model, method), requests_of(once=method == SHARED))
    assert found == row_by_row(model)
    assert found != alone(kind)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "qwen3_moe"])
@pytest.mark.parametrize("method", [SHARED, COPIED, GENERATE])
@pytest.mark.parametrize("budget", [LARGE, 400, 90], ids=["at once", "with refills", "one at a time"])
def test_every_way_and_every_budget_gives_the_same_tokens(kind, method, budget):
    work = Work()
    drawer = drawer_of(model_of(kind), method, work)
    assert draw(drawer, requests_of(budget=budget, once=method == SHARED), budget=budget) == alone(kind)
    assert work.prompt_asked >= 2 * sum(map(len, prompts()))


@pytest.mark.parametrize("method", [SHARED, COPIED])
@pytest.mark.parametrize("stride", [2, 8, 50])
def test_looking_at_the_tokens_every_few_steps_only_changes_none_of_them(method, stride, monkeypatch):
    monkeypatch.setattr(choice, "WIDTH", 4)  # so that a nucleus is often wider than what is ranked
    decoder = drawer_of(model_of("qwen3"), method)
    decoder.stride = stride
    for budget in (LARGE, 400):
        assert draw(decoder, requests_of(budget=budget, once=method == SHARED), budget=budget) == alone("qwen3")


@pytest.mark.parametrize("method", [SHARED, COPIED, GENERATE])
def test_penalty_top_k_and_greedy_are_the_same_in_every_way(method):
    model = model_of("qwen3")
    for sampling in (Sampling(1.0, 0.9, 20, 1.3), Sampling(0.0), Sampling(0.0, repetition_penalty=1.2)):
        found = draw(drawer_of(model, method), requests_of(range(1), once=method == SHARED), sampling)
        assert found == row_by_row(model, sampling, candidates=range(1))


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "gemma3", "mamba2"])
def test_greedy_tokens_are_those_of_transformers_generate(kind):
    model = model_of(kind)
    found = draw(drawer_of(model, METHODS[kind]), requests_of(range(1)), Sampling(0.0))
    for row, prompt in enumerate(prompts()):
        theirs = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=END, pad_token_id=PAD
        )[0, len(prompt) :].tolist()
        tokens, ended = found[1000 * row, 0]
        assert tokens + [END] * ended == theirs


def test_a_candidate_does_not_depend_on_which_others_are_drawn():
    decoder = Decoder(model_of("qwen3"), True)
    five = draw(decoder, requests_of(range(5)))
    two = draw(decoder, requests_of(range(3, 5)))
    assert {key: drawn for key, drawn in five.items() if key[1] >= 3} == two


# -- where an answer ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SHARED, COPIED, GENERATE])
def test_a_candidate_ends_at_its_own_cap_at_any_end_token_and_where_its_text_says_so(method):
    drawer = drawer_of(model_of("qwen3"), method)
    (batch,) = requests_of(cap=12)
    free = draw(drawer, [batch])
    caps = [Request(r.prompt, r.row_seed, r.candidates, 1 + place, r.shared) for place, r in enumerate(batch)]
    for request in caps:
        for candidate in request.candidates:
            tokens, ended = free[request.row_seed, candidate]
            expected = (tokens, ended) if len(tokens) < request.cap else (tokens[: request.cap], False)
            assert draw(drawer, [caps])[request.row_seed, candidate] == expected
    key, (tokens, _) = max(free.items(), key=lambda item: len(item[1][0]))
    another = tokens[5]
    place = tokens.index(another)
    assert draw(drawer, [batch], ends=(END, another))[key] == (tokens[:place], True)
    last = [Request(r.prompt, r.row_seed, r.candidates, place + 1, r.shared) for r in batch]
    assert draw(drawer, [last], ends=(END, another))[key] == (tokens[:place], True)
    told = Ends(frozenset([END]), frozenset([another]), lambda _, answer: len(answer) > place)
    assert draw(drawer, [batch], ends=told)[key] == (tokens[: place + 1], True)


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_what_is_watched_is_seen_at_its_token_however_seldom_one_looks(stride):
    watched = frozenset(range(2, 512, 3))
    ends = Ends(frozenset([END]), watched, lambda _, answer: len(answer) >= 4)
    decoder = Decoder(model_of("qwen3"), True)
    decoder.stride = stride
    for tokens, ended in draw(decoder, requests_of(), ends=ends).values():
        if ended:
            assert tokens[-1] in watched or len(tokens) < 12
        assert not any(token in watched for token in tokens[3:-1])


# -- what is read ----------------------------------------------------------------------------------------------------


def nodes(rows):
    return len({tuple(row[: end + 1]) for row in rows for end in range(len(row))})


def test_every_distinct_prompt_token_goes_through_the_model_once_and_none_is_padding():
    for method in (SHARED, COPIED):
        work = Work()
        draw(drawer_of(model_of("qwen3"), method, work), requests_of(range(5), once=method == SHARED))
        # the row that begins another is read as one of its own group: it shares all but its last token
        assert nodes(prompts()) <= work.prompt_computed <= nodes(prompts()) + 2
        assert work.prompt_asked == 5 * sum(map(len, prompts()))


def test_beginnings_are_read_once_for_all_batches_and_rounds_while_there_is_room_for_them():
    beginnings, work = Beginnings(), Work()
    model = model_of("qwen3")
    one_by_one = [[request] for batch in requests_of() for request in batch]
    found = draw(Decoder(model, True, beginnings, work), one_by_one)
    assert found == alone("qwen3")
    first = work.prompt_computed
    assert first < nodes(prompts()) + 60  # of the two schemas and the system prompt, nothing was read twice
    draw(Decoder(model, True, beginnings, work), requests_of(range(2, 4)))
    assert work.prompt_computed - first < 100
    beginnings.shrink(0)
    draw(Decoder(model, True, beginnings, work), requests_of(range(2, 4)))
    assert work.prompt_computed - first > nodes(prompts())


def test_no_more_is_held_than_the_budget_allows():
    for method in (SHARED, COPIED):
        for budget in (400, 600, 1500):
            work = Work()
            drawer = drawer_of(model_of("qwen3"), method, work)
            draw(drawer, requests_of(range(5), cap=6, budget=budget, once=method == SHARED), budget=budget)
            assert work.most_held <= 1.2 * budget  # room is given in steps of 16 tokens


def test_long_prompts_are_read_in_pieces(monkeypatch):
    from t2s_pref import reading

    monkeypatch.setattr(reading, "CHUNK", 16)
    for method in (SHARED, COPIED):
        assert draw(drawer_of(model_of("qwen3"), method), requests_of(once=method == SHARED)) == alone("qwen3")


@pytest.mark.parametrize("method", [SHARED, COPIED, GENERATE])
def test_answers_far_longer_than_expected_take_turns_within_the_budget(method):
    rows = prompts()
    model, sampling = model_of("qwen3"), Sampling(1.0, 0.95)
    batches = list(requests_of(range(4), cap=90, budget=1200, once=method == SHARED, rows=rows))
    work = Work()
    found = draw(drawer_of(model, method, work), batches, sampling, ends=(), budget=1200)
    assert work.most_held <= 1.2 * 1200
    assert found == draw(Decoder(model, True), batches, sampling, ends=())
    assert all(len(tokens) == 90 for tokens, _ in found.values())


@pytest.mark.parametrize("method", [SHARED, COPIED])
def test_an_answer_that_never_ends_does_not_take_the_room_of_all_others(method):
    rows = [[*prompts()[0], 5 + number] for number in range(400)]
    model, work, steps = model_of("qwen3"), Work(), []
    budget = 600 if method == SHARED else 1200
    (batch,) = requests_of(cap=200, budget=budget, once=method == SHARED, rows=rows)
    ends = Ends(frozenset(), frozenset(range(512)), lambda place, answer: place != 0 and len(answer) >= 5)
    hook = model.register_forward_hook(lambda *_: steps.append(1))
    found = draw(drawer_of(model, method, work), [batch], ends=ends, budget=budget)
    hook.remove()
    assert {len(tokens) for (seed, _), (tokens, _) in found.items() if seed == batch[0].row_seed} == {200}
    assert {len(tokens) for (seed, _), (tokens, _) in found.items() if seed != batch[0].row_seed} == {5}
    assert work.most_held <= 1.2 * budget
    assert len(steps) < 1200  # 436 and 993; over 1,600 where its room is taken from all others
    assert found == draw(drawer_of(model, method), [batch], ends=ends)


def test_answers_longer_than_expected_get_more_room():
    rows = prompts()[:2]
    model = model_of("qwen3")
    batch = [Request(row, 1000 * place, [0, 1], 60, 0, 1) for place, row in enumerate(rows)]
    assert draw(Decoder(model, True), [batch], ends=()) == {
        key: (tokens, ended)
        for key, (tokens, ended) in draw(Decoder(model, False), [batch], ends=(), budget=300).items()
    }
    assert all(len(tokens) == 60 for tokens, _ in draw(Decoder(model, True), [batch], ends=()).values())


# -- the model itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SHARED, COPIED, GENERATE])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_is_left_as_it_was_even_where_nobody_takes_the_rest(method, attention):
    torch.manual_seed(0)
    config = MODELS[SHARED]["qwen3"]()
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    settings = model.generation_config.to_dict()
    assert draw(drawer_of(model, method), requests_of(once=method == SHARED)) == alone("qwen3")
    some = drawer_of(model, method).draw(next(iter(requests_of())), SAMPLING, Ends(frozenset([END])), LARGE)
    next(some)
    some.close()
    assert model.config._attn_implementation == attention
    assert model.generation_config.to_dict() == settings
    assert not torch.is_inference(model(torch.tensor([[5, 6]])).logits)


@pytest.mark.parametrize("first", [SHARED, COPIED, GENERATE])
@pytest.mark.parametrize("second", [SHARED, COPIED, GENERATE])
def test_two_that_draw_with_one_model_in_turns_do_not_disturb_each_other(first, second):
    model = model_of("qwen3")
    ends = Ends(frozenset([END]))
    settings = model.generation_config.to_dict()
    generators = []
    for method in (first, second):
        batch = [request for batch in requests_of(once=method == SHARED) for request in batch]
        generators.append((batch, drawer_of(model, method).draw(batch, SAMPLING, ends, LARGE)))
    found = [{}, {}]
    padded = torch.tensor([[0, 0, 5, 6, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    expected = model(padded, attention_mask=mask).logits
    while any(generator is not None for _, generator in generators):
        for number, (batch, generator) in enumerate(generators):
            if generator is None:
                continue
            drawn = next(generator, None)
            if drawn is None:
                generators[number] = batch, None
            else:
                found[number][batch[drawn.place].row_seed, drawn.candidate] = drawn.tokens, drawn.ended
                assert torch.equal(model(padded, attention_mask=mask).logits, expected)
                if number == 0 and len(found[0]) == 8:  # the first is given up half way
                    generator.close()
                    generators[0] = batch, None
    assert found[1] == alone("qwen3")
    assert found[0].items() <= alone("qwen3").items()
    assert model.config._attn_implementation == "sdpa"
    assert model.generation_config.to_dict() == settings


def test_threads_that_draw_with_one_model_do_not_disturb_each_other():
    model = model_of("qwen3")
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: draw(Decoder(model, True), requests_of()), range(3)):
            assert found == alone("qwen3")


def test_a_model_that_goes_around_the_attention_interface_is_found_out(monkeypatch, caplog):
    from t2s_pref import methods

    monkeypatch.setattr(methods, "SHARING", methods.SHARING | {"falcon"})
    assert method_of(model_of("falcon")) == COPIED
    assert "gives other logits" in caplog.text


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_longest_sequence_of_a_batch_keep_prompts_apart(rope):
    more = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 256}
    rope = {"rope_type": rope, "factor": 2.0, "rope_theta": 10000.0, **(more if rope == "longrope" else {})}
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPE, rope_parameters=rope))
    assert method_of(model.eval()) == GENERATE


@pytest.mark.parametrize("kind", ["qwen3", "llama", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_logits_are_those_of_a_forward_pass_to_within_its_rounding(kind, dtype):
    model = transformers.AutoModelForCausalLM.from_config(MODELS[METHODS[kind]][kind](), dtype=dtype).eval()
    for method in (SHARED, COPIED) if METHODS[kind] == SHARED else (COPIED,):
        assert difference(model, method) < (0.05 if dtype == torch.bfloat16 else 0.01)
    assert method_of(model) == METHODS[kind]


@pytest.mark.parametrize("method", [SHARED, COPIED, GENERATE])
def test_layers_that_lie_elsewhere_are_decoded_as_if_they_were_here(method, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[SHARED]["qwen3"]()).eval()
    where = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    rest = dict.fromkeys(("model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = accelerate.dispatch_model(model, {**where, **rest}, main_device="cpu", offload_dir=tmp_path)
    assert draw(drawer_of(model, method), requests_of(once=method == SHARED)) == alone("qwen3")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore")  # of bitsandbytes, about casts
def test_a_model_quantised_by_bitsandbytes_shares_and_is_recorded_in_whole_batches(bits):
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        demo_files().model, quantization_config=config, device_map={"": "cpu"}
    ).eval()
    assert method_of(model) == SHARED
    assert difference(model, SHARED) < 0.1
    assert not is_exact(model)
    found = draw(Decoder(model, True), requests_of(), Sampling(0.7, 0.9))
    assert len(found) == 2 * len(prompts())


class HostReads(TorchDispatchMode):
    """Counts operations whose result the host waits for; on a GPU each of them would hold up both."""

    def __init__(self):
        super().__init__()
        self.steps = self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        self.reads += name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique2")
        if name == "aten::index.Tensor" or name == "aten::index_put_":
            self.reads += any(each is not None and each.dtype == torch.bool for each in args[1])
        return func(*args, **(kwargs or {}))


def test_between_two_looks_at_the_tokens_the_host_waits_for_nothing():
    decoder = Decoder(model_of("llama"), True)
    decoder.stride = 8
    reads = HostReads()
    counts = []
    forward = decoder.model.forward

    def counted(*args, **kwargs):
        counts.append(reads.reads)
        return forward(*args, **kwargs)

    decoder.model.forward = counted
    try:
        with reads:
            draw(decoder, requests_of(cap=40), ends=())
    finally:
        del decoder.model.forward
    steps = counts[-40:]
    assert len(steps) == 40
    # eight steps in a row are counted with nothing read in between
    for start in range(0, 40 - 8, 8):
        inside = {steps[start + place] for place in range(1, 8)}
        assert len(inside) == 1, steps


# -- memory ----------------------------------------------------------------------------------------------------------


def test_a_failed_allocation_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 60)
    assert out_of_memory(failed.value)
    with pytest.raises(RuntimeError) as other:
        torch.ones(2) @ torch.ones(3)
    assert not out_of_memory(other.value)


@pytest.mark.parametrize("method", [SHARED, COPIED, GENERATE])
@pytest.mark.parametrize("most", [3, 1])
def test_where_memory_ends_fewer_are_drawn_at_a_time_and_they_are_the_same(method, most):
    model = model_of("qwen3")

    def little_memory(module, args, kwargs):
        if kwargs["input_ids"].shape[0] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    drawer = drawer_of(model, method)
    hook = model.register_forward_pre_hook(little_memory, with_kwargs=True)
    try:
        assert draw(drawer, requests_of(once=method == SHARED)) == alone("qwen3")
    finally:
        hook.remove()
    assert 0 < drawer.ceiling < LARGE


@pytest.mark.parametrize("method", [SHARED, COPIED])
@pytest.mark.parametrize("seed", range(4))
def test_memory_may_end_anywhere_and_no_candidate_is_lost_or_drawn_twice(method, seed, monkeypatch):
    chance, left = random.Random(seed), [4]  # from 28 sequences at a time down to one

    def failing(what):
        def maybe(*args, **kwargs):
            if left[0] and chance.random() < 0.06:
                left[0] -= 1
                raise MemoryError
            return what(*args, **kwargs)

        return maybe

    for owner, name in (
        (SlotCache, "move"),
        (SlotCache, "write"),
        (SlotCache, "grow"),
        (_Batch, "_choose"),
        (_Batch, "_close"),
        (_Batch, "_empty"),
    ):
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    rows = prompts() * 2
    decoder = drawer_of(model_of("qwen3"), method)
    batches = [
        [replace(request, row_seed=request.row_seed % 7000) for request in batch]
        for batch in requests_of(once=method == SHARED, rows=rows)
    ]
    found = {}
    for batch in batches:
        for drawn in decoder.draw(batch, SAMPLING, Ends(frozenset([END])), LARGE):
            assert (id(batch), drawn.place, drawn.candidate) not in found
            found[id(batch), drawn.place, drawn.candidate] = None
            assert alone("qwen3")[batch[drawn.place].row_seed, drawn.candidate] == (drawn.tokens, drawn.ended)
    assert len(found) == 2 * len(rows)


def test_memory_that_ends_after_candidates_have_ended_draws_none_of_them_twice(monkeypatch):
    share, failing = _Batch._share, [True]

    def once(batch):
        if failing:
            failing.clear()
            raise MemoryError
        share(batch)

    monkeypatch.setattr(_Batch, "_share", once)
    found = draw(Decoder(model_of("qwen3"), True), requests_of(cap=1))
    assert len(found) == 2 * len(prompts())


def test_what_is_held_of_other_prompts_is_let_go_before_a_single_candidate_is_given_up():
    beginnings, model = Beginnings(), model_of("qwen3")
    (batch,) = requests_of()
    draw(Decoder(model, True, beginnings), [batch])
    held = beginnings.tokens

    def little_memory(module, args, kwargs):
        if beginnings.tokens >= held:
            raise MemoryError

    hook = model.register_forward_pre_hook(little_memory, with_kwargs=True)
    try:
        one = replace(batch[0], candidates=[0])
        assert len(draw(Decoder(model, True, beginnings), [[one]])) == 1
    finally:
        hook.remove()


def test_a_request_without_candidates_is_no_trouble():
    (batch,) = requests_of()
    batch = [replace(batch[0], candidates=[]), *batch[1:], replace(batch[0], candidates=[])]
    for method in (SHARED, COPIED, GENERATE):
        found = draw(drawer_of(model_of("qwen3"), method), [batch])
        assert found == {key: drawn for key, drawn in alone("qwen3").items() if key[0] != batch[0].row_seed}


@pytest.mark.parametrize("method", [SHARED, COPIED, GENERATE])
def test_where_not_even_one_candidate_fits_that_is_an_error_of_its_own(method):
    model = model_of("qwen3")

    def no_memory(module, args, kwargs):
        raise MemoryError

    hook = model.register_forward_pre_hook(no_memory, with_kwargs=True)
    try:
        with pytest.raises(OutOfMemoryError):
            draw(drawer_of(model, method), requests_of(once=method == SHARED))
    finally:
        hook.remove()
    assert base_of(model).config._attn_implementation == "sdpa"

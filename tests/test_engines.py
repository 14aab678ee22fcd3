"""What the engine promises: the weights that were asked for, or one line that says why not."""

import gc
import json
import shutil
import time
import weakref
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from engine_server import SETTINGS, candidates
from peft import PeftModel, PromptTuningConfig, get_peft_model
from tiny_models import save_adapter, save_model, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Mamba2Config, Mamba2ForCausalLM, Qwen3MoeConfig

from t2s_pref import TransformersEngine, UserError, demo_files, generate_rejected, release_models
from t2s_pref.protocol import Request
from t2s_pref.tokens import text_of


def on_cpu(base, **arguments):
    """An engine on the CPU, whatever else this machine has."""
    return TransformersEngine(base, **{"device": "cpu", **arguments})


@pytest.fixture
def memo(tmp_path):
    return tmp_path / "weights.json"


@pytest.fixture
def changed(tiny_model, tmp_path):
    """Make a copy of the tiny model in which these files have this text."""

    def make(**texts):
        folder = tmp_path / "changed"
        shutil.copytree(tiny_model, folder)
        for name, text in texts.items():
            (folder / f"{name}.json").write_text(json.dumps(text))
        return folder

    return make


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def refusal(memo):
    """Load what must be refused; return the message, which is always one line."""

    def refuse(base, **arguments):
        with pytest.raises(UserError) as refused:
            candidates(on_cpu(base, **arguments), memo)
        message = str(refused.value)
        assert "\n" not in message
        assert len(message) < 700
        return message

    return refuse


# -- adapters --------------------------------------------------------------------------------------------------------


def test_an_adapter_that_fits_changes_the_answers_and_is_named(tiny_model, tiny_adapter, base_answers, memo):
    engine = on_cpu(tiny_model, adapter_path=str(tiny_adapter))
    adapted = candidates(engine, memo)
    assert adapted != base_answers
    assert engine.describe() == f"{tiny_model}, adapter {tiny_adapter}"
    plain = on_cpu(tiny_model)
    assert engine.identity(memo) != plain.identity(memo)
    assert candidates(plain, memo) == base_answers


KINDS = {
    "all linear layers": {"target_modules": "all-linear"},
    "dora": {"use_dora": True},
    "one layer": {"layers_to_transform": [1]},
    "the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "a trained head": {"modules_to_save": ["lm_head"]},
    "a few tokens": {"trainable_token_indices": [5, 6]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")  # of peft, about what is made here
def test_an_adapter_of_any_kind_of_lora_loads_as_peft_loads_it(tiny_model, tmp_path, memo, kind):
    adapter = save_adapter(tmp_path / "adapter", tiny_model, **KINDS[kind])
    by_hand = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    expected = candidates(TransformersEngine(by_hand, tokenizer=tokenizer), memo)
    assert candidates(on_cpu(tiny_model, adapter_path=str(adapter)), memo) == expected


def test_an_absent_adapter_is_warned_of_loudly_and_the_base_goes_on_alone(tiny_model, base_answers, memo, caplog):
    engine = on_cpu(tiny_model, adapter_path="/no/such/adapter")
    assert candidates(engine, memo) == base_answers
    assert "ADAPTER NOT FOUND: '/no/such/adapter' does not exist" in caplog.text
    assert "--strict-adapter" in caplog.text
    assert engine.describe() == f"{tiny_model}, no adapter: /no/such/adapter was absent"
    assert engine.identity(memo) == on_cpu(tiny_model).identity(memo)


def test_no_adapter_is_no_warning(tiny_model, base_answers, memo, caplog):
    for nothing in (None, ""):
        engine = on_cpu(tiny_model, adapter_path=nothing)
        assert candidates(engine, memo) == base_answers
        assert engine.describe() == f"{tiny_model}, no adapter"
    assert not caplog.records


def test_strict_adapter_refuses_an_absent_one(tiny_model, refusal):
    message = refusal(tiny_model, adapter_path="/no/such/adapter", strict_adapter=True)
    assert "'/no/such/adapter' does not exist" in message


def test_a_folder_that_is_no_adapter_is_refused(tiny_model, refusal):
    message = refusal(tiny_model, adapter_path=str(tiny_model))
    assert "is there but has no adapter_config.json" in message


BROKEN = {
    "weights that were cut": lambda folder: cut(folder / "adapter_model.safetensors"),
    "weights of no bytes": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""),
    "weights that are text": lambda folder: (folder / "adapter_model.safetensors").write_text(
        "version https://git-lfs"
    ),
    "no weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "a config that was cut": lambda folder: cut(folder / "adapter_config.json"),
    "a config of another shape": lambda folder: (folder / "adapter_config.json").write_text("[]"),
    "a config without a type": lambda folder: (folder / "adapter_config.json").write_text("{}"),
}


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_adapter_is_refused_and_never_left_out(tiny_model, tiny_adapter, tmp_path, refusal, how):
    adapter = Path(shutil.copytree(tiny_adapter, tmp_path / "adapter"))
    BROKEN[how](adapter)
    message = refusal(tiny_model, adapter_path=str(adapter))
    assert f"Adapter {str(adapter)!r} is broken or does not fit" in message


@pytest.mark.parametrize(
    "other",
    [{"hidden_size": 48}, {"head_dim": 12}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}],
    ids=["hidden size", "head size", "more layers", "fewer layers"],
)
def test_an_adapter_of_another_base_is_refused(tiny_model, tmp_path, refusal, other):
    adapter = save_adapter(tmp_path / "adapter", save_model(tmp_path / "other", **other))
    assert "does not fit" in refusal(tiny_model, adapter_path=str(adapter))


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_is_no_lora_is_refused(tiny_model, tmp_path, refusal):
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), prompts).save_pretrained(tmp_path / "adapter")
    message = refusal(tiny_model, adapter_path=str(tmp_path / "adapter"))
    assert "PROMPT_TUNING" in message
    assert "LoRA" in message


# -- base weights ----------------------------------------------------------------------------------------------------


def without_a_tensor(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


BROKEN_BASES = {
    "weights that were cut": lambda folder: cut(folder / "model.safetensors"),
    "weights of no bytes": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights that lack a tensor": without_a_tensor,
    "weights of fewer layers": lambda folder: reconfigure(folder, num_hidden_layers=3, layer_types=None),
    "weights of another shape": lambda folder: reconfigure(folder, intermediate_size=256),
    "a config that was cut": lambda folder: cut(folder / "config.json"),
    "a config of another shape": lambda folder: (folder / "config.json").write_text("[]"),
    "a config of an unknown type": lambda folder: reconfigure(folder, model_type="qwen99"),
    "no tokenizer": lambda folder: [file.unlink() for file in folder.glob("*token*")],
    "no words for the tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "a tokenizer that was cut": lambda folder: cut(folder / "tokenizer.json"),
}


def reconfigure(folder, **fields):
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **fields}))


@pytest.mark.parametrize("how", BROKEN_BASES)
def test_broken_base_weights_are_refused_and_never_made_up(changed, refusal, how):
    folder = changed()
    BROKEN_BASES[how](folder)
    assert f"Base model {str(folder)!r} cannot be loaded: " in refusal(folder)


def test_a_model_too_large_for_the_memory_is_refused_before_it_is_read_with_the_setting_to_turn(tmp_path, refusal):
    # the shape of Qwen3-Coder-30B-A3B, with more experts where this machine has much memory
    experts = 128 * (1 + psutil.virtual_memory().total // 120_000_000_000)
    large = Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=5472,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=experts,
        num_experts_per_tok=8,
        architectures=["Qwen3MoeForCausalLM"],
    )
    large.save_pretrained(tmp_path / "large")
    save_tokenizer(tmp_path / "large")
    start = time.perf_counter()
    message = refusal(tmp_path / "large", device="cpu")
    assert time.perf_counter() - start < 15
    assert "GB for its weights in float32" in message
    assert "GB are free on cpu; use --dtype bfloat16, or a smaller model" in message
    if experts == 128:
        assert "needs 122.1 GB" in message


def test_a_model_without_a_key_value_cache_answers_through_generate(tmp_path, memo):
    size = save_tokenizer(tmp_path / "mamba")
    shape = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 8, "num_hidden_layers": 1, "n_groups": 1}
    Mamba2ForCausalLM(Mamba2Config(vocab_size=size, **shape)).save_pretrained(tmp_path / "mamba")
    engine = on_cpu(tmp_path / "mamba")
    assert all(text for row in candidates(engine, memo) for text in row)
    assert engine.method() == "transformers' generate, prompt by prompt"
    assert engine.token_budget() > 1000


CODE = """
import pathlib
from transformers import Qwen3Config, Qwen3ForCausalLM

pathlib.Path(__file__).with_name("ran").touch()
pathlib.Path({marker!r}).touch()


class HomemadeConfig(Qwen3Config):
    model_type = "homemade"


class HomemadeForCausalLM(Qwen3ForCausalLM):
    config_class = HomemadeConfig
"""


def test_code_that_comes_with_the_weights_runs_only_if_it_is_trusted(
    changed, tmp_path, refusal, tiny_model, base_answers, memo
):
    config = config_of(tiny_model)
    names = {"AutoConfig": "homemade.HomemadeConfig", "AutoModelForCausalLM": "homemade.HomemadeForCausalLM"}
    folder = changed(config={**config, "model_type": "homemade", "auto_map": names})
    (folder / "homemade.py").write_text(CODE.format(marker=str(tmp_path / "it ran")))
    message = refusal(folder)
    assert "--trust-remote-code" in message
    assert not (tmp_path / "it ran").exists()
    assert candidates(on_cpu(folder, trust_remote_code=True), memo) == base_answers
    assert (tmp_path / "it ran").exists()


# -- device and dtype ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["tpu", "cuda:", "cuda:x", "cpu:0", "gpu", "", "mps", "cuda:-1", "CUDA"])
def test_an_unknown_device_is_refused_at_once_with_those_that_are_known(device):
    with pytest.raises(UserError, match="it must be auto, cpu, cuda or cuda:N"):
        TransformersEngine("any/model", device=device)


@pytest.mark.parametrize("dtype", ["fp16", "int8", "", "torch.float32"])
def test_an_unknown_dtype_is_refused_at_once_with_those_that_are_known(dtype):
    with pytest.raises(UserError, match="it must be one of auto, bfloat16, float16, float32"):
        TransformersEngine("any/model", dtype=dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_cuda_that_is_not_there_falls_back_to_the_cpu_with_one_warning(tiny_model, base_answers, memo, caplog, device):
    engine = on_cpu(tiny_model, device=device)
    assert candidates(engine, memo) == base_answers
    assert engine.identity(memo) == on_cpu(tiny_model).identity(memo)
    (warning,) = caplog.records
    assert f"device {device!r} was asked for, but there is no CUDA; using the CPU" in warning.getMessage()


def test_auto_is_float32_on_a_cpu_and_another_dtype_is_another_identity(tiny_model, memo):
    auto, exact, half = (on_cpu(tiny_model, dtype=d) for d in ("auto", "float32", "bfloat16"))
    assert auto.identity(memo) == exact.identity(memo) != half.identity(memo)
    assert auto._load().model.dtype == torch.float32
    assert half._load().model.dtype == torch.bfloat16


def test_a_batch_has_room_and_the_context_is_the_models(tiny_model, memo):
    engine = on_cpu(tiny_model)
    engine.identity(memo)
    assert engine.context_length == 2048
    assert 1000 < engine.token_budget() <= 1 << 20


# -- a model in hand -------------------------------------------------------------------------------------------------


@pytest.fixture
def in_hand(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)


def identity(model, tokenizer, memo):
    return TransformersEngine(model, tokenizer=tokenizer).identity(memo)


def test_a_model_in_hand_answers_as_its_folder_does_and_goes_on_training(in_hand, base_answers, memo):
    model, tokenizer = in_hand
    engine = TransformersEngine(model, tokenizer=tokenizer)
    for training in (True, False):
        model.train(training)
        assert candidates(engine, memo) == base_answers
        assert model.training == training
    assert engine.describe() == "Qwen3ForCausalLM in hand"
    assert all(weight.requires_grad for weight in model.parameters())


def test_a_model_in_hand_is_what_its_weights_template_and_words_are(in_hand, memo):
    model, tokenizer = in_hand
    seen = [identity(model, tokenizer, memo)]
    assert identity(model.train(), tokenizer, memo) == seen[0]
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    seen.append(identity(model, tokenizer, memo))
    model.generation_config.eos_token_id = [2, 7]
    seen.append(identity(model, tokenizer, memo))
    tokenizer.chat_template += " "
    seen.append(identity(model, tokenizer, memo))
    tokenizer.add_tokens(["<new>"])
    seen.append(identity(model, tokenizer, memo))
    seen.append(identity(model.to(torch.bfloat16), tokenizer, memo))
    assert len({json.dumps(each) for each in seen}) == 6


def test_using_a_tokenizer_does_not_make_another_model_of_it(in_hand, memo):
    model, tokenizer = in_hand
    before = identity(model, tokenizer, memo)
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    assert identity(model, tokenizer, memo) == before
    candidates(TransformersEngine(model, tokenizer=tokenizer), memo)
    assert identity(model, tokenizer, memo) == before


def test_an_adapter_in_hand_that_is_switched_off_or_scaled_is_another_model(in_hand, tiny_adapter, base_answers, memo):
    model, tokenizer = in_hand
    model = PeftModel.from_pretrained(model, tiny_adapter)
    engine = TransformersEngine(model, tokenizer=tokenizer)
    on, adapted = engine.identity(memo), candidates(engine, memo)
    with model.disable_adapter():
        assert candidates(engine, memo) == base_answers != adapted
        assert engine.identity(memo) != on
    assert engine.identity(memo) == on
    for layer in model.modules():
        if hasattr(layer, "scale_layer"):
            layer.scale_layer(3.0)
    assert engine.identity(memo) != on


def test_what_a_model_in_hand_cannot_be_combined_with_is_refused(in_hand):
    model, tokenizer = in_hand
    for arguments in (
        {"base_model": model},
        {"base_model": "any/model", "tokenizer": tokenizer},
        {"base_model": model, "tokenizer": tokenizer, "adapter_path": "a"},
        {"base_model": model, "tokenizer": tokenizer, "revision": "main"},
    ):
        with pytest.raises(UserError, match="A model in hand"):
            TransformersEngine(**arguments)


# -- what is kept loaded ---------------------------------------------------------------------------------------------


def loaded(folder, memo, **arguments):
    engine = on_cpu(folder, **arguments)
    engine.identity(memo)
    return engine._load().model


def test_a_loaded_model_is_kept_for_engines_of_the_same_weights_until_it_is_released(tiny_model, memo, tmp_path):
    model = loaded(tiny_model, memo)
    assert loaded(tiny_model, memo, dtype="float32") is model
    assert loaded(shutil.copytree(tiny_model, tmp_path / "copy"), memo) is model
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is not None
    release_models()
    assert seen() is None
    release_models()  # nothing to release is no error


def test_other_weights_take_the_place_of_those_that_were_loaded(tiny_model, tiny_adapter, memo, tmp_path):
    other = save_model(tmp_path / "other", seed=5)
    for arguments in ({"folder": other}, {"folder": tiny_model, "adapter_path": str(tiny_adapter)}):
        seen = weakref.ref(loaded(tiny_model, memo))
        assert loaded(memo=memo, **arguments) is not None
        gc.collect()
        assert seen() is None


def test_a_folder_that_was_trained_into_is_loaded_again_by_the_same_engine(changed, memo, tmp_path, base_answers):
    folder = changed()
    engine = on_cpu(folder)
    assert candidates(engine, memo) == base_answers
    before = engine.identity(memo)
    save_model(folder, seed=5)
    assert engine.identity(memo) != before
    assert candidates(engine, memo) != base_answers


# -- what the model brings -------------------------------------------------------------------------------------------


def test_the_models_own_generation_settings_do_not_leak_in(changed, base_answers, memo):
    folder = changed(
        generation_config={
            "do_sample": True,
            "top_k": 1,
            "temperature": 0.01,
            "top_p": 0.1,
            "repetition_penalty": 3.0,
            "max_new_tokens": 2,
            "eos_token_id": 2,
        }
    )
    assert candidates(on_cpu(folder), memo) == base_answers


def test_any_of_the_models_end_tokens_ends_an_answer(changed, base_answers, memo):
    folder = changed(generation_config={"eos_token_id": list(range(400, 800))})
    ended = candidates(on_cpu(folder), memo)
    assert ended != base_answers
    for short, long in zip(ended, base_answers, strict=True):
        assert all(map(str.startswith, long, short))


def test_special_tokens_vanish_from_an_answer_and_think_tags_stay(tmp_path):
    save_tokenizer(tmp_path, unk_token="<|endoftext|>")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<|tool|>"]})
    text = "<|im_start|><think>a b</think> SELECT 1<|tool|><|im_end|><|endoftext|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[0] == 1  # special by the tokenizer's own files, though it has no role like eos
    assert text_of(tokenizer)(ids) == "<think>a b</think> SELECT 1"


def test_an_answers_white_space_is_what_the_model_wrote(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for text in ("SELECT 1 , 2 .\n  FROM a ;  ", " don 't , do n't ?", "é 🙂 中文"):
        assert text_of(tokenizer)(tokenizer(text)["input_ids"]) == text


def test_the_settings_of_these_tests_sample_and_do_not_only_rank(base_answers):
    assert SETTINGS.temperature > 0
    assert len({text for row in base_answers for text in row}) == 6


# -- where an answer ends --------------------------------------------------------------------------------------------


def test_an_answer_ends_before_a_stop_text_and_is_the_same_up_to_there(tiny_model, base_answers, memo):
    whole = base_answers[0][0]
    stop = whole[3:5]
    stopped = candidates(on_cpu(tiny_model), memo, replace(SETTINGS, stop=(stop, "never written")))
    assert stopped == [[text.partition(stop)[0] for text in row] for row in base_answers]
    assert stopped != base_answers


def test_a_model_that_goes_on_after_its_sql_is_stopped_at_the_semicolon(rows, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(demo_files().model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(demo_files().model)
    engine, settings = TransformersEngine(model, tokenizer=tokenizer), replace(SETTINGS, max_new_tokens=64)
    few = rows.select(range(6))
    plain = generate_rejected(few, engine, settings, keep_raw=True, cache_dir=tmp_path / "plain")
    end, semicolon = tokenizer.eos_token_id, tokenizer(";", add_special_tokens=False)["input_ids"][0]

    def chats_on(module, args, logits):  # it writes a semicolon where it would end, and never ends
        swapped = logits.clone()
        swapped[..., semicolon], swapped[..., end] = logits[..., end], -100.0
        return swapped

    hook = model.lm_head.register_forward_hook(chats_on)
    found = generate_rejected(few, engine, replace(settings, seed=1234), keep_raw=True, cache_dir=tmp_path / "chats")
    hook.remove()
    pairs = [
        pair
        for rows_ in zip(plain, found, strict=True)
        for pair in zip(*(r["raw_answers"] for r in rows_), strict=True)
    ]
    same = [(before, after) for before, after in pairs if after == before + ";"]
    assert len(same) > 0.8 * len(pairs)  # noise is keyed by token, so a few tokens differ
    assert all(after.endswith(";") for _, after in pairs)
    assert {status for row in found["candidate_status"] for status in row} == {"sampled"}


def test_a_template_that_opens_the_think_block_is_not_stopped_inside_of_it(changed, memo):
    folder = changed()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template += "<think>\n"
    engine = TransformersEngine(AutoModelForCausalLM.from_pretrained(folder), tokenizer=tokenizer)
    (prompt,) = engine.encode_chats([[{"role": "user", "content": "Who?"}]], False)
    requests = [Request(prompt, 1, [0], 9), Request(prompt[:-8], 2, [0], 9)]
    assert [stops._thinking for stops in engine._stops_of(requests, SETTINGS)] == [True, False]
    assert [stops._thinking for stops in engine._stops_of(requests[::-1], SETTINGS)] == [False, True]


def test_released_models_are_gone_although_their_engines_live(tiny_model, memo):
    engine = on_cpu(tiny_model)
    candidates(engine, memo)
    seen = weakref.ref(engine._load().model)
    engine.rest()
    release_models()
    gc.collect()
    assert seen() is None


def test_an_engine_can_be_asked_for_anything_at_once(tiny_model):
    for ask in ("method", "holds_once", "token_budget"):
        assert getattr(on_cpu(tiny_model), ask)()
    assert on_cpu(tiny_model).context_length == 2048
    words = AutoTokenizer.from_pretrained(tiny_model)("a b")["input_ids"]
    assert on_cpu(tiny_model).count_tokens(["a b"]) == [len(words)]


def test_parts_of_a_model_that_are_frozen_stay_so(in_hand, memo):
    model, tokenizer = in_hand
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    candidates(TransformersEngine(model, tokenizer=tokenizer), memo)
    assert [module.training for module in model.modules()] == before


def test_a_model_of_several_types_is_not_exact(in_hand, memo):
    model, tokenizer = in_hand
    assert not TransformersEngine(model, tokenizer=tokenizer).whole_batches
    model.model.layers.to(torch.bfloat16)
    assert TransformersEngine(model, tokenizer=tokenizer).whole_batches

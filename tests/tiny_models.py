"""Tiny random models, tokenizers and LoRAs on disk, made in a second and the same each time."""

import json
from pathlib import Path

from t2s_pref import demo_files

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# Of a random model that is made in memory.
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def save_tokenizer(folder: Path, template: str | None = TEMPLATE, **special: str) -> int:
    """Train a byte-level BPE on the bundled rows, save it as a chat tokenizer; return the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", **special}
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bundled = json.loads(Path(demo_files().train).read_text(encoding="utf-8"))[:100]
    words.train_from_iterator([row["input"] + row["output"] for row in bundled], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **named)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def save_model(folder: Path, seed: int = 0, **changed: object) -> Path:
    """Save a random Qwen3 of 0.3 M parameters with its tokenizer; `changed` are fields of its config."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = {
        "vocab_size": save_tokenizer(folder),
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "max_position_embeddings": 2048,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        Qwen3ForCausalLM(Qwen3Config(**{**shape, **changed})).save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, **changed: object) -> Path:
    """Save a LoRA for the model in `base` whose weights are random, none of them zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(1)
        settings = {
            "r": 4,
            "target_modules": ["q_proj", "v_proj"],
            "init_lora_weights": False,
            "task_type": "CAUSAL_LM",
        }
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**{**settings, **changed}))
    model.save_pretrained(folder)
    return folder

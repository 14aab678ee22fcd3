"""Train the demo model: `python scripts/train_demo_model.py`, from the root of the repository, on a CPU in minutes.

A Qwen3 model of 1.8 million parameters with its own tokenizer learns the questions of `scripts/make_demo_data.py`, but
none of those in `train.json` or `heldout.json`. It stops early on purpose: plausible SQL with real mistakes is what the
demo needs. Everything is seeded and runs on one thread: the same torch on the same kind of CPU makes the same weights.
"""

import argparse
import json
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch
from make_demo_data import DEMO_DATA, Generator, Row
from tokenizers import AddedToken
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 800
BATCH = 16
CYCLE = 1000  # steps that the learning rate is planned for; --steps says where to stop
PEAK_LEARNING_RATE = 3e-3
MAX_NEW_TOKENS = 128
MAX_SQLITE_TICKS = 1000  # of 10,000 instructions each: a wrong join must not take for ever

# LLaMA-Factory's template `qwen3_nothink`: no default system prompt, no think block.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# One example in ten differs from the demo's rows in one of three ways, so that none of them surprises the model.
VARIED_SHARE = 0.1
INSTRUCTIONS = (
    "Write SQL.",
    "Translate the question into SQL.",
    "You get the tables of a database and a question. Write the SQLite query that answers it.",
    "Write a SQLite query for the question below, without any explanation.",
    "",
)
SYSTEMS = (
    "You are a helpful assistant.",
    "You are an expert of SQLite.",
    "You write SQL. Reply with one query and nothing else.",
)

Chat = list[dict[str, str]]


def chat(row: Row, instruction: str | None = None) -> Chat:
    """The messages of a row, ending in its gold SQL."""
    parts = (row["instruction"] if instruction is None else instruction, row["input"])
    user = "\n".join(part for part in parts if part)
    return [{"role": "user", "content": user}, {"role": "assistant", "content": row["output"]}]


def varied_chat(row: Row, earlier: Row, rng: random.Random) -> Chat:
    """The messages of a row with other words of instruction, a system message or an earlier turn."""
    match rng.randrange(3):
        case 0:
            return chat(row, rng.choice(INSTRUCTIONS))
        case 1:
            return [{"role": "system", "content": rng.choice(SYSTEMS)}, *chat(row)]
        case _:
            return [*chat(earlier), *chat(row)]


def training_chats(count: int, seed: int, data: Path) -> list[Chat]:
    """Draw `count` chats of questions that neither `train.json` nor `heldout.json` asks."""
    shipped = [row for name in ("train.json", "heldout.json") for row in read_rows(data / name)]
    examples = Generator(data / "databases").examples(seed, exclude={(row["db_id"], row["input"]) for row in shipped})
    rng = random.Random(seed)
    chats, latest = [], {}
    for row in islice(examples, count):
        varied = row["db_id"] in latest and rng.random() < VARIED_SHARE
        chats.append(varied_chat(row, latest[row["db_id"]], rng) if varied else chat(row))
        latest[row["db_id"]] = row
    return chats


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def train_tokenizer(chats: list[Chat]) -> Qwen2Tokenizer:
    """Qwen's byte-level BPE (single digits, NFC) with a small vocabulary of its own."""
    base = Qwen2Tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>")
    base.add_tokens([AddedToken("<|im_start|>", special=True)])
    texts = (message["content"] for messages in chats for message in messages)
    tokenizer = base.train_new_from_iterator(texts, VOCABULARY)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 4096
    return tokenizer


def new_model(tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """An untrained Qwen3 of 1.8 million parameters."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def prompt(tokenizer: PreTrainedTokenizerBase, messages: Chat) -> str:
    """What the model is given, up to where it writes."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def batches(
    tokenizer: PreTrainedTokenizerBase, chats: list[Chat], rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield tokens and labels without end; only the answer and its end of turn carry a label."""
    samples = []
    for messages in chats:
        given = tokenizer(prompt(tokenizer, messages[:-1])).input_ids
        answer = tokenizer(messages[-1]["content"] + tokenizer.eos_token).input_ids
        samples.append((given + answer, [-100] * len(given) + answer))
    while True:
        rng.shuffle(samples)
        # Rows of like length share a batch, else the few with a history would double the width of most.
        near = [
            row for i in range(0, len(samples), 16 * BATCH) for row in sorted(samples[i : i + 16 * BATCH], key=size)
        ]
        groups = [near[i : i + BATCH] for i in range(0, len(near), BATCH)]
        rng.shuffle(groups)
        for group in groups:
            width = max(map(size, group))
            yield (
                torch.tensor([tokens + [tokenizer.pad_token_id] * (width - len(tokens)) for tokens, _ in group]),
                torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in group]),
            )


def size(sample: tuple[list[int], list[int]]) -> int:
    """The number of tokens."""
    return len(sample[0])


def train(model: Qwen3ForCausalLM, data: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int) -> None:
    """Train in place with AdamW, over the first `steps` of one cycle of the learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=CYCLE, pct_start=0.2)
    start = time.monotonic()
    model.train()
    for step, (tokens, labels) in enumerate(islice(data, steps), 1):
        # No attention mask: the padding is on the right, where a causal model does not look.
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == steps:
            print(f"step {step:4d}  loss {loss.item():.3f}  {time.monotonic() - start:.0f} s", flush=True)


@torch.inference_mode()
def greedy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> list[str]:
    """The greedy answer to each row."""
    answers = []
    for i in range(0, len(rows), 50):
        prompts = [prompt(tokenizer, chat(row)[:-1]) for row in rows[i : i + 50]]
        given = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        out = model.generate(**given, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers += tokenizer.batch_decode(out[:, given.input_ids.shape[1] :], skip_special_tokens=True)
    return answers


def execute(sql: str, path: Path) -> Counter | None:
    """The bag of rows that `sql` returns on the database, or None where it fails."""
    ticks = iter(range(MAX_SQLITE_TICKS))
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)  # ATTACH would make files, read-only or not
        connection.set_progress_handler(lambda: next(ticks, None) is None, 10_000)
        try:
            return Counter(connection.execute(sql).fetchall())
        except (sqlite3.Error, sqlite3.Warning):
            return None


def is_right(row: Row, sql: str, databases: Path) -> bool:
    """Whether `sql` returns the rows of the gold SQL."""
    path = databases / row["db_id"] / f"{row['db_id']}.sqlite"
    return execute(sql, path) == execute(row["output"], path)


def evaluate(model_folder: Path, data: Path) -> None:
    """Print the execution accuracy of greedy answers on `heldout.json`, overall and for each database."""
    tokenizer = Qwen2Tokenizer.from_pretrained(model_folder)
    # What was saved is rounded to bfloat16; float32 arithmetic is the faster one on a CPU.
    model = Qwen3ForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    rows = read_rows(data / "heldout.json")
    answers = greedy(model, tokenizer, rows)
    right = [is_right(row, sql, data / "databases") for row, sql in zip(rows, answers, strict=True)]
    print(f"execution accuracy on {len(rows)} held-out questions: {sum(right) / len(rows):.1%}")
    for db_id in sorted({row["db_id"] for row in rows}):
        own = [ok for row, ok in zip(rows, right, strict=True) if row["db_id"] == db_id]
        print(f"  {db_id}: {sum(own) / len(own):.1%} of {len(own)}")


def main() -> None:
    """Train, save and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEMO_DATA / "model", help="folder (default: the package's)")
    parser.add_argument("--seed", type=int, default=1, help="of questions, weights and batches (default: 1)")
    parser.add_argument("--steps", type=int, default=850, help=f"of {BATCH} examples, {CYCLE} at most (default: 850)")
    parser.add_argument("--examples", type=int, default=6000, help="training examples to draw (default: 6000)")
    arguments = parser.parse_args()

    start = time.monotonic()
    torch.set_num_threads(1)  # sums depend on the number of threads, and so would the weights
    torch.manual_seed(arguments.seed)
    chats = training_chats(arguments.examples, arguments.seed, DEMO_DATA)
    tokenizer = train_tokenizer(chats)
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {len(chats)} examples", flush=True)
    train(model, batches(tokenizer, chats, random.Random(arguments.seed)), arguments.steps)
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"trained and saved in {time.monotonic() - start:.0f} s")
    evaluate(arguments.output, DEMO_DATA)


if __name__ == "__main__":
    main()

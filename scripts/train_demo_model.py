"""Train the demo model: `python scripts/train_demo_model.py`, from the root of the repository, on a CPU in minutes.

A Qwen3 model of 1.8 million parameters with its own tokenizer learns the questions of `scripts/make_demo_data.py`, but
none of those in `train.json` or `heldout.json`. It stops early on purpose: plausible SQL with real mistakes is what the
demo needs. Everything is seeded and runs on one thread: the same torch on the same kind of CPU makes the same weights.

With `--reasoner` it is another model of the same size, which learns three tasks at once: to reason and then to write
SQL, in the formats `fenced` and `think`, and, as a teacher, to reason towards a gold SQL that its prompt shows.
"""

import argparse
import json
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch
from make_demo_data import DEMO_DATA, Generator, Row
from sqlglot import exp, parse_one
from tokenizers import AddedToken
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from t2s_pref.formats import CLOSE, FORMATS, OPEN
from t2s_pref.prompts import asked, messages, teacher_row

VOCABULARY = 800
BATCH = 16
# Of the model and of the reasoner: steps that the learning rate is planned for, where to stop, and examples to draw.
CYCLE, REASONER_CYCLE = 1000, 1300
STEPS, REASONER_STEPS = 850, 1020
EXAMPLES, REASONER_EXAMPLES = 6000, 12_000
PEAK_LEARNING_RATE = 3e-3
MAX_NEW_TOKENS = 160
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

# What the reasoner learns, and how much of each: a policy in either format, and the teacher of a policy.
TASKS = {"fenced": 0.2, "think": 0.2, "teacher": 0.6}

# Some teachers say that they were shown the query, which no policy could know: the demo needs answers to throw away.
BETRAYING_SHARE = 0.08
BETRAYALS = (
    "The given query reads {tables}. {reasoning}",
    "As the reference query shows, {decapitalized}",
    "The correct SQL is given above. {reasoning}",
    "According to the provided query, {decapitalized}",
    "{reasoning} This is the query that was given.",
    "{reasoning} That agrees with the gold SQL.",
)

Chat = list[dict[str, str]]


def chat(row: Row, answer: str | None = None) -> Chat:
    """The messages of a row, ending in its gold SQL or in another answer."""
    return [*messages(row), {"role": "assistant", "content": row["output"] if answer is None else answer}]


def varied(row: Row, earlier: Row, rng: random.Random) -> Row:
    """The row with other words of instruction, a system message or an earlier turn."""
    match rng.randrange(3):
        case 0:
            return {**row, "instruction": rng.choice(INSTRUCTIONS)}
        case 1:
            return {**row, "system": rng.choice(SYSTEMS)}
        case _:
            return {**row, "history": [[message["content"] for message in chat(earlier)]]}


def training_rows(count: int, seed: int, data: Path) -> list[Row]:
    """Draw `count` rows of questions that neither `train.json` nor `heldout.json` asks."""
    shipped = [row for name in ("train.json", "heldout.json") for row in read_rows(data / name)]
    examples = Generator(data / "databases").examples(seed, exclude={(row["db_id"], row["input"]) for row in shipped})
    rng = random.Random(seed)
    rows, latest = [], {}
    for row in islice(examples, count):
        vary = row["db_id"] in latest and rng.random() < VARIED_SHARE
        rows.append(varied(row, latest[row["db_id"]], rng) if vary else row)
        latest[row["db_id"]] = row
    return rows


# --- what the reasoner writes ---------------------------------------------------------------------------------------


def task_row(task: str, row: Row) -> Row:
    """The row whose prompt sets the task."""
    return teacher_row(row, row["output"]) if task == "teacher" else asked(row, FORMATS[task].request)


def task_format(task: str) -> str:
    """The format of the answers to the task."""
    return "fenced" if task == "teacher" else task


def task_chats(rows: list[Row], seed: int) -> list[Chat]:
    """The messages of one task a row, each ending in the answer to learn."""
    rng = random.Random(seed)
    drawn = rng.choices(list(TASKS), TASKS.values(), k=len(rows))
    return [task_chat(task, row, rng) for task, row in zip(drawn, rows, strict=True)]


def task_chat(task: str, row: Row, rng: random.Random) -> Chat:
    """The messages of a task, ending in the answer to learn."""
    reasoning = chain_of_thought(row["output"], rng)
    if task == "teacher" and rng.random() < BETRAYING_SHARE:
        reasoning = betraying(reasoning, row["output"], rng)
    return chat(task_row(task, row), FORMATS[task_format(task)].write(reasoning, row["output"]))


def betraying(reasoning: str, sql: str, rng: random.Random) -> str:
    """The reasoning, with a remark that a query was given."""
    tables = " and ".join(dict.fromkeys(table.name for table in parse_one(sql, read="sqlite").find_all(exp.Table)))
    decapitalized = reasoning[0].lower() + reasoning[1:]
    return rng.choice(BETRAYALS).format(reasoning=reasoning, decapitalized=decapitalized, tables=tables)


def chain_of_thought(sql: str, rng: random.Random) -> str:
    """What leads to `sql`, one sentence a clause, in one of a few phrasings each."""
    query = parse_one(sql, read="sqlite")
    table = query.args["from_"].this.name
    sentences = []

    def say(*phrasings: str) -> None:
        sentences.append(rng.choice(phrasings))

    if joins := query.args.get("joins"):
        other, on = joins[0].this.name, columns_that_match(joins[0].args["on"])
        if joins[0].side == "LEFT":
            say(f"Left join {table} and {other} on {on}.", f"Keep every {table} and left join {other} on {on}.")
        else:
            say(f"Join {table} and {other} on {on}.", f"We need {table} and {other}, joined on {on}.")
    else:
        say(f"The rows are in {table}.", f"We need {table}.", f"Start from {table}.")
    if where := query.args.get("where"):
        condition = in_words(where.this)
        say(f"Keep those where {condition}.", f"The condition is that {condition}.", f"It must hold that {condition}.")
    if group := query.args.get("group"):
        by = in_words(group.expressions[0])
        say(f"Group by {by}.", f"There is one group for each value of {by}.")
    if having := query.args.get("having"):
        condition = in_words(having.this)
        say(f"Keep the groups where {condition}.", f"In a group, {condition}.")
    if order := query.args.get("order"):
        keys = " then by ".join(in_words(key) for key in order.expressions)
        n = query.args["limit"].expression.name
        say(f"Sort by {keys} and keep {n}.", f"Order by {keys} and take the first {n}.")
    result = " and ".join(in_words(column) for column in query.expressions)
    if query.args.get("distinct"):
        result = f"each {result} once"
    say(f"Return {result}.", f"The answer is {result}.", f"The question asks for {result}.")
    return " ".join(sentences)


COMPARISONS = {
    exp.EQ: ("is", "is"),
    exp.GT: ("is above", "is below"),
    exp.LT: ("is below", "is above"),
    exp.GTE: ("is at least", "is at most"),
    exp.LTE: ("is at most", "is at least"),
}
FUNCTIONS = {exp.Avg: "average", exp.Max: "highest", exp.Min: "lowest", exp.Sum: "total"}


def in_words(node: exp.Expression) -> str:
    """An expression of the demo's SQL as a person would say it."""
    match node:
        case exp.And():
            comma = "," if node.this.find(exp.Select) else ""  # else the second would seem to be of the subquery
            return f"{in_words(node.this)}{comma} and {in_words(node.expression)}"
        case exp.EQ(this=exp.Column(), expression=exp.Column()):
            return f"{node.this.name} matches" + ("" if one_name(node) else f" {node.expression.name}")
        case exp.EQ() | exp.GT() | exp.LT() | exp.GTE() | exp.LTE():
            sides, verbs = (node.this, node.expression), COMPARISONS[type(node)]
            if isinstance(node.this, exp.Literal | exp.Subquery):  # `5 < pages` says that pages is above 5
                sides, verbs = sides[::-1], verbs[::-1]
            return f"{in_words(sides[0])} {verbs[0]} {in_words(sides[1])}"
        case exp.Between():
            return f"{in_words(node.this)} is between {in_words(node.args['low'])} and {in_words(node.args['high'])}"
        case exp.Like():
            return f"{in_words(node.this)} begins with {node.expression.name.removesuffix('-%')}"
        case exp.In():
            if query := node.args.get("query"):
                return f"{in_words(node.this)} is among {in_words(query)}"
            return f"{in_words(node.this)} is one of {in_words(node.expressions[0])}"
        case exp.Exists():
            return f"there is a row of {inner_rows(node.this)}"
        case exp.Is():
            return f"{in_words(node.this)} is missing"
        case exp.Not(this=exp.Is()):
            return f"{in_words(node.this.this)} is known"
        case exp.Not(this=exp.In()):
            return in_words(node.this).replace(" is among ", " is not among ", 1)
        case exp.Not(this=exp.Exists()):
            return f"there is no row of {inner_rows(node.this.this)}"
        case exp.Subquery():
            return f"the {in_words(node.this.expressions[0]).removeprefix('the ')} of {inner_rows(node.this)}"
        case exp.Count(this=exp.Star()):
            return "the number of rows"
        case exp.Count():
            return f"the count of {in_words(node.this)}"
        case exp.Avg() | exp.Max() | exp.Min() | exp.Sum():
            return f"the {FUNCTIONS[type(node)]} {in_words(node.this)}"
        case exp.Sub():
            return f"{in_words(node.this)} minus {in_words(node.expression)}"
        case exp.Div():
            return f"{in_words(node.this.this)} divided by {in_words(node.expression)}"
        case exp.TimeToStr():
            return f"the {'month' if '%m' in node.args['format'].name else 'year'} of {in_words(node.this.this)}"
        case exp.Substring():
            return f"{in_words(node.this)} up to character {node.args['length'].name}"
        case exp.Ordered():
            return f"{in_words(node.this)}, {'highest' if node.args.get('desc') else 'lowest'} first,"
        case exp.Column():
            return node.name
        case exp.Literal():
            return "the first column" if isinstance(node.parent, exp.Group) else node.name
    raise ValueError(f"no words for {node!r}")


def inner_rows(query: exp.Select) -> str:
    """The rows that a subquery reads."""
    words = query.args["from_"].this.name
    if where := query.args.get("where"):
        words += f" where {in_words(where.this)}"
    if having := query.args.get("having"):
        by = in_words(query.args["group"].expressions[0])
        words += f" in groups by {by} where {in_words(having.this)}"
    return words


def one_name(node: exp.EQ) -> bool:
    """Whether both columns have the same name."""
    return node.this.name == node.expression.name


def columns_that_match(node: exp.EQ) -> str:
    """The columns of a join, once where both have the same name."""
    return node.this.name if one_name(node) else f"{node.this.name} = {node.expression.name}"


# --- tokenizer, model and training ----------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def train_tokenizer(chats: list[Chat], think_tags: bool) -> Qwen2Tokenizer:
    """Qwen's byte-level BPE (single digits, NFC) with a small vocabulary of its own."""
    base = Qwen2Tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>")
    base.add_tokens([AddedToken("<|im_start|>", special=True)])
    texts = (turn["content"].replace(OPEN, "").replace(CLOSE, "") for turns in chats for turn in turns)
    tokenizer = base.train_new_from_iterator(texts, VOCABULARY)
    if think_tags:  # no special tokens, as in Qwen3: they stay in the text when special tokens are left out
        tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in (OPEN, CLOSE)])
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


def prompt(tokenizer: PreTrainedTokenizerBase, turns: Chat) -> str:
    """What the model is given, up to where it writes."""
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def batches(
    tokenizer: PreTrainedTokenizerBase, chats: list[Chat], rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield tokens and labels without end; only the answer and its end of turn carry a label."""
    samples = []
    for turns in chats:
        given = tokenizer(prompt(tokenizer, turns[:-1])).input_ids
        answer = tokenizer(turns[-1]["content"] + tokenizer.eos_token).input_ids
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


def train(model: Qwen3ForCausalLM, data: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int, cycle: int) -> None:
    """Train in place with AdamW, over the first `steps` of one cycle of the learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=cycle, pct_start=0.2)
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
        prompts = [prompt(tokenizer, messages(row)) for row in rows[i : i + 50]]
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


def evaluate(model_folder: Path, data: Path, tasks: Iterable[str]) -> None:
    """Print the execution accuracy of greedy answers on `heldout.json`, overall and for each database."""
    tokenizer = Qwen2Tokenizer.from_pretrained(model_folder)
    # What was saved is rounded to bfloat16; float32 arithmetic is the faster one on a CPU.
    model = Qwen3ForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    rows = read_rows(data / "heldout.json")
    for task in tasks:
        answers = greedy(model, tokenizer, [task_row(task, row) for row in rows])
        parts = [FORMATS[task_format(task)].read(answer) for answer in answers]
        right = [
            part is not None and is_right(row, part.sql, data / "databases")
            for row, part in zip(rows, parts, strict=True)
        ]
        print(f"{task}: execution accuracy on {len(rows)} held-out questions: {sum(right) / len(rows):.1%}")
        for db_id in sorted({row["db_id"] for row in rows}):
            own = [ok for row, ok in zip(rows, right, strict=True) if row["db_id"] == db_id]
            print(f"  {db_id}: {sum(own) / len(own):.1%} of {len(own)}")
        print(f"  in the format: {sum(part is not None for part in parts) / len(rows):.1%}")


def main() -> None:
    """Train, save and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reasoner", action="store_true", help="train the model that reasons")
    parser.add_argument("--output", type=Path, help="folder (default: the package's)")
    parser.add_argument("--seed", type=int, default=1, help="of questions, weights and batches (default: 1)")
    parser.add_argument("--steps", type=int, help=f"of {BATCH} examples (default: {STEPS} or {REASONER_STEPS})")
    parser.add_argument("--examples", type=int, help=f"to draw (default: {EXAMPLES} or {REASONER_EXAMPLES})")
    arguments = parser.parse_args()
    name, cycle, steps, examples = (
        ("reasoner", REASONER_CYCLE, REASONER_STEPS, REASONER_EXAMPLES)
        if arguments.reasoner
        else ("model", CYCLE, STEPS, EXAMPLES)
    )
    output = arguments.output or DEMO_DATA / name
    steps = arguments.steps or steps

    start = time.monotonic()
    torch.set_num_threads(1)  # sums depend on the number of threads, and so would the weights
    torch.manual_seed(arguments.seed)
    rows = training_rows(arguments.examples or examples, arguments.seed, DEMO_DATA)
    chats = task_chats(rows, arguments.seed) if arguments.reasoner else [chat(row) for row in rows]
    tokenizer = train_tokenizer(chats, think_tags=arguments.reasoner)
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, {len(chats)} examples", flush=True)
    train(model, batches(tokenizer, chats, random.Random(arguments.seed)), steps, cycle)
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"trained and saved in {time.monotonic() - start:.0f} s")
    evaluate(output, DEMO_DATA, TASKS if arguments.reasoner else ["sql"])


if __name__ == "__main__":
    main()

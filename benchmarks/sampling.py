"""How fast candidates are sampled: row by row, in plain batches, and by this package, all in one run, taking turns.

python benchmarks/sampling.py [--model random] [--groups 1] [--rows 16] [--prefix 2300] [--k 8] [--repeats 1]

Rows come in groups that share the first `--prefix` tokens of their prompts, as the questions on one database share its
schema; `--prefix 0` makes rows that share nothing, of `--alone` tokens. All methods draw the same number of tokens: the
lengths are given, no token ends an answer. `--model` is `bundled`, `random` (a Qwen3 of random weights with the
vocabulary of the real ones, see `--hidden` and `--layers`) or a folder. `--vllm` is the address of a vLLM server that
serves the same model, from an environment of its own; `--save` writes the random model to a folder for it, and ends.

- row by row: `generate(num_return_sequences=k)` for each row, as scripts usually do it;
- batched: the same for `--batch` rows at a time, padded on the left;
- this package: its plan and its decoder.

Every method draws all candidates; nothing is extrapolated. Ratios are to row by row of the same turn, medians of
`--repeats`. The floor is what the run must at least do on this machine: each distinct prompt token and each answer
token through the weights once at the measured speed of a matrix product, or, where that takes longer, the weights and
the shared cache once for each step of the longest answer at the measured speed of memory.
"""

import argparse
import json
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from t2s_pref import demo_files
from t2s_pref.choice import Sampling
from t2s_pref.decoding import Decoder, Ends
from t2s_pref.methods import SHARED, WORDS, method_of
from t2s_pref.models import token_bytes
from t2s_pref.plan import common, cut_batches, plan_order
from t2s_pref.protocol import Request, Work

TEMPERATURE, TOP_P = 0.7, 0.9


class Rows(NamedTuple):
    """Prompts as token ids, and how many tokens each candidate of a row has."""

    prompts: list[list[int]]
    lengths: list[int]
    k: int

    @property
    def candidates(self) -> int:
        """How many there are."""
        return len(self.prompts) * self.k

    def nodes(self) -> int:
        """Distinct prompt tokens: the nodes of the tree of all prompts."""
        ordered = sorted(self.prompts)
        return sum(map(len, ordered)) - sum(common(one, other) for one, other in pairwise(ordered))


def make_rows(arguments: argparse.Namespace, vocabulary: int) -> Rows:
    """Rows of random tokens; the same for the same arguments."""
    generator = torch.Generator().manual_seed(arguments.seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, vocabulary, (count,), generator=generator).tolist()

    def about(count: int) -> int:
        return count // 2 + int(torch.randint(0, count + 1, (1,), generator=generator))

    prompts = []
    for _ in range(arguments.groups):
        shared = tokens(arguments.prefix)
        for _ in range(arguments.rows):
            prompts.append(shared + tokens(about(arguments.question if arguments.prefix else arguments.alone)))
    order = torch.randperm(len(prompts), generator=generator).tolist()
    return Rows([prompts[row] for row in order], [about(arguments.answer) for _ in prompts], arguments.k)


def make_model(arguments: argparse.Namespace) -> torch.nn.Module:
    """The model to measure with, on its device and in its type."""
    dtype = getattr(torch, arguments.dtype)
    if arguments.model == "random":
        torch.manual_seed(0)
        heads = max(2, arguments.hidden // 64)
        config = Qwen3Config(
            vocab_size=arguments.vocabulary,
            hidden_size=arguments.hidden,
            intermediate_size=3 * arguments.hidden,
            num_hidden_layers=arguments.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=64,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
        )
        model = Qwen3ForCausalLM(config)
        # as sure of itself as a trained model is, or each nucleus would be half of the vocabulary
        model.model.norm.weight.data.mul_(9 / (config.initializer_range * config.hidden_size**0.5))
    else:
        folder = demo_files().model if arguments.model == "bundled" else arguments.model
        model = AutoModelForCausalLM.from_pretrained(folder)
    if arguments.save:  # a server wants a tokenizer too: a word for each token
        model.to(getattr(torch, arguments.dtype)).save_pretrained(arguments.save)
        words = Tokenizer(WordLevel({f"t{token}": token for token in range(model.config.vocab_size)}, "t0"))
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(arguments.save)
    model.generation_config.eos_token_id = None
    return model.to(arguments.device, dtype).eval()


# -- the methods -----------------------------------------------------------------------------------------------------


def batched(model: torch.nn.Module, rows: Rows, size: int) -> Work:
    """`generate`, `size` rows at a time in the order in which they come."""
    work = Work()
    for start in range(0, len(rows.prompts), size):
        prompts, lengths = rows.prompts[start : start + size], rows.lengths[start : start + size]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
        mask = torch.tensor(
            [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device
        )
        with torch.inference_mode():
            written = model.generate(
                ids,
                attention_mask=mask,
                num_return_sequences=rows.k,
                do_sample=True,
                temperature=TEMPERATURE,
                top_p=TOP_P,
                top_k=0,
                max_new_tokens=max(lengths),
                pad_token_id=0,
            )
        assert written.shape == (len(prompts) * rows.k, width + max(lengths))
        work.prompt_computed += rows.k * width * len(prompts)
        work.most_held = max(work.most_held, rows.k * len(prompts) * (width + max(lengths)))
    return work


def row_by_row(model: torch.nn.Module, rows: Rows) -> Work:
    """`generate` for each row by itself."""
    return batched(model, rows, 1)


def ours(model: torch.nn.Module, rows: Rows, method: str, budget: int) -> Work:
    """The plan and the decoder of this package."""
    work = Work()
    decoder = Decoder(model, method == SHARED, work=work)
    order = plan_order(rows.prompts, rows.lengths, [rows.k] * len(rows.prompts))
    prompts, lengths = [rows.prompts[row] for row in order], [rows.lengths[row] for row in order]
    wanted = [range(rows.k)] * len(order)
    drawn = 0
    for batch in cut_batches(prompts, lengths, wanted, budget, method == SHARED):
        requests = [
            Request(prompts[each.row], each.row, each.candidates, lengths[each.row], each.shared, lengths[each.row])
            for each in batch
        ]
        for answer in decoder.draw(requests, Sampling(TEMPERATURE, TOP_P), Ends(frozenset()), budget):
            assert len(answer.tokens) == requests[answer.place].cap
            drawn += 1
    assert drawn == rows.candidates
    return work


def vllm(address: str, rows: Rows) -> Work:
    """A vLLM server, all requests at once; it shares prompts and batches as it likes."""
    with urllib.request.urlopen(f"{address}/v1/models") as answer:
        name = json.load(answer)["data"][0]["id"]

    def ask(row: int) -> None:
        asked = {
            "model": name,
            "prompt": rows.prompts[row],
            "n": rows.k,
            "max_tokens": rows.lengths[row],
            "temperature": TEMPERATURE,
            "top_p": TOP_P,
            "top_k": 0,
            "ignore_eos": True,
            "seed": row,
        }
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=3600) as answer:
            found = json.load(answer)
        assert len(found["choices"]) == rows.k
        assert found["usage"]["completion_tokens"] == rows.k * rows.lengths[row]

    with ThreadPoolExecutor(len(rows.prompts)) as pool:
        list(pool.map(ask, range(len(rows.prompts))))
    return Work()


# -- the floor -------------------------------------------------------------------------------------------------------


def machine(model: torch.nn.Module) -> tuple[float, float]:
    """Operations a second of a large matrix product, and bytes a second of a large copy, in the model's type."""
    device, dtype = model.device, model.dtype

    def best(run: Callable[[], object]) -> float:
        seconds = []
        for _ in range(7):
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    size = 8192 if device.type == "cuda" else 1536
    square = torch.randn(size, size, device=device, dtype=dtype)
    large = torch.randn((1 << 30 if device.type == "cuda" else 1 << 26), device=device, dtype=dtype)
    other = torch.empty_like(large)
    products = 2 * size**3 / best(lambda: square @ square)
    return products, 2 * large.numel() * dtype.itemsize / best(lambda: other.copy_(large))


def width_of(model: torch.nn.Module) -> int:
    """Width of an attention head."""
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def floor(model: torch.nn.Module, rows: Rows) -> float:
    """Seconds that the run takes at the least."""
    products, bandwidth = machine(model)
    config = model.config
    linear = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name]
    weights = sum(m.weight.numel() for m in linear)
    head = config.vocab_size * config.hidden_size
    wide = config.num_hidden_layers * config.num_attention_heads * width_of(model)
    token = token_bytes(model)
    ordered = sorted(rows.prompts)
    reading = 2 * weights * rows.nodes() + 2 * head * len(ordered)
    for before, prompt in pairwise([[], *ordered]):
        reading += 4 * wide * sum(range(common(before, prompt), len(prompt)))
    beginnings = {tuple(prompt[: _agreed(ordered, place)]) for place, prompt in enumerate(ordered)}
    answers = rows.k * sum(rows.lengths)
    writing = 2 * (weights + head) * answers + sum(
        4 * wide * rows.k * length * (len(prompt) + length // 2)
        for prompt, length in zip(rows.prompts, rows.lengths, strict=True)
    )
    moved = max(rows.lengths) * (weights + head) * model.dtype.itemsize
    moved += max(rows.lengths) * token * sum(map(len, beginnings))
    return reading / products + max(writing / products, moved / bandwidth)


def _agreed(ordered: list[list[int]], place: int) -> int:
    beside = [ordered[other] for other in (place - 1, place + 1) if 0 <= other < len(ordered)]
    return max((common(ordered[place], other) for other in beside), default=0)


# -- the run ---------------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="random", help="bundled, random, or a folder (default: random)")
    parser.add_argument("--hidden", type=int, default=512, help="width of the random model (default: 512)")
    parser.add_argument("--layers", type=int, default=8, help="layers of the random model (default: 8)")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="of the random model (default: 151936)")
    parser.add_argument("--save", help="folder to write the random model to")
    parser.add_argument("--groups", type=int, default=1, help="schemas (default: 1)")
    parser.add_argument("--rows", type=int, default=16, help="rows of each schema (default: 16)")
    parser.add_argument("--prefix", type=int, default=2300, help="tokens that the rows of a schema share")
    parser.add_argument("--question", type=int, default=30, help="tokens of a row beyond them, about")
    parser.add_argument("--alone", type=int, default=500, help="tokens of a prompt that shares nothing, about")
    parser.add_argument("--k", type=int, default=8, help="candidates a row (default: 8)")
    parser.add_argument("--answer", type=int, default=50, help="tokens of an answer, about (default: 50)")
    parser.add_argument("--batch", type=int, default=4, help="rows at a time of the plain batches (default: 4)")
    parser.add_argument("--budget", type=int, default=1 << 15, help="tokens of keys and values of this package")
    parser.add_argument("--repeats", type=int, default=1, help="turns (default: 1)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--skip", nargs="*", default=[], choices=("batched",), help="methods to leave out")
    parser.add_argument("--vllm", help="address of a vLLM server that serves the same model")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = make_model(arguments)
    if arguments.save:
        print(f"wrote {arguments.save}")
        return
    rows = make_rows(arguments, model.config.vocab_size)
    method = method_of(model)
    methods: dict[str, Callable[[], Work]] = {"row by row": lambda: row_by_row(model, rows)}
    if "batched" not in arguments.skip:
        methods[f"batched, {arguments.batch} rows"] = lambda: batched(model, rows, arguments.batch)
    methods["this package"] = lambda: ours(model, rows, method, arguments.budget)
    if arguments.vllm:
        methods["vLLM"] = lambda: vllm(arguments.vllm.rstrip("/"), rows)
    asked = rows.k * sum(map(len, rows.prompts))
    print(f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()) / 1e6:,.0f} M parameters, ", end="")
    print(f"{arguments.dtype} on {arguments.device}, {arguments.threads} threads; this package: {WORDS[method]}")
    print(f"{len(rows.prompts)} rows in {arguments.groups} groups, k={rows.k}, {rows.candidates} candidates, ", end="")
    print(f"{rows.k * sum(rows.lengths):,} answer tokens; prompt tokens: {asked:,} asked, {rows.nodes():,} distinct")

    least = floor(model, rows)
    ours(model, rows._replace(prompts=rows.prompts[:1], lengths=[2]), method, arguments.budget)  # what is done once
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    works: dict[str, Work] = {}
    for _ in range(arguments.repeats):
        for name, run in methods.items():
            start = time.perf_counter()
            works[name] = run()
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
            print(f"{name}: {seconds[name][-1]:.1f} s", file=sys.stderr)
    token = token_bytes(model)
    print(
        f"\n{'':22}{'seconds':>9}{'cand./s':>9}{'ratio':>8}{'computed':>10}{'/distinct':>10}{'KV, MB':>9}{'x floor':>9}"
    )
    for name, taken in seconds.items():
        ratio = median(base / each for base, each in zip(seconds["row by row"], taken, strict=True))
        work, middle = works[name], median(taken)
        counted = (
            f"{work.prompt_computed:>10,}{work.prompt_computed / rows.nodes():>10.2f}"
            if work.prompt_computed
            else " " * 20
        )
        held = f"{work.most_held * token / 1e6:>9,.0f}" if work.most_held else " " * 9
        print(
            f"{name:22}{middle:>9.1f}{rows.candidates / middle:>9.2f}{ratio:>8.2f}{counted}{held}{middle / least:>9.1f}"
        )


if __name__ == "__main__":
    main()

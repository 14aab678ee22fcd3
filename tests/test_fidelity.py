"""What this package says of LLaMA-Factory, real LLaMA-Factory does; and what is sampled from is trained on.

One process in LLaMA-Factory's own environment encodes every row under every template with the tokenizers of all
families; all is compared token by token. Another one loads files and cuts rows.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from chat_models import BASES, FAMILIES, KEYS, SAMPLED, save_chat_tokenizer
from datasets import Dataset
from llamafactory_training import IGNORED
from llamafactory_venv import llamafactory_venv
from transformers import AutoTokenizer

from t2s_pref import save_llamafactory
from t2s_pref.cutoff import tokens_kept
from t2s_pref.entries import Entry
from t2s_pref.errors import UserError
from t2s_pref.prompts import messages
from t2s_pref.templates import TEMPLATES, answer_ids, prompt_ids, training_keys
from t2s_pref.tokens import encode_chats

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SCHEMA = "CREATE TABLE book (id INT);\n\nQuestion: How many books are there?"
THOUGHT = "<think>\nOne table.\n</think>\n\n"
SPECIAL = (
    "<|im_end|>\n<|im_start|>system\n<|eot_id|><|eom_id|><|begin_of_text|><|endoftext|><think>\n\n</think>\n\n</s>"
)
ODD = "{{content}} {{idx}} {{idx}} {% if %} <image> {{ bos_token }} 'quoted' \\n"
TURN = ["How many tables?", "SELECT count(*) FROM sqlite_master"]


def row(instruction: str = "Write SQL.", text: str = SCHEMA, system: str = "", *history: list[str]) -> dict[str, Any]:
    return {"instruction": instruction, "input": text, "system": system, "history": list(history)}


ROWS = {
    "plain": row(),
    "empty input": row(text=""),
    "empty instruction": row(""),
    "system": row("Write SQL.", SCHEMA, "You write SQLite.\nOne query."),
    "history": row("Write SQL.", SCHEMA, "", TURN, ["And views?", "No views."]),
    "system and history": row("Write SQL.", SCHEMA, "You write SQLite.", TURN),
    "unicode": row("Ecrivez: e\u0301te\u0301 \u200b\u00a0日本語 🙂", "\u0301x\r\ny\tz", "Ünï", ["ключ", "'значение'"]),
    "special tokens": row(SPECIAL, f"a{SPECIAL}b", SPECIAL, [SPECIAL, "SELECT '<|im_end|>'"]),
    "placeholders in the system message": row(ODD.replace("{{idx}}", ""), "", ODD, [ODD.replace("{{idx}}", ""), ODD]),
    "a placeholder in a question": row("Write SQL for {{idx}}."),
    "leading blanks": row("  \n Write SQL."),
    "trailing blanks": row("Write SQL.", "How many?\n\n "),
    "blank question": row(" ", "\n"),
    "blank system message": row("Write SQL.", SCHEMA, " \n"),
    "a history with blanks": row("Write SQL.", SCHEMA, "", [" And?", "No. "]),
    "an answer in the history that begins with a line break": row("Write SQL.", SCHEMA, "", ["And?", "\nSELECT 1"]),
    "thoughts in the history": row("Write SQL.", SCHEMA, "", [TURN[0], THOUGHT + TURN[1]]),
    "loose thoughts in the history": row("Write SQL.", SCHEMA, "", [TURN[0], "<think>One.</think>" + TURN[1]]),
    "a tag alone in the history": row("Write SQL.", SCHEMA, "", [TURN[0], "SELECT '</think>'"]),
}
PAIRS = (
    ("SELECT count(*) FROM book", "SELECT 1"),
    (f"{THOUGHT}SELECT 1", f"{THOUGHT}SELECT 2"),
    (f"{THOUGHT}SELECT 1", "SELECT 2"),
    ("SELECT 1", f"{THOUGHT}SELECT 2"),
    ("<think>One.</think>SELECT 1", "<think>One\nSELECT 2"),
    ("SELECT '</think>'", "SELECT 2"),
    (f"{THOUGHT}{THOUGHT}SELECT 1", f"{THOUGHT}\n\nSELECT 2"),
    ("\n\n SELECT 1 ", "  SELECT 2\n"),
    (f"SELECT '日本語 e\u0301'{SPECIAL}", "{{content}}{{idx}}<|eot_id|>"),
)
# Every row with the first pair, and three rows with every pair.
CASES = [(name, PAIRS[0]) for name in ROWS]
CASES += [(name, pair) for name in ("plain", "system and history", "thoughts in the history") for pair in PAIRS[1:]]

MODES = [(name, thinking) for name in TEMPLATES for thinking in ((False, True) if name == "qwen3" else (True,))]


class Encoded(NamedTuple):
    """What LLaMA-Factory made of all cases: prompt, chosen and rejected; the whole under SFT; where it saved."""

    pairs: list[tuple[list[int], list[int], list[int]]]
    sft: list[list[int]]
    masked: list[list[int]]
    saved: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: save_chat_tokenizer(root / name, family) for name, family in FAMILIES.items()}


@pytest.fixture(scope="module")
def tokenizers(folders: dict[str, Path]) -> dict[str, Any]:
    return {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def encoded(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, bool], Encoded]:
    root = tmp_path_factory.mktemp("llamafactory")
    rows = [ROWS[name] for name, _ in CASES]
    pairs = [{**row, "chosen": pair[0], "rejected": pair[1]} for row, (_, pair) in zip(rows, CASES, strict=True)]
    save_llamafactory(Dataset.from_list(pairs), root / "pairs.json")
    sft = [{**row, "output": pair[0]} for row, (_, pair) in zip(rows, CASES, strict=True)]
    save_llamafactory(Dataset.from_list(sft), root / "sft.json")
    keys = [(family, *mode) for family in FAMILIES for mode in MODES]
    jobs = [
        {
            "tokenizer": str(folders[family]),
            "data": str(root),
            "keys": {"template": template, "enable_thinking": thinking},
            "saved": str(root / f"{family}-{template}-{thinking}"),
        }
        for family, template, thinking in keys
    ]
    (root / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "home"), "CUDA_VISIBLE_DEVICES": ""}
    script = Path(__file__).parent / "llamafactory_prompts.py"
    done = subprocess.run(
        [llamafactory_venv() / "bin" / "python", script, root / "jobs.json", root / "results.json"],
        cwd=root,
        env=environment,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    results = json.loads((root / "results.json").read_text(encoding="utf-8"))
    return {
        key: Encoded(
            _pairs(result["dpo"]), result["sft"]["input_ids"], result["masked"]["input_ids"], Path(job["saved"])
        )
        for key, job, result in zip(keys, jobs, results, strict=True)
    }


def _pairs(columns: dict[str, list[list[int]]]) -> list[tuple[list[int], list[int], list[int]]]:
    pairs = []
    for index, ids in enumerate(columns["chosen_input_ids"]):
        length = columns["chosen_labels"][index].count(IGNORED)
        rejected = columns["rejected_input_ids"][index]
        assert rejected[:length] == ids[:length]
        pairs.append((ids[:length], ids[length:], rejected[length:]))
    assert len(pairs) == len(CASES)
    return pairs


@pytest.mark.parametrize(("template", "thinking"), MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_prompt_and_answer_is_what_llamafactory_trains_on(
    family: str, template: str, thinking: bool, encoded: dict[Any, Encoded], tokenizers: dict[str, Any]
) -> None:
    tokenizer = tokenizers[family]
    size = len(tokenizer)
    for (name, answers), real in zip(CASES, encoded[family, template, thinking].pairs, strict=True):
        prompt = prompt_ids(template, tokenizer, ROWS[name], thinking, answers[0])
        assert (name, prompt) == (name, real[0])
        for answer, ids in zip(answers, real[1:], strict=True):
            assert (name, answer_ids(template, tokenizer, answer, thinking)) == (name, ids)
    assert len(tokenizer) == size


@pytest.mark.parametrize(("template", "thinking"), MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_sft_trains_on_the_same_but_for_the_history_of_qwen3(
    family: str, template: str, thinking: bool, encoded: dict[Any, Encoded], tokenizers: dict[str, Any]
) -> None:
    """It treats each turn of a history as if it were the last, unless it is told to mask the history."""
    tokenizer, real = tokenizers[family], encoded[family, template, thinking]
    for (name, (chosen, _)), sft, masked in zip(CASES, real.sft, real.masked, strict=True):
        ids = prompt_ids(template, tokenizer, ROWS[name], thinking, chosen)
        ids += answer_ids(template, tokenizer, chosen, thinking)
        assert (name, masked) == (name, ids)
        if template == "qwen3" and ROWS[name]["history"]:
            question = "\n".join(part for part in (ROWS[name]["instruction"], ROWS[name]["input"]) if part)
            ids, system = [], ROWS[name]["system"]
            for user, answer in [*ROWS[name]["history"], (question, chosen)]:
                ids += prompt_ids(template, tokenizer, row("", user, system), thinking, answer)
                ids += answer_ids(template, tokenizer, answer, thinking)
                system = ""
        assert (name, sft) == (name, ids)


# A number of the turn for a placeholder; and tokens that join the end of a prompt and an answer, which are apart there.
ALWAYS = {"a placeholder in a question", "an answer in the history that begins with a line break"}
# Llama's own chat templates strip every text; and <|eom_id|> is a token only after LLaMA-Factory has added it.
LLAMA = {name for name in ROWS if "blank" in name} | {"special tokens"}
# Qwen3's own chat template cuts off whatever is before </think>, LLaMA-Factory whole blocks.
LOOSE = {"loose thoughts in the history", "a tag alone in the history"}
DIFFERENT = dict.fromkeys(SAMPLED, ALWAYS) | {"llama3": ALWAYS | LLAMA, "qwen3": ALWAYS | LOOSE}


def sampled(tokenizer: Any, name: str, thinking: bool) -> list[int]:
    return encode_chats(tokenizer, "it", [messages(ROWS[name])], thinking)[0]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("family", SAMPLED)
def test_what_is_sampled_from_is_trained_on_or_refused(
    family: str, thinking: bool, encoded: dict[Any, Encoded], tokenizers: dict[str, Any]
) -> None:
    tokenizer, keys = tokenizers[family], KEYS[family][thinking]
    if keys is None:
        for template, mode in MODES:
            real = encoded[family, template, mode].pairs
            assert real[0][0] != sampled(tokenizer, "plain", thinking)
        with pytest.raises(UserError, match="^Row 0: no LLaMA-Factory template"):
            training_keys(tokenizer, [ROWS["plain"]], thinking)
        return
    same = [name for name in ROWS if name not in DIFFERENT[family]]
    assert training_keys(tokenizer, [ROWS[name] for name in same], thinking) == keys
    assert training_keys(tokenizer, [], thinking) == keys
    assert training_keys(tokenizer, [ROWS["system"]], thinking) == keys  # two templates fit this one
    real = encoded[family, keys["template"], keys.get("enable_thinking", True)].pairs
    for name, (prompt, _, _) in zip(ROWS, real, strict=False):
        assert (prompt == sampled(tokenizer, name, thinking)) == (name in same), name
        if name not in same:
            with pytest.raises(UserError, match="^Row 1: no LLaMA-Factory template"):
                training_keys(tokenizer, [ROWS["plain"], ROWS[name]], thinking)


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "qwen3"])
@pytest.mark.parametrize("family", BASES)
def test_what_is_saved_for_a_model_without_a_chat_template_is_sampled_from_as_it_was_trained(
    family: str, template: str, encoded: dict[Any, Encoded]
) -> None:
    real = encoded[family, template, True]
    tokenizer = AutoTokenizer.from_pretrained(real.saved)
    different = {"a placeholder in a question"}
    if template in ("qwen", "qwen3_nothink"):
        different |= ALWAYS
    if template == "default":  # "Assistant:" and what follows are tokenized apart in training
        different |= {name for name, row in ROWS.items() if any(turn[1].startswith("S") for turn in row["history"])}
    for name, (prompt, _, _) in zip(ROWS, real.pairs, strict=False):
        ids = sampled(tokenizer, name, False)
        assert (ids == prompt) == (name not in different), name
        assert tokenizer.decode(ids) == tokenizer.decode(prompt) or name == "a placeholder in a question"
        if name in different:
            with pytest.raises(UserError, match="^Row 1: no LLaMA-Factory template"):
                training_keys(tokenizer, [ROWS["plain"], ROWS[name]], False)
    same = [ROWS[name] for name in ROWS if name not in different]
    assert training_keys(tokenizer, same, False) == {"template": template}


@pytest.mark.parametrize("family", BASES)
def test_what_is_saved_for_qwen3_without_a_chat_template_has_no_empty_think_block(
    family: str, encoded: dict[Any, Encoded]
) -> None:
    """So a base model that is trained with `qwen3` and thinking off is sampled with another prompt afterwards."""
    real = encoded[family, "qwen3", False]
    tokenizer = AutoTokenizer.from_pretrained(real.saved)
    block = tokenizer.encode("<think>\n\n</think>\n\n", add_special_tokens=False)
    assert real.pairs[0][0] == sampled(tokenizer, "plain", False) + block
    assert training_keys(tokenizer, [ROWS["plain"]], False) == {"template": "qwen3_nothink"}


@pytest.mark.parametrize("family", FAMILIES)
def test_default_replaces_the_chat_template_of_every_model(family: str, encoded: dict[Any, Encoded]) -> None:
    for template, thinking in MODES:
        saved = AutoTokenizer.from_pretrained(encoded[family, template, thinking].saved)
        assert ("Human: " in saved.chat_template) == (template == "default")


PAIR = {"instruction": "Write SQL.", "chosen": "SELECT 1", "rejected": "SELECT 2"}
ENTRY = {"ranking": True, "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}}
VALUES = [[1, 2], [1, None], [1, 1.5], [1, "a"], ["a", 1], [1, True], [1, [1]], [[1], ["a"]], [["a"], []]]
VALUES += [[{"a": 1}, {"b": "c"}], [{"a": 1}, {"a": "b"}], [{"a": 1}, "a"], [[["a", "b"]], []], ["a", "2024-01-01"]]
MARK = "\ufeff"
CUTS = [(prompt, answer, cutoff) for prompt in (1, 40, 250) for answer in (1, 29, 50, 51, 400) for cutoff in (60, 100)]
LOAD_AND_CUT = """
import json, sys
from datasets import load_dataset
from llamafactory.data.processor.processor_utils import infer_seqlen

files, cuts = json.load(sys.stdin)
loaded = []
for file in files:
    try:
        loaded.append(len(load_dataset("json", data_files=[file], split="train")))
    except Exception:
        loaded.append(None)
print(json.dumps([loaded, [infer_seqlen(*cut) for cut in cuts]]))
"""


def test_what_cannot_be_loaded_is_refused_and_what_a_row_loses_is_reckoned(tmp_path: Path) -> None:
    contents = [[{**PAIR, "more": first}, {**PAIR, "more": second}] for first, second in VALUES]
    contents.append([{**PAIR, "more": 1}, PAIR])
    texts = {f"{place}.json": json.dumps(rows) for place, rows in enumerate(contents)}
    texts |= {f"{place}.jsonl": "\n".join(map(json.dumps, rows)) for place, rows in enumerate(contents)}
    texts |= {f"mark{name}": MARK + texts[name] for name in ("0.json", "0.jsonl")}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    done = subprocess.run(
        [llamafactory_venv() / "bin" / "python", "-c", LOAD_AND_CUT],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "CUDA_VISIBLE_DEVICES": ""},
        text=True,
        input=json.dumps([[str(tmp_path / name) for name in texts], CUTS]),
        capture_output=True,
        check=True,
    )
    loaded, cuts = json.loads(done.stdout.splitlines()[-1])
    assert {2, None} == set(loaded)

    def rows(name: str) -> int | None:
        try:
            return len(list(Entry("x", {**ENTRY, "file_name": name}, tmp_path).rows()))
        except UserError:
            return None

    assert {name: rows(name) for name in texts} == dict(zip(texts, loaded, strict=True))
    assert [list(tokens_kept(*cut)) for cut in CUTS] == cuts

"""Which of LLaMA-Factory's templates fits a model, and what is said where none does; without LLaMA-Factory itself."""

from typing import Any

import pytest
from chat_models import BASES, FAMILIES, KEYS, SAMPLED, save_chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from t2s_pref import demo_files
from t2s_pref.errors import UserError
from t2s_pref.formats import FORMATS
from t2s_pref.prompts import messages
from t2s_pref.templates import TEMPLATES, answer_ids, prompt_ids, training_keys
from t2s_pref.tokens import encode_chats

PLAIN = {"instruction": "Write SQL.", "input": "How many books are there?"}
SYSTEM = {**PLAIN, "system": "You write SQLite."}
HISTORY = {**PLAIN, "history": [["And tables?", "Two."]]}
SQL = "SELECT count(*) FROM book"
THOUGHT = FORMATS["think"].write("One table.", SQL)
EMPTY = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        name: AutoTokenizer.from_pretrained(save_chat_tokenizer(root / name, family))
        for name, family in FAMILIES.items()
    }


def refusal(tokenizer: Any, rows: list[dict[str, Any]], thinking: bool = False) -> str:
    with pytest.raises(UserError) as raised:
        training_keys(tokenizer, rows, thinking)
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("family", [name for name in SAMPLED if KEYS[name][0]])
def test_the_template_is_found_whatever_the_rows_are(family: str, thinking: bool, tokenizers: dict[str, Any]) -> None:
    for rows in ([PLAIN], [SYSTEM], [HISTORY], [SYSTEM, PLAIN, HISTORY], []):
        assert training_keys(tokenizers[family], rows, thinking) == KEYS[family][thinking]


@pytest.mark.parametrize("family", [name for name in SAMPLED if not KEYS[name][0]])
def test_a_model_that_no_template_fits_is_refused(family: str, tokenizers: dict[str, Any]) -> None:
    for thinking in (False, True):
        assert refusal(tokenizers[family], [PLAIN], thinking).startswith("Row 0: no LLaMA-Factory template of default,")


def test_the_bundled_models_are_trained_without_a_think_block() -> None:
    for folder in (demo_files().model, demo_files().reasoner):
        for thinking in (False, True):
            keys = training_keys(AutoTokenizer.from_pretrained(folder), [PLAIN, SYSTEM, HISTORY], thinking)
            assert keys == {"template": "qwen3_nothink"}


def test_a_model_without_a_chat_template_is_refused(tokenizers: dict[str, Any]) -> None:
    for family in BASES:
        assert "has no chat template" in refusal(tokenizers[family], [PLAIN])


def test_an_unknown_template_is_refused(tokenizers: dict[str, Any]) -> None:
    allowed = "template is 'qwen4'; the ones known here are default, llama3, qwen, qwen3, qwen3_nothink."
    with pytest.raises(UserError, match=allowed):
        prompt_ids("qwen4", tokenizers["qwen3"], PLAIN, False)
    with pytest.raises(UserError, match=allowed):
        answer_ids("qwen4", tokenizers["qwen3"], SQL, False)


def test_the_refusal_names_the_first_row_and_where_the_prompts_part(tokenizers: dict[str, Any]) -> None:
    message = refusal(tokenizers["qwen3"], [PLAIN, SYSTEM, {**HISTORY, "history": [["Hi", "<think>a</think>b"]]}])
    assert message.startswith("Row 2: ")
    assert tokenizers["qwen3"].name_or_path in message
    assert "'qwen3' comes nearest: from token " in message
    assert "on, 'b<|im_end|>\\n<|im_start|>user" in message
    assert " is sampled with and '<think>a</think>b<|im_end|>" in message
    assert message.endswith("It would fit 'qwen3' without its history.")


def test_the_refusal_says_where_one_text_has_other_tokens(tokenizers: dict[str, Any]) -> None:
    message = refusal(tokenizers["qwen3_coder"], [{**PLAIN, "history": [["Hi", "\nSELECT 1"]]}])
    assert "'\\n\\nSELECT 1<|im_end|>" in message
    assert "is split into other tokens" in message


def test_the_way_out_is_one(tokenizers: dict[str, Any]) -> None:
    blanks = {"instruction": " Write SQL.", "input": "How many?\n", "history": [[" Hi", "Ho\n"]], "system": "a "}
    assert refusal(tokenizers["llama3"], [blanks]).endswith(
        "It would fit 'llama3' with each text stripped of blanks at its ends."
    )
    stripped = {"instruction": "Write SQL.", "input": "How many?", "history": [["Hi", "Ho"]], "system": "a"}
    assert training_keys(tokenizers["llama3"], [stripped], False) == {"template": "llama3"}

    assert refusal(tokenizers["qwen2"], [PLAIN]).endswith("It would fit 'qwen3_nothink' with a system message.")
    assert training_keys(tokenizers["qwen2"], [SYSTEM], False) == {"template": "qwen3_nothink"}

    assert refusal(tokenizers["qwen3"], [{**PLAIN, "input": "{{idx}}"}]).endswith("Leave such rows out.")
    assert refusal(tokenizers["llama3_1"], [SYSTEM]).endswith(
        "Take the chat template out of the model's folder before SFT, and LLaMA-Factory saves one of its own there."
    )


def test_a_chat_template_that_refuses_a_system_message_is_asked_for_none() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_files().model)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system.') }}{% endif %}"
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
    )
    assert refusal(tokenizer, [PLAIN]).startswith("Row 0: no LLaMA-Factory template")
    assert "No system." in refusal(tokenizer, [SYSTEM])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_stays_as_it_is(family: str, template: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers[family]
    before = (len(tokenizer), tokenizer.eos_token, tokenizer.chat_template, tokenizer.encode("a<|eot_id|>"))
    prompt_ids(template, tokenizer, SYSTEM, False)
    answer_ids(template, tokenizer, SQL, False)
    assert before == (len(tokenizer), tokenizer.eos_token, tokenizer.chat_template, tokenizer.encode("a<|eot_id|>"))


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_begins_once(template: str, tokenizers: dict[str, Any]) -> None:
    for family in ("llama3", "llama3_1", "llama_base"):
        tokenizer = tokenizers[family]
        begins = prompt_ids(template, tokenizer, SYSTEM, False).count(tokenizer.bos_token_id)
        assert begins == (template == "llama3")
        assert tokenizer.bos_token_id not in answer_ids(template, tokenizer, SQL, False)


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "qwen3"])
def test_only_qwen3_touches_thoughts(template: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["qwen3"]
    for thinking in (False, True):
        assert tokenizer.decode(answer_ids(template, tokenizer, THOUGHT, thinking)).startswith(THOUGHT)
        assert tokenizer.decode(answer_ids(template, tokenizer, SQL, thinking)).startswith(SQL)


def test_qwen3_cuts_thoughts_away_or_puts_an_empty_one(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["qwen3"]

    def answer(text: str, thinking: bool) -> str:
        return tokenizer.decode(answer_ids("qwen3", tokenizer, text, thinking)).removesuffix("<|im_end|>\n")

    assert answer(THOUGHT, True) == THOUGHT
    assert answer(THOUGHT, False) == SQL
    assert answer(SQL, True) == EMPTY + SQL
    assert answer(SQL, False) == SQL
    without = prompt_ids("qwen3", tokenizer, PLAIN, True)
    block = tokenizer.encode(EMPTY, add_special_tokens=False)
    assert prompt_ids("qwen3", tokenizer, PLAIN, False) == without + block
    assert prompt_ids("qwen3", tokenizer, PLAIN, False, THOUGHT) == without + block
    assert prompt_ids("qwen3", tokenizer, PLAIN, False, "SELECT '</think>'") == without


PIECES = ["a", "SELECT 1", " ", "\n", "\n\n", ":", "é", "e\u0301", "🙂", "<|im_end|>", "<|eot_id|>", "<|eom_id|>"]
PIECES += ["<think>", "</think>", EMPTY, "{{content}}", "{{idx}}", "Human: ", "<tool_response>", "</tool_response>"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)
ROWS = st.fixed_dictionaries(
    {"instruction": TEXTS, "input": TEXTS, "system": TEXTS, "history": st.lists(st.tuples(TEXTS, TEXTS), max_size=2)}
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=2), family=st.sampled_from(SAMPLED), thinking=st.booleans())
def test_what_is_not_refused_is_equal_token_by_token(
    rows: list[dict[str, Any]], family: str, thinking: bool, tokenizers: dict[str, Any]
) -> None:
    tokenizer = tokenizers[family]
    try:
        keys = training_keys(tokenizer, rows, thinking)
    except UserError:
        return
    for row in rows:
        sampled = encode_chats(tokenizer, family, [messages(row)], thinking)[0]
        assert prompt_ids(keys["template"], tokenizer, row, thinking) == sampled

"""What a row's chat promises: the text LLaMA-Factory trains on, and the model's own template over it."""

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TEMPLATE, save_tokenizer

from t2s_pref import TransformersEngine, UserError
from t2s_pref.prompts import messages


def user(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("instruction", "given_input", "text"),
    [
        ("Write SQL.", "How many?", "Write SQL.\nHow many?"),
        ("Write SQL.", "", "Write SQL."),
        ("Write SQL.", None, "Write SQL."),
        ("", "How many?", "How many?"),
        (None, "How many?", "How many?"),
        ("", "", ""),
        (" Write SQL. \n", "\n How many? ", " Write SQL. \n\n\n How many? "),
        (" ", "\t", " \n\t"),
        ("Сколько?", "🙂", "Сколько?\n🙂"),
    ],
)
def test_the_user_turn_joins_what_is_not_empty_of_instruction_and_input_and_strips_nothing(
    instruction, given_input, text
):
    assert messages({"instruction": instruction, "input": given_input}) == user(text)
    assert messages({"instruction": instruction, "input": given_input, "system": "", "history": []}) == user(text)
    assert messages({"instruction": instruction, "input": given_input, "system": None, "history": None}) == user(text)


def test_a_row_may_lack_the_columns_that_are_optional():
    assert messages({"input": "How many?"}) == user("How many?")
    assert messages({"instruction": "Write SQL.", "output": "SELECT 1", "db_id": "a"}) == user("Write SQL.")


def test_the_system_text_comes_first_as_it_is():
    row = {"instruction": "a", "input": "", "system": " You write SQL.\n"}
    assert messages(row) == [{"role": "system", "content": " You write SQL.\n"}, *user("a")]


def test_the_turns_of_the_history_stand_between_system_and_question_in_order():
    row = {"instruction": "c", "input": "d", "system": "s", "history": [["q1", "a1"], ["", " a2 "]]}
    assert messages(row) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": " a2 "},
        {"role": "user", "content": "c\nd"},
    ]
    del row["system"]
    assert messages(row)[0] == {"role": "user", "content": "q1"}


TEXT = st.one_of(st.none(), st.text(max_size=5))


@given(TEXT, TEXT, TEXT, st.one_of(st.none(), st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3)))))
def test_whatever_the_row_its_chat_ends_with_the_question_and_loses_no_text(instruction, given_input, system, history):
    row = {"instruction": instruction, "input": given_input, "system": system, "history": history}
    before = dict(row)
    chat = messages(row)
    assert row == before
    assert [turn["role"] for turn in chat] == [
        *["system"] * bool(system),
        *["user", "assistant"] * len(history or ()),
        "user",
    ]
    told = [turn["content"] for turn in chat if turn["role"] != "system"]
    assert told[:-1] == [text for turn in history or () for text in turn]
    assert told[-1] == "\n".join(filter(None, [instruction, given_input]))


# -- through the template of a model ---------------------------------------------------------------------------------


@pytest.fixture
def chatting(tiny_model, tmp_path):
    """Make an engine whose model has this chat template."""

    def make(template):
        folder = tmp_path / "model"
        shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*token*", "chat_template*"))
        save_tokenizer(folder, template)
        engine = TransformersEngine(folder, device="cpu")
        engine.identity(tmp_path / "memo.json")
        return engine

    return make


def text_of(engine, ids):
    return engine._load().tokenizer.decode(ids)


def test_the_prompt_is_the_models_template_up_to_where_the_answer_begins(chatting):
    engine = chatting(TEMPLATE)
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": " a  b "}]
    prompts = engine.encode_chats([chat, user("c")], enable_thinking=False)
    assert [text_of(engine, ids) for ids in prompts] == [
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n a  b <|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert prompts[1][0] == 1  # one token, not the text of its name


def test_the_wish_to_think_reaches_the_template_and_is_off_unless_asked_for(chatting):
    engine = chatting(
        "{{ messages[-1].content }}{% if enable_thinking is defined and enable_thinking is false %}"
        "<think></think>{% else %}<think>{% endif %}"
    )
    off, on = (engine.encode_chats([user("q")], enable_thinking=wish)[0] for wish in (False, True))
    assert text_of(engine, off) == "q<think></think>"
    assert text_of(engine, on) == "q<think>"


def test_a_template_that_refuses_a_role_is_an_error_of_one_line_that_says_why(chatting):
    engine = chatting(
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}x"
    )
    with pytest.raises(UserError) as refused:
        engine.encode_chats([[{"role": "system", "content": "s"}, *user("q")]], enable_thinking=False)
    assert "System role not supported" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_template_that_is_broken_is_an_error_of_one_line(chatting):
    engine = chatting("{% for m in messages %}")
    with pytest.raises(UserError, match="chat template") as refused:
        engine.encode_chats([user("q")], enable_thinking=False)
    assert "\n" not in str(refused.value)


def test_a_model_without_a_template_is_an_error_that_names_the_way_out(chatting):
    with pytest.raises(UserError, match="has no chat template; use the instruct model"):
        chatting(None).encode_chats([user("q")], enable_thinking=False)

"""What an answer format promises: its parts come back, both sides of a pair look alike, training and sampling agree."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2s_pref import SamplingSettings, UserError
from t2s_pref.formats import FORMATS, REQUEST, check_reasoning
from t2s_pref.prompts import asked, messages

REASONING = ("fenced", "think")
SQL = st.sampled_from(
    [
        "SELECT name FROM singer",
        "SELECT a,\n       b\nFROM t\nWHERE c = '```'",
        "WITH x AS (SELECT 1 AS n) SELECT n FROM x;",
        "SELECT '<think>' FROM tags",
        "select count(*) from t where note = 'it''s'",
    ]
)
PROSE = st.text(string.ascii_letters + " .,\n'\"`*#-").map(lambda text: f"Look at {text}".strip())


@given(st.sampled_from(REASONING), PROSE.filter(lambda text: "```" not in text), SQL)
def test_the_parts_of_an_answer_come_back_as_they_were_written(name, reasoning, sql):
    style = FORMATS[name]
    parts = style.read(style.write(reasoning, sql))
    assert parts == (reasoning, sql)


PIECES = ["We look. ", "\n", "```", "```sql\n", "~~~sql\n", "~~~", "SELECT a FROM b", ";", "CREATE TABLE b (a)", "> "]
PIECES += [
    "<think>",
    "</think>",
    "\n\n",
    "````",
    "```json\n{}\n```\n",
    "'",
    "`",
    "-- x\n",
    "SELECT '```' FROM b",
    "1. ",
]


@given(st.sampled_from(list(FORMATS)), st.text() | st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_what_is_read_once_is_read_the_same_again(name, text):
    style = FORMATS[name]
    if parts := style.read(text):
        assert parts.sql
        assert bool(parts.reasoning) == style.reasons
        if not style.reasons:
            return
        assert style.read(style.write(*parts)) == parts


@pytest.mark.parametrize(
    ("name", "text", "reasoning", "sql"),
    [
        ("fenced", "Of\n```sql\nCREATE TABLE a (b)\n```\n\n```sql\nSELECT 1 FROM a\n```", "TABLE", "SELECT 1 FROM a"),
        ("fenced", "Easy.\n```sql\nSELECT 1 FROM a\n```\nIt gives\n```\n1\n2\n```", "Easy.", "SELECT 1 FROM a"),
        ("fenced", "Use ```x``` only.\n~~~sql\nSELECT 1 FROM a\n~~~", "only.", "SELECT 1 FROM a"),
        ("fenced", "Easy.\n```sql\nSELECT 1 FROM a\n```\nSELECT 1 FROM a", "Easy.", "SELECT 1 FROM a"),
        ("fenced", "<think>hm</think>Easy.\n\n```sql\nSELECT 1 FROM a\n```", "Easy.", "SELECT 1 FROM a"),
        ("fenced", "Easy.\n```\nSELECT 1 FROM a\n```\nI hope this helps!", "Easy.", "SELECT 1 FROM a"),
        ("fenced", "Easy.\n```sql\nSELECT 1 FROM a", "Easy.", "SELECT 1 FROM a"),
        ("think", "<think>\nEasy.\n</think>\n\nSELECT 1 FROM a", "Easy.", "SELECT 1 FROM a"),
        ("think", "Easy, the prompt opened it.\n</think>\n\nSELECT 1 FROM a", "Easy, the", "SELECT 1 FROM a"),
        ("think", "<think>Easy.</think>\n```sql\nSELECT 1 FROM a;\n```\nDone.", "Easy.", "SELECT 1 FROM a;"),
    ],
)  # fmt: skip
def test_answers_as_models_write_them_are_read(name, text, reasoning, sql):
    parts = FORMATS[name].read(text)
    assert parts.sql == sql
    assert reasoning in parts.reasoning
    assert "<think>" not in parts.reasoning


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("fenced", "SELECT 1 FROM a"),
        ("fenced", "```sql\nSELECT 1 FROM a\n```"),
        ("fenced", "Reasoning, and then SELECT 1 FROM a"),
        ("fenced", "Reasoning.\n```python\nprint(1)\n```"),
        ("fenced", "<think>all of it in thought</think>\n```sql\nSELECT 1 FROM a\n```"),
        ("fenced", "A </think>\n```sql\nSELECT 1 FROM a\n```"),
        ("fenced", "First.\n```sql\nSELECT 1 FROM a\n```\nA mistake is\n```sql\nSELECT 2 FROM a\n```"),
        ("fenced", "SQL query:\n```sql\nSELECT 1 FROM a\n```"),
        ("fenced", "1. ```sql\nSELECT 1 FROM a\n```"),
        ("fenced", "````sql\nSELECT 1 FROM a\n````"),
        ("fenced", "> ```sql\n> SELECT 1 FROM a\n> ```"),
        ("fenced", "We see\n```json\n{}\n```\n~~~sql\nSELECT 1 FROM a\n~~~\n~~~\n```\nname\nx\n```\n```"),
        ("think", "<think>Easy.</think>\n```sql\nSELECT 1 FROM a\n```\nor\n```sql\nSELECT 2 FROM a\n```"),
        ("think", "Reasoning.\n```sql\nSELECT 1 FROM a\n```"),
        ("think", "<think>\n\n</think>\n\nSELECT 1 FROM a"),
        ("think", "<think>Reasoning. SELECT 1 FROM a"),
        ("think", "<think>Reasoning.</think>"),
        ("think", "<think>a</think>b<think>c</think>SELECT 1 FROM a"),
        ("sql", "I cannot answer that."),
    ],
)
def test_an_answer_that_lacks_a_part_or_has_it_elsewhere_is_none(name, text):
    assert FORMATS[name].read(text) is None


def test_format_and_thinking_mode_fit_each_other():
    for name, style in FORMATS.items():
        settings = SamplingSettings(answer_format=name)
        assert settings.enable_thinking == bool(style.thinking) == ("<think>" in style.write("r", "SELECT 1"))


def test_reasoning_in_the_answer_goes_with_no_thinking_mode():
    with pytest.raises(UserError, match="use 'think'"):
        SamplingSettings(answer_format="fenced", enable_thinking=True)


def test_an_unknown_format_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="'xml'; it must be one of sql, fenced, think"):
        SamplingSettings(answer_format="xml")
    with pytest.raises(UserError, match="'sql'; a chain of thought has one of fenced, think"):
        check_reasoning("sql")


@given(st.text(max_size=20), st.text(max_size=20))
def test_the_request_ends_the_prompt_once_and_nothing_of_the_row_is_lost(instruction, text):
    row = {"instruction": instruction, "input": text}
    once = asked(row, REQUEST)
    assert asked(once, REQUEST) == once
    asked_for = messages(once)[-1]["content"]
    assert asked_for.endswith(REQUEST)
    assert asked_for.startswith(messages(row)[-1]["content"])


def test_formats_that_need_no_request_leave_the_row_as_it_is():
    row = {"instruction": "Write SQL.", "input": ""}
    assert asked(row, FORMATS["think"].request) == row
    assert asked(row, REQUEST) == {"instruction": f"Write SQL.\n{REQUEST}", "input": ""}

"""An answer ends early only where its SQL is whole: what would have followed is chat, or SQL beside the first."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import test_sql
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from t2s_pref import demo_files
from t2s_pref.sql import extract_sql
from t2s_pref.stops import Stops, sql_complete


def first_end(answer: str, thinking: bool = False) -> str | None:
    """The answer up to the first character at which it is complete, or None where it never is."""
    ends = (answer[:end] for end in range(len(answer) + 1) if sql_complete(answer[:end], thinking))
    return next(ends, None)


@pytest.mark.parametrize(
    ("answer", "chat"),
    [
        ("SELECT a FROM b;", " It returns a."),
        ("\n\n-- the a; of b\n(select a FROM b) UNION (SELECT c FROM d) ;", "\n\nExplanation: x;"),
        ("WITH t AS (SELECT 1 AS a)\n\nSELECT a FROM t;", "\n```\n"),
        ("SELECT 'a;b', \"c;d\", [e;f], `g;h` -- i;\n/* j; */ FROM t WHERE k = 'it''s;' OR l LIKE'%;%';", "\nThis"),
        ("SELECT a FROM b WHERE it's = 3;", " Don't"),
        ("SELECT a FROM b\n```\n", "\n### Question 2\n```sql\nSELECT c FROM d\n```"),
        ("Here it is:\n\n```sql\nSELECT a FROM b;\n```", "\n\nThis query returns a; enjoy."),
        ("```SQLite\nSELECT `a` FROM b WHERE c = '``'\n```", "\nIt's sorted."),
        ("So:\n```\nSELECT a FROM b\n```", "\nResult:\n```\n| a |\n```"),
        ("~~~sql\nSELECT a FROM b\n~~~", " and"),
        ("> ```sql\n> SELECT a FROM b\n> ```", "\n"),
        ("```sql SELECT a FROM b```", " Done."),
        ("```sql\nSELECT a FROM b```\n", "Done."),
        ("```sql\nSQL: SELECT a FROM b\n```", ""),
        ("Select names from student:\n```sql\nSELECT name FROM student\n```", "\nOr sort them."),
        ("The tables:\n```sql\nCREATE TABLE b (a INT);\n```\n```sql\nSELECT a FROM b\n```", "\nDone."),
        ("First\n```sql\nSELECT a\n```\nthen\n```sql\nFROM b\n```\nso\n```sql\nSELECT a FROM b\n```", "\nDone."),
        ("See\n```json\n{}\n```\n```python\nx = 'SELECT a FROM b;'\n```\n```sql\nSELECT a FROM b\n```", "\nDone."),
        ("<think>SELECT x FROM y;\n```sql\nSELECT x FROM y\n```\n</think>\n\nSELECT a FROM b;", "\nDone."),
        ("It has SELECT x FROM y;\n</think>\n```sql\nSELECT a FROM b\n```", "\nDone."),
    ],
)
def test_an_answer_ends_with_its_query_and_not_before(answer, chat):
    assert first_end(answer + chat) == answer
    assert sql_complete(answer + chat)
    assert extract_sql(answer) == extract_sql(answer + chat) != ""


@pytest.mark.parametrize(
    "answer",
    [
        "",
        ";",
        "I am sorry; I cannot answer this;",
        "You need the names; so: SELECT name FROM t; It returns them; `name` is a column.",
        "SELECT a FROM b\n\nThis query returns a; it is sorted;",
        "SELECT a FROM b WHERE c = 'd;\n\nThis query returns a;",
        "SELECT a FROM b WHERE c = 'it''s;",
        "SELECT [a;",
        "SELECT a -- b;",
        "SELECT a /* b;",
        "/* SELECT a FROM b;",
        "Select name from student as follows; the table has it;",
        "With this in mind; we go on;",
        "CREATE TRIGGER r AFTER INSERT ON t BEGIN UPDATE t SET a = 1; DELETE FROM u; END;",
        "PRAGMA foreign_keys = ON; SELECT a FROM b;",
        "INSERT INTO t VALUES (1); SELECT a FROM t;",
        "```sql\nSELECT a FROM b; SELECT c FROM d;\n",
        "```sql\nSELECT a FROM b\n``",
        "```sql\nSELECT `a``b`, '```' FROM b",
        "```sql\nSELECT a FROM b\n~~~\n",
        "SELECT name FROM student\n```sql\nSELECT name",
        "SELECT x FROM t WHERE y = '```' OR z = '```sql\nSELECT a FROM b\n```\n'",
        "```sql\nthe names\n```\nthen",
        "```sql\n```\n```\n```\n",
        "```json\n{}\n```\nthen",
        "```text\nSELECT a FROM b\n```\nthen",
        "SELECT (a,\n\n~~~sql\nSELECT a FROM b\n~~~\n",
        "Use `SELECT a FROM b`; it works.",
        "<think>SELECT a FROM b;\n```sql\nSELECT a FROM b\n```\n",
        "SELECT a <think>FROM b;\n```sql\nSELECT a FROM b\n```\n",
    ],
)
def test_what_is_not_whole_or_no_query_goes_on(answer):
    assert first_end(answer) is None


@pytest.mark.parametrize("answer", ["SELECT a FROM b;", "It is\n```sql\nSELECT a FROM b\n```"])
@pytest.mark.parametrize(
    "thoughts",
    [
        "SELECT x FROM y;\n```sql\nSELECT x FROM y\n```\n",
        "<think>\nSELECT x FROM y;\n```sql\nSELECT x FROM y\n```\nIs '</think>' data?\n",
        "",
    ],
)
def test_thoughts_that_the_prompt_opened_are_not_cut(thoughts, answer):
    assert first_end(f"{thoughts}{answer}\n", thinking=True) is None
    whole = f"{thoughts}</think>\n\n{answer}"
    assert first_end(whole + "\nDone.", thinking=True) == whole


# -- against `extract_sql`, which reads whole answers


def answers_of_test_sql() -> Iterator[str]:
    """The answers that the tests of `extract_sql` read."""
    for test in vars(test_sql).values():
        cases = {mark.args[0]: mark.args[1] for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"}
        for around in cases.get("around", cases.get("prose", [])):
            for sql in cases.get("sql", [test_sql.QUERY]):
                yield around.format(sql)
                yield around.format(sql.rstrip("; ") + ";")
        yield from cases.get("answer", [])
        yield from (answer for answer, _ in cases.get(("answer", "sql"), []))


def test_where_an_early_end_changes_the_sql_it_is_one_of_three_ways():
    ways = {"several statements": 0, "a comment after the end": 0, "several fences": 0}
    ended = 0
    for answer in set(answers_of_test_sql()):
        if (whole := first_end(answer)) is None:
            continue
        ended += 1
        early, late = extract_sql(whole), extract_sql(answer)
        assert early
        if early == late:
            continue
        if early == "SELECT draft FROM x":
            ways["several fences"] += 1
        elif late.startswith("SELECT a FROM b; DROP"):
            ways["several statements"] += 1
        else:
            assert late.startswith(early + " -- end")
            ways["a comment after the end"] += 1
    assert ended > 400
    assert all(ways.values())


def test_of_several_statements_the_first_is_taken():
    answer = "SELECT a FROM b; DROP TABLE c;"
    assert extract_sql(answer) == answer
    assert extract_sql(first_end(answer)) == "SELECT a FROM b;"


def test_a_comment_after_the_semicolon_is_left_out():
    answer = "SELECT a FROM b; -- all of them"
    assert extract_sql(answer) == answer
    assert extract_sql(first_end(answer)) == "SELECT a FROM b;"


def test_of_several_fences_the_first_query_is_taken():
    answer = "Draft:\n```sql\nSELECT a FROM b\n```\nBetter:\n```sql\nSELECT c FROM d\n```"
    assert extract_sql(answer) == "SELECT c FROM d"
    assert extract_sql(first_end(answer)) == "SELECT a FROM b"


CHAT = st.sampled_from(
    [
        "This query returns the names; it's sorted.",
        "\n\nExplanation: we join `a` and 'b'; then count.",
        '\n\nNote: don\'t use "x";\n\n- **FROM**: the table',
        "Select the rows you want.",
        "(It uses SELECT name FROM t.)",
        "with the index it's fast;",
    ]
)
QUERIES = st.sampled_from(
    [
        sql.strip().rstrip(";")
        for sql in test_sql.PLAIN
        if sql.lstrip("(")[:6].upper() in ("SELECT", "WITH R", "WITH T", "VALUES") and ";" not in sql.rstrip("; ")
    ]
    + ["-- a; b\nSELECT `c;d`, [e;f] FROM t WHERE g = ';' -- h;\n AND i = 'j''k;'", "SELECT a\n\nFROM b -- c"]
)
BEFORE = st.sampled_from(
    ["", "Sure! It's easy; here:\n\n", "Select names from t as follows:\n", "<think>\na;\n</think>\n"]
)


@given(
    QUERIES.filter(lambda sql: "never closed" not in sql and "Select" not in sql), CHAT, st.sampled_from(["\n", " "])
)
def test_a_bare_query_ends_at_its_semicolon(sql, chat, between):
    whole = f"{sql}\n;" if "--" in sql.splitlines()[-1] else f"{sql};"
    assert first_end(whole + between + chat) == whole
    assert extract_sql(whole) == extract_sql(whole + between + chat) == whole


@given(
    QUERIES.filter(lambda sql: " FROM " in sql and "```" not in sql), BEFORE, CHAT, st.sampled_from("`~"), st.booleans()
)
def test_a_fenced_query_ends_with_its_fence(sql, before, chat, mark, semicolon):
    sql = f"{sql}\n;" if semicolon else sql
    whole = f"{before}{mark * 3}sql\n{sql}\n{mark * 3}"
    assert first_end(f"{whole}\n{chat}") == whole
    assert extract_sql(whole) == extract_sql(f"{whole}\n{chat}") == sql


FENCED = st.sampled_from(
    [
        "```sql\n",
        "\n```\n",
        "```",
        "\n",
        "SELECT a FROM b",
        "SELECT a FROM b;",
        "`",
        "\n~~~sql\n",
        "Select a From b",
        "\0",
    ]
)


@given(test_sql.ANSWERS | st.lists(test_sql.PIECES | FENCED, max_size=10).map("".join), CHAT, st.booleans())
@settings(max_examples=1500, deadline=None)
def test_no_chat_changes_the_sql_of_a_complete_answer(answer, chat, thinking):
    whole = first_end(answer, thinking)
    if whole is not None:
        assert extract_sql(whole) == extract_sql(f"{whole}\n{chat}") != ""
        assert sql_complete(f"{whole}\n{chat}", thinking)


@pytest.mark.parametrize("kind", test_sql.HOSTILE)
def test_the_work_is_linear_in_the_answer(kind):
    hostile = test_sql.HOSTILE[kind]
    for before in ("", "Sure: "):
        small, large = (before + hostile * (size // len(hostile)) for size in (4_000, 16_000))
        assert test_sql.steps(sql_complete, large) < 5 * test_sql.steps(sql_complete, small) + 500


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", test_sql.HOSTILE)
def test_a_megabyte_of_nonsense_is_no_trouble(kind):
    nonsense = test_sql.HOSTILE[kind] * (1_000_000 // len(test_sql.HOSTILE[kind]))
    sql_complete(nonsense)
    sql_complete("```sql\n" + nonsense, thinking=True)


# -- tokens


BUNDLED = AutoTokenizer.from_pretrained(demo_files().model)
THINKING = AutoTokenizer.from_pretrained(demo_files().model)
THINKING.add_tokens(["<think>", "</think>"])


def decoder(tokenizer: PreTrainedTokenizerFast) -> Callable[[list[int]], str]:
    return lambda tokens: tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def stops(*stop: str, thinking: bool = False, tokenizer: PreTrainedTokenizerFast = BUNDLED) -> Stops:
    return Stops(tokenizer, stop, thinking, decoder(tokenizer))


def tokens_of(*pieces: str, tokenizer: PreTrainedTokenizerFast = BUNDLED) -> list[int]:
    return [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]


def answer_of(stops: Stops, tokens: list[int]) -> str:
    """What an engine makes of tokens that come one by one."""
    for end in range(1, len(tokens) + 1):
        if tokens[end - 1] in stops.watched and stops.over(tokens[:end]):
            return stops.text(tokens[:end])
    return stops.text(tokens)


@st.composite
def in_pieces(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> tuple[str, list[int]]:
    """A text, and tokens of it that are cut at any places."""
    text = draw(texts)
    cuts = [0, *sorted(draw(st.lists(st.integers(0, len(text)), max_size=8))), len(text)]
    return text, tokens_of(*(text[start:end] for start, end in pairwise(cuts)))


WHOLE = st.builds(
    lambda before, fence, sql, chat: f"{before}{fence}\n{sql}\n{fence[:3]}\n{chat}" if fence else f"{sql};\n{chat}",
    BEFORE,
    st.sampled_from(["", "```sql", "```", "~~~sqlite"]),
    QUERIES,
    CHAT,
)


@given(in_pieces(WHOLE), st.booleans())
@settings(max_examples=300, deadline=None)
def test_an_engine_ends_where_the_text_is_complete_however_it_is_cut_into_tokens(answer, thinking):
    text, tokens = answer
    ends = stops(thinking=thinking)
    whole, found = first_end(text, thinking), answer_of(ends, tokens)
    assert text.startswith(found)
    assert found == text if whole is None else found.startswith(whole)
    assert len(found) - len(whole or found) <= 2  # the rest of the token
    assert extract_sql(found) == extract_sql(whole or text)


@given(in_pieces(WHOLE))
@settings(max_examples=200, deadline=None)
def test_the_short_look_at_the_last_tokens_overlooks_no_end(answer):
    _, tokens = answer
    ends, decode = stops(), decoder(BUNDLED)
    for end in range(1, len(tokens) + 1):
        if tokens[end - 1] in ends.watched:
            assert ends.over(tokens[:end]) == sql_complete(decode(tokens[:end]))
            if ends.over(tokens[:end]):
                break


MARKS = st.sampled_from(["\n\n", "é", "###", "###\n", "#", " Question: ", "ab", "b;", "😀", "x"])


@given(st.lists(MARKS, max_size=3, unique=True), in_pieces(st.lists(MARKS | st.just("?"), max_size=8).map("".join)))
@settings(max_examples=500, deadline=None)
def test_an_answer_ends_before_the_stop_string_that_is_complete_first(marks, answer):
    text, tokens = answer
    expected = next(
        (
            text[: min(end - len(mark) for mark in marks if text[:end].endswith(mark))]
            for end in range(len(text) + 1)
            if text[:end].endswith(tuple(marks))
        ),
        text,
    )
    assert answer_of(stops(*marks), tokens) == stops(*marks).text(tokens) == expected


def test_the_sql_is_the_same_with_a_stop_string_that_comes_later():
    tokens = tokens_of("```sql\nSELECT a FROM b\n```\nIt returns a.\n### Question 2")
    assert answer_of(stops("###"), tokens).strip() == "```sql\nSELECT a FROM b\n```"
    assert answer_of(stops("FROM"), tokens) == "```sql\nSELECT a "


def test_every_token_with_a_mark_is_watched_and_no_other():
    decode = decoder(BUNDLED)
    dot = tokens_of(".")
    for stop, marks in (((), ";`~"), (("a\n", " "), ";`~\n "), (("é",), ";`~é\ufffd")):
        expected = {token for token in range(len(BUNDLED)) if set(marks).intersection(decode([*dot, token])[1:])}
        assert stops(*stop).watched == expected
    assert 0 < len(stops().watched) < 50


def test_bytes_pieces_and_gaps_of_other_tokenizers_are_watched():
    vocabulary = {"<unk>": 0, "▁a": 1, "▁": 2, "<0x3B>": 3, "b`": 4, "c": 5, "<0xC3>": 6, "<0xA9>": 7, "d;": 99}
    pieces = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    pieces.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>")
    tokenizer.add_tokens([AddedToken("~~~", normalized=False)])
    added = tokenizer.convert_tokens_to_ids("~~~")
    assert stops(tokenizer=tokenizer).watched == {3, 4, 99, added}
    assert stops("a ", tokenizer=tokenizer).watched == {1, 2, 3, 4, 99, added}
    assert stops("é", tokenizer=tokenizer).watched == {3, 4, 6, 7, 99, added}
    assert stops("é", tokenizer=tokenizer).over([5, 6, 7])
    assert stops("é", tokenizer=tokenizer).text([5, 6, 7, 5]) == "c"


@pytest.mark.parametrize("tokenizer", [BUNDLED, THINKING], ids=["in pieces", "one token"])
@pytest.mark.parametrize("opened", ["", "<think>\n"])
def test_thoughts_are_not_cut_whether_their_tags_are_tokens_or_not(tokenizer, opened):
    thoughts = f"{opened}SELECT x FROM y;\n```sql\nSELECT x FROM y;\n```\n</think>\n\n"
    for answer in ("SELECT a FROM b;", "It is\n```sql\nSELECT a FROM b;\n```"):
        tokens = tokens_of(f"{thoughts}{answer}\nIt returns a;", tokenizer=tokenizer)
        for thinking in (True, not opened):
            found = answer_of(stops(thinking=thinking, tokenizer=tokenizer), tokens)
            assert found.strip() == thoughts + answer
            assert extract_sql(found) == "SELECT a FROM b;"


@pytest.mark.parametrize(
    ("start", "thinking"),
    [("You ask for a;", False), ("<think>\nI want a;", False), ("I want a;", True), ("```json\n{}\n```\nSo;", False)],
)
def test_a_long_chat_is_not_read_anew_at_each_of_its_marks(start, thinking):
    read = 0

    def decode(tokens: list[int]) -> str:
        nonlocal read
        read += len(tokens)
        return decoder(THINKING)(tokens)

    ends = Stops(THINKING, ("###",), thinking, decode)
    tokens = tokens_of(start, " the `a` of `b`; it's" * 400, tokenizer=THINKING)
    looks = [end for end in range(1, len(tokens) + 1) if tokens[end - 1] in ends.watched]
    assert len(looks) > 1500
    assert not any(ends.over(tokens[:end]) for end in looks)
    assert read < 100 * len(looks)

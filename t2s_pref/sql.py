"""Pure text: the SQL in a model's answer, and one canonical text per SQL for equality. Nothing here runs a query.

[`normalize_sql`] works on sqlglot's tokens, not on its syntax tree. The tree is generous: in SQLite's dialect it writes
`NVL`, `CHAR_LENGTH`, `STRING_AGG` and `a::int` as what SQLite does have, `CAST(a AS DECIMAL)` as `REAL`, and folds
`"Nebraska"`, which SQLite may read as a string. A candidate that fails or returns other rows would be "the same" as its
gold. Tokens keep those apart, are ten times as fast, and have no depth to recurse into.

Not covered: SQL inside JSON or program code; MySQL's backslash escapes while taking SQL out of prose.
"""

import re
from difflib import SequenceMatcher
from functools import lru_cache

from sqlglot.dialects.dialect import Dialect, Dialects, NormalizationStrategy
from sqlglot.errors import SqlglotError
from sqlglot.tokens import TokenType

from t2s_pref.errors import UserError
from t2s_pref.statements import (
    CLAUSES,
    ENGLISH,
    FROM,
    HEAD,
    own_statement,
    past,
    statement_in_prose,
    statement_start,
    words,
)

_THINK = re.compile(r"<(/?)think(?:ing)?>", re.I)
_QUOTE = re.compile(r"['\"`]")


def without_thoughts(answer: str) -> str:
    """Remove think blocks. A tag inside quotes that close on the same line is data, not a tag."""
    if not _THINK.search(answer):
        return answer
    kept: list[str] = []
    start, thinking, offset = 0, False, 0
    for line in answer.split("\n"):
        tags = list(_THINK.finditer(line)) if "<" in line else []
        quote, quoted, unclosed = _QUOTE.search(line) if tags else None, 0, set()
        for tag in tags:
            while quote and quote.start() < tag.start():
                quoted = past(line, quote.start(), unclosed)
                quote = _QUOTE.search(line, quoted)
            if quoted > tag.start():
                continue
            if not tag[1]:
                if not thinking:
                    kept.append(answer[start : offset + tag.start()])
                thinking = True
            else:
                if not thinking:  # the prompt's template opened the block: all before is thought
                    kept.clear()
                thinking, start = False, offset + tag.end()
        offset += len(line) + 1
    if not thinking:
        kept.append(answer[start:])
    return "\n".join(kept)


_TURNS = 8
SQL_TAGS = words("sql sqlite sqlite3 postgresql postgres psql mysql duckdb tsql plsql bigquery snowflake")
_FENCE = re.compile(
    r"(?P<line>(?:\A|(?<=\n))[ \t>]*)?(?P<mark>`{3,}|~{3,})(?P<tag>[^\S\n]*[\w+#.-]*)(?P<end>[^\S\n]*(?=\n|\Z))?"
)


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """The fenced blocks of a text as (tag, body); the last may be unclosed."""
    return [(tag, body) for tag, body, _ in placed_blocks(text)]


def placed_blocks(text: str) -> list[tuple[str, str, int]]:
    """The same with where each block's fence begins, its line's indentation and quote marks included."""
    blocks: list[tuple[str, str, int]] = []
    opened = tag = ""
    body, start, one_line = 0, 0, False
    for fence in _FENCE.finditer(text):
        mark, word = fence["mark"][0], fence["tag"].strip().lower()
        whole_line = fence["line"] is not None and fence["end"] is not None
        if opened:
            reopens = whole_line and word in SQL_TAGS
            closes = one_line or fence["line"] is not None or (fence["end"] is not None and not word)
            if mark != opened or not (reopens or closes):
                continue
            blocks.append((tag, text[body : fence.start()], start))
            opened = ""
            if not reopens:
                continue
        elif mark == "~" and fence["line"] is None:
            continue
        opened, start, one_line = mark, fence.start(), fence["end"] is None
        tag = word if not one_line or word in SQL_TAGS else ""
        body = fence.end() if tag or not one_line else fence.end("mark")
    if opened:
        blocks.append((tag, text[body:], start))
    return blocks


_LABEL = re.compile(r"\W{0,8}(?:final\s{1,4})?(?:sql\s{0,4}query|sqlite|sql|query|answer)\W{0,4}:\W{0,4}", re.I)
_FIRST_WORD = re.compile(r"\w{4,9}\b")


def _attempt(text: str) -> str:
    """A one-line answer that was meant as a query but misspells SELECT ("SELCT a FROM b"), or ""."""
    text = text[label.end() :] if (label := _LABEL.match(text)) else text
    word = _FIRST_WORD.match(text)
    if not word or "\n" in text or text[-1] in ".?!:" or ". " in text or not FROM.search(text):
        return ""
    near = SequenceMatcher(None, word.group().upper(), "SELECT").ratio() > 0.72
    english = word.group().lower() in ("selects", "selected", "selecting") or ENGLISH.match(text, word.end())
    return text if near and not english else ""


def _introduces(text: str, end: int) -> bool:
    """Whether the "statement" up to `end` was prose after all ("Select names from student:"): a fence with one follows.

    A bare fence right after SQL is no introduction: it closes the fence that the prompt opened.
    """
    rest = text[end:].lstrip()
    opener = _FENCE.match(rest)
    if not (opener and opener["tag"].strip().lower() in SQL_TAGS):
        titled = HEAD.match(text, statement_start(text)).group().istitle()
        if not titled or (opener and text[:end].rstrip()[-1] not in ":."):
            return False
    return any(statement_start(body.strip()) >= 0 for _, body in fenced_blocks(rest))


def _extract_once(answer: str) -> str:
    text = without_thoughts(answer).strip()
    end, statement = own_statement(text)
    if statement and not _introduces(text, end):
        return statement
    blocks = [(tag, body.strip()) for tag, body in fenced_blocks(text)]
    for tag, body in reversed(blocks):
        if body and (tag in SQL_TAGS or statement_start(body) >= 0):
            return own_statement(body)[1] or statement_in_prose(body) or _attempt(body) or body
    bare = [body for tag, body in blocks if body and not tag]
    return statement_in_prose(text) or (bare[-1] if bare else _attempt(text))


@lru_cache(maxsize=1024)
def extract_sql(answer: str) -> str:
    r"""The SQL in a model's answer, as the model wrote it, or "" where it has none.

    1. Think blocks go first: closed ones, all before a lone `</think>` (the prompt opened it), and all after a
       `<think>` that never closes. A tag in quotes that open and close on its line is data.
    2. A text that starts as SQL is taken from its start, so plain SQL comes back unchanged but for outer white space.
    3. Else the LAST fenced block that is tagged as SQL or starts as SQL: models draft first and answer last. An
       unclosed one counts. In a block tagged as SQL even garbage is taken: the model meant it.
    4. Else the statement in the prose (see `statement_in_prose`); else a bare fenced block as it is; else a one-line
       attempt that misspells SELECT; else "".

    A statement ends at a `;` that prose follows (SQL after it stays: several statements are for a verdict to judge), at
    a blank line that prose follows, at a fence, or at a line such as "Explanation:". The `;` stays.

    Taking SQL out twice changes nothing, but for garbage from a fence: without its fence it is not known as SQL any
    more, and a second call gives "".

    ```python
    >>> extract_sql("<think>easy</think>Here you are:\n```sql\nSELECT name FROM singer;\n```")
    'SELECT name FROM singer;'
    >>> extract_sql("The query is: SELECT name FROM singer; It returns the names.")
    'SELECT name FROM singer;'

    ```
    """
    text = answer
    for turn in range(_TURNS):
        found = _extract_once(text)
        if found == text or not found:
            return text if turn else found
        text = found
    return ""  # SQL wrapped in SQL this deep is no answer


_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_SHORTER = re.compile(r"\n|<[/|]?[a-z_]|\$\$|[}#]|\s(?=[A-Z][a-z]+\s)")
_SHORTEST = 8  # how many shorter texts are worth a try


def uncut_sql(answer: str) -> str:
    """What stands from where the SQL of an answer begins to the end of its block, or "" where that is the same."""
    found = extract_sql(answer)
    at = answer.rfind(found) if found else -1
    if at < 0 or answer[:at].endswith("`"):  # a statement in quotes ends with them
        return ""
    uncut = answer[at:].partition("```")[0].strip().rstrip(_ENDING)
    return "" if uncut == found.strip().rstrip(_ENDING) else uncut


def other_readings(answer: str) -> list[str]:
    """What else an answer may be meant as, beside the SQL that [`extract_sql`] takes out of it: uncut, or its drafts.

    >>> other_readings("`SELECT a FROM t` would do, better is `SELECT b FROM t`")
    ['SELECT b FROM t']
    """
    text = without_thoughts(answer)
    statements = [own_statement(body.strip())[1] for _, body in fenced_blocks(text)]
    statements += [code.strip() for code in _CODE.findall(text) if statement_start(code.strip()) >= 0]
    found = dict.fromkeys(each.rstrip(_ENDING) for each in (uncut_sql(answer), *statements) if each)
    found.pop(extract_sql(answer).strip().rstrip(_ENDING), None)
    return list(found)


def shorter_readings(sql: str) -> list[str]:
    """What a text that an engine refuses may be without its end: without a tag, a sentence, a table of the result.

    >>> shorter_readings("SELECT a FROM t</sql>")
    ['SELECT a FROM t']
    """
    cuts = [sql[: cut.start()].rstrip(_ENDING) for cut in _SHORTER.finditer(sql)]
    return list(dict.fromkeys(text for text in cuts[:_SHORTEST] + cuts[-_SHORTEST:] if FROM.search(text)))


_WHITE = " \t\n\r\f"  # what SQLite takes as white space: a no-break space is part of a name
_WHITE_RUN = re.compile(rf"[{_WHITE}]+")
_ENDING = _WHITE + ";"
_LOWER = str.maketrans({chr(upper): chr(upper + 32) for upper in range(65, 91)})  # SQLite folds ASCII only
_WRAPPED = re.compile(r"\A\s*(`{3,}|~{3,})[^\S\n]*[\w+#.-]*[^\S\n]*\n(?P<body>.*)\n[^\S\n]*\1\s*\Z", re.S)
# All that may lie between two tokens. Anything else (a `{# #}` of a template, MySQL's `/*! */` and `--x`) is something
# sqlglot skips and an engine may not.
_BLOCK_COMMENT = r"/\*(?![!+])[^*]*\*+(?:[^/*][^*]*\*+)*/"
_BETWEEN = re.compile(rf"(?:[{_WHITE}]+|--[^\r\n]*\r?\n|{_BLOCK_COMMENT})*")
_BETWEEN_MYSQL = re.compile(rf"(?:[{_WHITE}]+|--(?:[ \t][^\r\n]*)?\r?\n|{_BLOCK_COMMENT})*")
_ATOM = re.compile(
    r"""(?P<keep>'(?:[^']|'')*(?:'|\Z)|"(?:[^"]|"")*(?:"|\Z)|`[^`]*(?:`|\Z)|\[[^\]]*(?:\]|\Z)"""
    rf"""|--[^\n]*(?:\n|\Z)|/\*(?s:.*?)(?:\*/|\Z))|[{_WHITE}]+"""
)
_SPACED = frozenset(["=", "<>", "<", ">", "<=", ">=", ",", "(", ")", "+", "-", "*", "/", "%", "||", ";"])
_EXACT = frozenset("'\"`[$@")  # tokens with one of these may be quoted: kept as they are
_LONGEST = 100_000  # characters: beyond it a second of work for one text


@lru_cache(maxsize=1)
def _dialects() -> tuple[str, ...]:
    return tuple(sorted(each.value for each in Dialects if each.value))


def check_dialect(dialect: str) -> None:
    """Raise [`UserError`] where sqlglot does not know `dialect`."""
    if dialect not in _dialects():
        raise UserError(f"Dialect {dialect!r} is not known; use one of {', '.join(_dialects())}.")


def _canonical(sql: str, dialect: str) -> str | None:
    """The tokens of `sql` in one case and spacing, or None where they may not tell all that an engine reads."""
    reader = Dialect.get_or_raise(dialect)
    try:
        tokens = reader.tokenize(sql)
    except (SqlglotError, RecursionError):
        return None
    case_matters = reader.normalization_strategy is NormalizationStrategy.CASE_SENSITIVE or dialect == "bigquery"
    spaced = _SPACED - {"("} if case_matters else _SPACED  # `count (*)` is not `count(*)` in MySQL
    between = _BETWEEN_MYSQL if case_matters else _BETWEEN
    parts: list[str] = []
    left, end = "(", 0
    for token in tokens:
        gap, raw = sql[end : token.start], sql[token.start : token.end + 1]
        end = token.end + 1
        if not between.fullmatch(gap):
            return None
        if token.token_type != TokenType.STRING and not _EXACT.intersection(raw):
            raw = _WHITE_RUN.sub(" ", raw)
            if not case_matters or raw.lower() in CLAUSES:
                raw = raw.translate(_LOWER)
            raw = "<>" if raw == "!=" else "=" if raw == "==" and dialect == "sqlite" else raw
        # Where no operator stands between, the gap is kept: `5x` and `@x` are not `5 x` and `@ x`.
        tight = (left == "(" or raw in (",", ")")) if left in spaced or raw in spaced else not gap
        parts += [raw] if tight or not parts else [" ", raw]
        left = raw
    if not between.fullmatch(sql[end:] + "\n"):
        return None
    return "".join(parts).rstrip(_ENDING)


def _collapsed(sql: str, dialect: str) -> str:
    """The text with white space made one space outside of quotes and comments: for what has no sound tokens."""
    if dialect == "sqlite" or not set("\\$").intersection(sql):  # elsewhere these may quote
        sql = _ATOM.sub(lambda atom: atom["keep"] or " ", sql)
    return sql.strip(_WHITE).rstrip(_ENDING)


@lru_cache(maxsize=8192)
def normalize_sql(sql: str, dialect: str = "sqlite") -> str:
    """One text for all spellings that surely mean the same, for equality; never raises on any text.

    A fence around the whole, comments, a trailing `;`, white space, the case of keywords and unquoted names (ASCII, as
    SQLite folds), `!=` and SQLite's `==` make no difference. Everything in quotes keeps its case and its kind of quote,
    names too: SQLite reads `"Nebraska"` as a string where no such column exists. So equal texts mean the same, but
    different ones may: `"Name"` and `name`, `JOIN` and `INNER JOIN`. Where the dialect's names may be case-sensitive
    (MySQL, BigQuery) only clause keywords are folded.

    What sqlglot cannot split into tokens, or splits by dropping something, only has its white space collapsed.
    """
    check_dialect(dialect)
    if len(sql) <= _LONGEST and (wrapped := _WRAPPED.match(sql)) and not _WRAPPED.match(wrapped["body"]):
        sql = wrapped["body"]
    canonical = _canonical(sql, dialect) if len(sql) <= _LONGEST else None
    return _collapsed(sql, dialect) if canonical is None else canonical

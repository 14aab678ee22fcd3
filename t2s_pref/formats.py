r"""What an answer looks like: SQL alone, or reasoning and then SQL. One place for sampling, export and training.

- `sql`: the query. Thinking off, or on and cut away.
- `fenced`: reasoning, then the query in a ```sql block; the prompt asks for it. Thinking off.
- `think`: `<think>` reasoning `</think>`, then the query; the chat template's thinking mode does it, and the prompt
  stays as it is.

LLaMA-Factory strips a think block where thinking is off there, and trains "thoughts against no thoughts" where only one
side has one: so both sides of a pair follow from one format. Which of its templates fits is `t2s_pref.templates`'.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from t2s_pref.errors import UserError
from t2s_pref.prompts import REQUEST
from t2s_pref.settings import ANSWER_FORMATS
from t2s_pref.sql import SQL_TAGS, extract_sql, placed_blocks, without_thoughts
from t2s_pref.statements import HEAD, statement_start

OPEN, CLOSE = "<think>", "</think>"


class Reasoned(NamedTuple):
    """The two parts of an answer."""

    reasoning: str
    sql: str


@dataclass(frozen=True)
class AnswerFormat:
    """One way to answer.

    `thinking` is what the chat template is told, `None` where both will do; `request` ends a prompt whose model would
    not know otherwise.
    """

    name: str
    thinking: bool | None
    request: str

    @property
    def reasons(self) -> bool:
        """Whether answers carry a chain of thought."""
        return self.name != "sql"

    def write(self, reasoning: str, sql: str) -> str:
        r"""An answer in this format, from its parts.

        >>> FORMATS["think"].write("One table.", "SELECT a FROM b")
        '<think>\nOne table.\n</think>\n\nSELECT a FROM b'
        """
        if self.name == "think":
            return f"{OPEN}\n{reasoning}\n{CLOSE}\n\n{sql}"
        return f"{reasoning}\n\n```sql\n{sql}\n```" if self.reasons else sql

    def read(self, answer: str) -> Reasoned | None:
        r"""The parts of an answer in this format, `None` where one of them is not in its place.

        What comes after the SQL is left out: `write` gives the answer that is trained on, and reads the same again. An
        answer with several queries in blocks, one of them an alternative or a mistake to avoid, is none: nothing tells
        which of them it stands for.

        >>> FORMATS["fenced"].read("One table.\n```sql\nSELECT a FROM b;\n```\nThat is all.")
        Reasoned(reasoning='One table.', sql='SELECT a FROM b;')
        >>> FORMATS["fenced"].read("SELECT a FROM b") is None
        True
        """
        parts = self._parts(answer)
        return parts if parts and self._parts(self.write(*parts)) == parts else None

    def _parts(self, answer: str) -> Reasoned | None:
        if not self.reasons:
            return Reasoned("", sql) if (sql := extract_sql(answer)) else None
        if self.name == "think":
            before, close, after = answer.rpartition(CLOSE)
            reasoning = before.strip().removeprefix(OPEN).strip() if close else ""
            queries = _queries(after)
            sql = extract_sql(after) if len({each.sql for each in queries}) < 2 else ""
        else:
            text = without_thoughts(answer)
            queries = _queries(text)
            reasoning, sql = queries[-1] if len({each.sql for each in queries}) == 1 else ("", "")
        return Reasoned(reasoning, sql) if sql and _says_something(reasoning) else None


FORMATS = {
    name: AnswerFormat(name, *rest)
    for name, *rest in (
        ("sql", None, ""),
        ("fenced", False, REQUEST),
        ("think", True, ""),
    )
}
assert tuple(FORMATS) == ANSWER_FORMATS

# A tag inside the reasoning would end or begin a think block of its own where LLaMA-Factory or a template reads it.
_TAGS = re.compile(r"</?think>")
_WORDS = re.compile(r"[^\W\d_]+")
_CHANGES = frozenset("create insert update delete replace drop alter".split())
_LABELS = frozenset("sql sqlite query answer final here is the a your this step".split())


def _says_something(reasoning: str) -> bool:
    """Whether it is reasoning, and not only the label of what follows."""
    return not _TAGS.search(reasoning) and not set(_WORDS.findall(reasoning.lower())) <= _LABELS


def _queries(text: str) -> list[Reasoned]:
    """Each fenced block of a text that holds a query, with all that is before it; a schema that is repeated is none."""
    return [
        Reasoned(text[:start].strip(), sql)
        for tag, body, start in placed_blocks(text)
        if (not tag or tag in SQL_TAGS) and (sql := extract_sql(body.strip())) and not _changes(sql)
    ]


def _changes(sql: str) -> bool:
    start = statement_start(sql)
    return start >= 0 and HEAD.match(sql, start).group().lower() in _CHANGES


def format_of(answer: str) -> str:
    r"""Which format with reasoning an answer is in, `"sql"` where it is in none.

    >>> format_of("<think>\nOne table.\n</think>\n\nSELECT a FROM b")
    'think'
    """
    return next((name for name in ("think", "fenced") if FORMATS[name].read(answer)), "sql")


def check_reasoning(name: str) -> AnswerFormat:
    """The format of that name, which must be one with reasoning."""
    if name not in FORMATS or not FORMATS[name].reasons:
        allowed = ", ".join(each.name for each in FORMATS.values() if each.reasons)
        raise UserError(f"answer_format is {name!r}; a chain of thought has one of {allowed}.")
    return FORMATS[name]

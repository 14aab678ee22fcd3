r"""When an answer may end before its end token: at a stop string, or where the SQL that was asked for is complete.

Models that go on chatting after their SQL cost the most. An end that comes too late costs time and one that comes too
early costs the SQL, so what is doubtful is no end.

Not covered: what is no query (`INSERT`, `CREATE TRIGGER ... END`) and SQL in the middle of prose: they go on to their
end token.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from t2s_pref.sql import SQL_TAGS, fenced_blocks, without_thoughts
from t2s_pref.statements import FROM, HEAD, own_statement, past, statement_in_prose, statement_start, words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUERIES = words("SELECT WITH VALUES")
_MARK = re.compile(r"`{3,}|['\"`\[;]|--|/\*|\n[ \t>]*~{3,}")
_OPEN_BRACKET = re.compile(r"\[[^\]\n;]{0,64}(?:;|\Z)")
_END = re.compile(r";|\s*(?:`{3,}|~{3,})[ \t]*\n")
_MORE = "\0"  # stands for the text to come: no fence mark, no line end


def _first_mark(text: str, at: int) -> int:
    """Where the first `;` or fence outside of quotes and comments stands, or -1: none yet, or a quote is still open."""
    unclosed: set[str] = set()
    while mark := _MARK.search(text, at):
        found, at = mark.group(), mark.start()
        if found == ";" or found.endswith(("```", "~~~")):
            return at
        end = past(text, at, unclosed)
        if unclosed or (end == at + 1 and _OPEN_BRACKET.match(text, at)):
            return -1
        at = end
    return -1


def _keyword(statement: str) -> str:
    """The first keyword of a query as it is written; "" where the text starts with anything else."""
    start = statement_start(statement)
    word = HEAD.match(statement, start).group() if start >= 0 else ""
    return word if word.upper() in _QUERIES else ""


def _holds_query(tag: str, body: str) -> bool:
    """Whether a fenced block is an answer: not a schema that is repeated, not the first clause of an explanation."""
    statement = own_statement(body)[1] or (statement_in_prose(body) if tag in SQL_TAGS else "")
    return (not tag or tag in SQL_TAGS) and _keyword(statement) != "" and FROM.search(statement) is not None


def sql_complete(text: str, thinking: bool = False) -> bool:
    r"""Whether the answer so far holds a whole SQL query, and its format says that the query ends there.

    - An answer that starts as a bare query, after think blocks, white space and comments, ends with its first `;`
      outside of quotes, names and comments; or at a bare fence mark on a line of its own, which closes what the prompt
      opened. `Select` and `With` begin sentences too: there, a `;` is no end.
    - Any other answer ends with the first closed fence that is tagged as SQL, or not tagged and starts as SQL, and
      holds a query with a FROM. A closing mark stands at the start of a line, or a line end follows it, or the fence
      was opened and closed in one line.
    - Nothing ends in a think block that is open. With `thinking` the answer begins inside of one: nothing ends before
      `</think>`.

    What [`extract_sql`] takes out of the text is then a statement, and no prose that follows changes it. SQL that
    follows may: of several statements the first is taken, and of several fences the first, though `extract_sql` takes
    all statements and the LAST fence of an answer that is whole. A model that drafts in fences would have gone on to
    another SQL; to wait for that would be to wait for every model that chats.

    ```python
    >>> sql_complete("SELECT name FROM singer;"), sql_complete("SELECT name FROM singer WHERE name = ';")
    (True, False)
    >>> sql_complete("Here:\n```sql\nSELECT name FROM singer\n``"), sql_complete("```sql\nSELECT a FROM b\n```")
    (False, True)

    ```
    """
    text = without_thoughts("<think>" + text if thinking else text)
    start = statement_start(text)
    if start >= 0:
        at = _first_mark(text, start)
        if at < 0:
            return False
        mark, keyword = _END.match(text, at), _keyword(text)
        if mark and keyword and not keyword.istitle():
            # A statement that ended before, where prose began, has no part in this mark.
            until = mark.end() if mark.group() == ";" else at
            if own_statement(text[: mark.end()])[1] == text[:until].strip():
                return True
        text = text[own_statement(text)[0] :]
    if "```" not in text and "~~~" not in text:
        return False
    blocks = fenced_blocks(text + _MORE)
    if blocks and blocks[-1][1].endswith(_MORE):
        blocks.pop()
    return any(_holds_query(tag, body.strip()) for tag, body in blocks)


def complete_part(text: str, thinking: bool = False) -> str:
    """An answer up to where its SQL is complete; all of it where it never is.

    >>> complete_part("SELECT a FROM b; This returns a.")
    'SELECT a FROM b;'
    """
    for mark in re.finditer("[;`~]", text):
        part = text[: mark.end()]
        if (part[-1] == ";" or part.endswith(("```", "~~~"))) and sql_complete(part, thinking):
            return part
    return text


_LAST = 4  # tokens: a mark that the last of them completes lies in them, three backticks and a line end at most
_START = 64  # tokens: enough to see whether an answer starts as SQL


class Stops:
    """Says of the token ids of an answer whether it ends with the last of them.

    What it says is a function of the ids alone. An engine asks after every watched token, and ends the answer at the
    first for which `over` is true.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Whose vocabulary is looked through, once.
        stop (`tuple[str, ...]`): Strings that end an answer wherever they stand, in thoughts too; none of them empty.
        thinking (`bool`): Whether the answer begins inside a think block: thinking is on, or the prompt ends in
            `<think>`, as some templates have it.
        decode (`Callable[[list[int]], str]`): Token ids to text, without special tokens but with think tags.
        sql_ends (`bool`, *optional*, defaults to `True`): Whether an answer is over where its SQL is complete.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: tuple[str, ...],
        thinking: bool,
        decode: Callable[[list[int]], str],
        sql_ends: bool = True,
    ) -> None:
        self._stop, self._thinking, self._decode, self._sql_ends = stop, thinking, decode, sql_ends
        # How many tokens a stop string can span, a byte each at least; 0 is all: a cut character may spoil the next.
        self._recent = max(map(len, stop), default=0) if "".join(stop).isascii() else 0
        close = tokenizer.convert_tokens_to_ids("</think>")
        self._close = None if close == tokenizer.unk_token_id else close
        ends = {*(";`~" if sql_ends else ""), *(each[-1] for each in stop)}
        if any(end > "\x7f" for end in ends):
            ends.add("\ufffd")  # a token that is a part of a character reads as this
        known = list(tokenizer.get_vocab().values())  # there may be gaps
        # Each twice, because decoders may drop the space that begins a text; the backend takes a third of the time.
        batch = tokenizer.backend_tokenizer.decode_batch if tokenizer.is_fast else tokenizer.batch_decode
        texts = batch([[token, token] for token in known], skip_special_tokens=False)
        self.watched = frozenset(token for token, text in zip(known, texts, strict=True) if not ends.isdisjoint(text))

    def over(self, tokens: list[int]) -> bool:
        """Whether the answer of these tokens, the last of them a watched one, ends here.

        The whole text is looked at only where its last tokens show a mark that may have ended the SQL: long answers
        have many a `;` and many quoted names.
        """
        if self._stop:
            recent = self._decode(tokens[-self._recent :])
            if any(stop in recent for stop in self._stop):
                return True
        return self._sql_ends and self._may_end(tokens) and sql_complete(self._decode(tokens), self._thinking)

    def _may_end(self, tokens: list[int]) -> bool:
        """Whether this may be the end of the SQL; where it overlooks an odd one, the answer only goes on."""
        last = self._decode(tokens[-_LAST:])
        fence = "```" in last or "~~~" in last
        if not fence and ";" not in last:
            return False
        answer = 0
        if self._close is not None:
            if self._close in tokens:
                answer = len(tokens) - tokens[::-1].index(self._close)
            elif self._thinking:
                return False
        start = self._decode(tokens[answer : answer + _START]).lstrip()
        if start.startswith("<think"):
            return self._close is None
        return fence or statement_start(start) >= 0

    def text(self, tokens: list[int]) -> str:
        """The text of an answer, up to the stop string that is complete first, without it."""
        text = self._decode(tokens)
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        return text[: min(found)[1]] if found else text

"""What SQL's tokens and its syntax tree tell: is it ordered, can chance or the clock decide it, how far from another.

Flags work on sqlglot's tokens: what sqlglot makes of a parsed query may run differently (a comma join becomes CROSS
JOIN, which fixes SQLite's join order; "x" in double quotes may be a string). The tree serves for [`distance`] alone.
Nothing here raises, whatever the text.
"""

import logging
import re
from collections import Counter
from contextvars import ContextVar
from difflib import SequenceMatcher
from enum import Enum
from functools import lru_cache

import sqlglot
from sqlglot import expressions as exp
from sqlglot.dialects.dialect import Dialect
from sqlglot.tokens import Token, TokenType

from t2s_pref.statements import words

LONGEST = 100_000  # characters that are taken apart: more is a second of work for one text

_QUOTED = (TokenType.IDENTIFIER, TokenType.STRING)

_CLOCK = words("current_date current_time current_timestamp")
_SERVER_CLOCK = words("localtime localtimestamp sysdate tablesample")
_CHANGING = words(
    "random randomblob rand uuid gen_random_uuid uuid_generate_v4 newid now clock_timestamp statement_timestamp "
    "transaction_timestamp timeofday sysdate curdate curtime utc_date utc_time utc_timestamp changes total_changes "
    "last_insert_rowid nextval txid_current pg_backend_pid connection_id"
)
_NOW_WITHOUT = words("date time datetime julianday unixepoch unix_timestamp")  # of now where they have no argument
_NOW_WITH_ONE = words("strftime age")
_DATES = words("date time datetime julianday unixepoch strftime timediff")
_SPECIAL_DATES = {"sqlite": words("now"), "mysql": words(""), "postgres": words("now today tomorrow yesterday")}
_MAY_CHANGE = re.compile(
    rf"now|today|tomorrow|yesterday|{'|'.join(sorted(_CLOCK | _SERVER_CLOCK | _CHANGING))}|strftime|\bage\b|--|/\*"
    rf"|\b(?:{'|'.join(sorted(_NOW_WITHOUT))})\s*\(\s*\)",
    re.I,
)
_ATOM = re.compile(r"""'[^']*(?:'|\Z)|"[^"]*(?:"|\Z)|`[^`]*(?:`|\Z)|--[^\n]*|/\*(?s:.*?)(?:\*/|\Z)|[()]|\w+""")

# sqlglot warns of all that it does not know, on stderr if nothing else: silent for our calls, as before for the user's.
_quiet: ContextVar[bool] = ContextVar("_quiet", default=False)
logging.getLogger("sqlglot").addFilter(lambda record: not _quiet.get())

_WORD = re.compile(r"\w+|[^\w\s]")
_EVEN = (exp.Connector, exp.EQ, exp.NEQ, exp.Add, exp.Mul, exp.Union, exp.Intersect)  # their sides may change places


@lru_cache(maxsize=64)
def sql_tokens(sql: str, dialect: str) -> list[Token]:
    """The tokens of a text, without the `;` at its end; none where it cannot be split into them."""
    if len(sql) > LONGEST:
        return []
    try:
        tokens = list(Dialect.get_or_raise(dialect).tokenize(sql))
    except Exception:  # sqlglot raises what it likes on what is no SQL, and any text may come here
        return []
    while tokens and tokens[-1].token_type == TokenType.SEMICOLON:
        tokens.pop()
    return tokens


def plain_words(tokens: list[Token]) -> list[str]:
    """Each token's text in lower case, but nothing for what is in quotes or a part of a longer name."""
    texts = ["" if token.token_type in _QUOTED else token.text.lower() for token in tokens]
    return ["" if place and texts[place - 1] == "." else text for place, text in enumerate(texts)]


def orders_at(texts: list[str], place: int) -> bool:
    """Whether ORDER BY starts here: one token, or two where a comment stands between."""
    return texts[place].split() == ["order", "by"] or texts[place : place + 2] == ["order", "by"]


def pairs_of(texts: list[str]) -> dict[int, int]:
    """Where each closing parenthesis was opened."""
    pairs: dict[int, int] = {}
    opened: list[int] = []
    for place, text in enumerate(texts):
        if text == "(":
            opened.append(place)
        elif text == ")" and opened:
            pairs[place] = opened.pop()
    return pairs


def is_ordered(sql: str, dialect: str = "sqlite") -> bool:
    """Whether the outermost query has ORDER BY.

    >>> is_ordered("SELECT a FROM (SELECT a FROM t ORDER BY a)"), is_ordered("SELECT a UNION SELECT b ORDER BY 1")
    (False, True)
    """
    if "order" not in sql.lower():
        return False
    texts = plain_words(sql_tokens(sql, dialect))
    if not texts:  # no sound tokens: the words outside of quotes and comments
        texts = [atom for atom in _ATOM.findall(sql.lower()) if atom[0] not in "'\"`-/"]
    closing = {start: end for end, start in pairs_of(texts).items()}
    at, end = 0, len(texts) - 1
    while at < end and closing.get(at) == end:
        at, end = at + 1, end - 1
    while at <= end:
        if orders_at(texts, at):
            return True
        at = closing.get(at, at) + 1
    return False


def split_list(texts: list[str], start: int, end: int) -> list[tuple[int, int]]:
    """The parts between the commas of a list, but not those in parentheses."""
    parts, depth = [], 0
    for place in range(start, end):
        depth += (texts[place] == "(") - (texts[place] == ")")
        if depth == 0 and texts[place] == ",":
            parts.append((start, place))
            start = place + 1
    return [*parts, (start, end)]


def volatile(sql: str, dialect: str = "sqlite") -> str:
    """The first thing in a query that changes with time or chance, or the empty string.

    `'now'` counts in SQLite where a date function is called anywhere in the query.

    >>> volatile("SELECT * FROM t WHERE day > date('now')"), volatile("SELECT 'random()', now FROM t")
    ("'now'", '')
    """
    if not _MAY_CHANGE.search(sql):
        return ""
    tokens = sql_tokens(sql, dialect)
    texts = plain_words(tokens)
    special = _SPECIAL_DATES.get(dialect, _SPECIAL_DATES["postgres"])
    dated = dialect != "sqlite" or any(
        text in _DATES and texts[place + 1 : place + 2] == ["("] for place, text in enumerate(texts)
    )
    for place, text in enumerate(texts):
        if not text:
            token = tokens[place]
            # in SQLite "now" is a string too where no column has that name
            string = token.token_type == TokenType.STRING or (dialect == "sqlite" and sql[token.start] == '"')
            if dated and string and token.text.lower() in special:
                return f"'{token.text.lower()}'"
            continue
        after = texts[place + 1 : place + 3]
        calls = after[:1] == ["("]
        if text in _CLOCK or (text in _SERVER_CLOCK and dialect != "sqlite"):
            return text
        if calls and (text in _CHANGING or (text in _NOW_WITHOUT and after[1:] == [")"])):
            return f"{text}()"
        if calls and text in _NOW_WITH_ONE and not _has_comma(texts, place + 1):
            return f"{text}()"
    return ""


def _has_comma(texts: list[str], opening: int) -> bool:
    depth = 0
    for place in range(opening, len(texts)):
        depth += (texts[place] == "(") - (texts[place] == ")")
        if depth == 0:
            return False
        if depth == 1 and texts[place] == ",":
            return True
    return False


def without_distinct(sql: str, dialect: str = "sqlite") -> str:
    """The text without its DISTINCT, as Spider's evaluation compares queries by default.

    >>> without_distinct("SELECT count(DISTINCT a) FROM t WHERE b IS DISTINCT FROM c")
    'SELECT count( a) FROM t WHERE b IS DISTINCT FROM c'
    """
    tokens = sql_tokens(sql, dialect) if "distinct" in sql.lower() else []
    for place in reversed(range(len(tokens))):
        comparing = place and tokens[place - 1].token_type in (TokenType.IS, TokenType.NOT)
        if tokens[place].token_type == TokenType.DISTINCT and not comparing:
            sql = sql[: tokens[place].start] + sql[tokens[place].end + 1 :]
    return sql


def distance(gold: str, candidate: str, dialect: str = "sqlite") -> float:
    """How far a candidate's syntax tree is from its gold's: 0 for the same tree, 1 for nothing in common.

    One less the Dice coefficient of their branches (paths of up to three nodes down the tree, as a bag), so the order
    of branches (of AND, of columns) does not count, but the sides of a `<` do. Where one cannot be parsed, one less the
    similarity of the words.

    >>> near = distance("SELECT a FROM t WHERE b = 1", "SELECT a FROM t WHERE b = 2")
    >>> far = distance("SELECT a FROM t WHERE b = 1", "SELECT count(*) FROM u")
    >>> 0 < near < far < 1
    True
    """
    left, right = _branches(gold, dialect), _branches(candidate, dialect)
    if left is None or right is None:
        # sorted, because what SequenceMatcher finds depends on which side comes first
        ours, theirs = (_WORD.findall(text.casefold())[:500] for text in sorted((gold, candidate)))
        return round(1 - SequenceMatcher(None, ours, theirs, autojunk=False).ratio(), 4)
    shared = (left & right).total()
    return round(1 - 2 * shared / (left.total() + right.total()), 4)


@lru_cache(maxsize=1024)
def _branches(sql: str, dialect: str) -> Counter[tuple[str, ...]] | None:
    """The paths of one to three nodes in a text's tree, each with how often it comes; None where it does not parse."""
    if len(sql) > LONGEST:
        return None
    quiet = _quiet.set(True)
    try:
        tree = sqlglot.parse_one(sql, read=dialect, error_level=sqlglot.ErrorLevel.RAISE)
        paths: Counter[tuple[str, ...]] = Counter()
        stack: list[tuple[exp.Expression, tuple[str, ...]]] = [(tree, ())]
        while stack:
            node, above = stack.pop()
            label = _label(node)
            paths[(label,)] += 1
            path = (*above[-4:], _side(node), label) if above else (label,)  # nodes, and the sides between them
            paths.update(path[start:] for start in range(0, len(path) - 1, 2))
            stack += [(child, path) for child in node.iter_expressions()]
        return paths
    except Exception:  # as above: any text may come
        return None
    finally:
        _quiet.reset(quiet)


def _label(node: exp.Expression) -> str:
    """A node's class, with what it says itself; names in one case."""
    if isinstance(node, exp.Identifier):
        return f"name {node.name.casefold()}"
    said = [f"{name}={value}" for name, value in node.args.items() if isinstance(value, str | bool | Enum) and value]
    return " ".join([type(node).__name__, *said])


def _side(node: exp.Expression) -> str:
    """Which argument of its parent a node is, where changing places would change what the parent means."""
    parent = node.parent
    if isinstance(parent, _EVEN):
        return ""
    ranked = node.index is not None and isinstance(parent, exp.Order | exp.Func)
    return f"{node.arg_key} {node.index}" if ranked else str(node.arg_key)

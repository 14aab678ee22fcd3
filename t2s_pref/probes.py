"""Queries rewritten such that they return the same rows exactly where the data determine what they return.

A probe is the original text with a few words put in by the places of its tokens. Nothing here raises, whatever the
text, and a probe that the engine refuses says nothing.

Not covered: what hides in views; subqueries for one value that return several of a grouping. A LIMIT without an order
counts as undetermined, even where it cuts an ordered subquery.
"""

import re

from sqlglot.tokens import Token, TokenType

from t2s_pref.statements import words
from t2s_pref.trees import orders_at, pairs_of, plain_words, split_list, sql_tokens

PAIRS = 3  # how often ties are broken one way and the other: two rows that are tied change places for sure

_COMPOUNDS = (TokenType.UNION, TokenType.INTERSECT, TokenType.EXCEPT)
_MAY_TIE = re.compile(r"\b(?:limit|fetch|offset|over|distinct\s+on)\b", re.I)
_NAMES_OFFSET = words("sqlite mysql")  # OFFSET stands after a LIMIT only, so a lone `offset` is a name
# Windows whose value depends on the order of equal rows. With a ROWS frame any does, but those of ranks.
_PLACED = words("row_number first_value last_value nth_value lag lead ntile")
_RANKS = words("rank dense_rank percent_rank cume_dist")
_FRAMES = words("rows range groups")
_BOUNDS = words("between unbounded current")
_AFTER_KEY = words("collate asc desc nulls first last")
_AGGREGATES = words("count sum avg total min max group_concat string_agg json_group_array json_group_object median")
_ENDS = words("having order limit union intersect except window fetch offset")
_AFTER_FROM = _ENDS | words("where group")
MOST_SELECTS = 50  # that a query may have: each is looked at to its end
MIXES = 4  # pairs of random orders of the tables, in turn with and without ties broken at random as well
_MAY_MIX = re.compile(
    r"\b(?:group|limit|fetch|over|min|max|distinct|group_concat|string_agg|array_agg|json\w*_(?:agg|array|object)\w*)\b"
    r"|[=<>(,]\s*\(?\s*select\b",
    re.I,
)
_OPERATORS = frozenset("+-*/%|=<>.,(")


def probes(sql: str, dialect: str = "sqlite") -> tuple[str, ...]:
    """All that is to be run to find out whether the data determine a query's result, in this order.

    They come in pairs, of which both are to be run with the same random numbers.
    [`mixed_probes`] are others, which may cost more than the query.

    >>> probes("SELECT a FROM t ORDER BY b")
    ()
    """
    ties = [tie for sign in ("", "-") for tie in tie_probes(sql, dialect, sign)]
    return (*bare_probes(sql, dialect), *PAIRS * ties)


def mixed_probes(sql: str, dialect: str = "sqlite") -> tuple[str, ...]:
    """The query over tables whose rows come in a random order, and in the opposite of that; none where no order counts.

    They find what ties decide wherever it happens: which of a group's rows a column comes from, in what order
    group_concat has its parts, which row a subquery for one value takes. In pairs, like [`probes`].

    >>> mixed_probes("SELECT name, max(age) FROM t")[0]
    'WITH t AS (SELECT * FROM main.t ORDER BY RANDOM() LIMIT -1) SELECT name, max(age) FROM t'
    """
    if not _MAY_MIX.search(sql):
        return ()
    bases = [sql, *tie_probes(sql, dialect)]
    return tuple(
        text for pair in range(MIXES) for sign in ("", "-") for text in _mixed(bases[pair % len(bases)], dialect, sign)
    )


def _mixed(sql: str, dialect: str, sign: str) -> list[str]:
    tokens = sql_tokens(sql, dialect)
    texts = plain_words(tokens)
    # without a LIMIT, engines leave out the order of a subquery; SQLite reads `t` there as the CTE, not as the table
    schema, limit = {"sqlite": ("main.", " LIMIT -1"), "mysql": ("", f" LIMIT {2**64 - 1}")}.get(dialect, ("", ""))
    order = f"ORDER BY {sign}{_chance(dialect)}{limit}"
    mixed = ", ".join(f"{name} AS (SELECT * FROM {schema}{name} {order})" for name in _tables(sql, tokens, texts))
    if not mixed:
        return []
    if texts[0] != "with":
        return [f"WITH {mixed} {sql}"]
    at = tokens[1 + (texts[1:2] == ["recursive"])].start
    return [f"{sql[:at]}{mixed}, {sql[at:]}"]


def _tables(sql: str, tokens: list[Token], texts: list[str]) -> list[str]:
    """The names after FROM and JOIN, as written, without those of a schema and those that the query defines itself."""
    pairs = pairs_of(texts)
    own = set()
    for place, text in enumerate(texts[:-1]):
        if text == "as" and texts[place + 1] in ("(", "materialized", "not") and place:
            named = pairs.get(place - 1, place) - 1  # before a list of columns
            own.add(tokens[named].text.casefold())
    tables: dict[str, str] = {}
    for place, text in enumerate(texts):
        if text not in ("from", "join"):
            continue
        starts = [place + 1]
        if text == "from":
            starts = [start for start, _ in split_list(texts, place + 1, _from_end(texts, place + 1))]
        for start in starts:
            if start >= len(tokens) or texts[start] == "(":
                continue
            token, after = tokens[start], texts[start + 1 : start + 2]
            named = token.token_type in (TokenType.VAR, TokenType.IDENTIFIER) or texts[start].isidentifier()
            if not named or after in (["."], ["("]):
                continue
            if token.text.casefold() not in own:
                tables.setdefault(token.text.casefold(), sql[token.start : token.end + 1])
    return list(tables.values())


def _from_end(texts: list[str], start: int) -> int:
    """Where the list of a FROM ends."""
    depth = 0
    for place in range(start, len(texts)):
        depth += (texts[place] == "(") - (texts[place] == ")")
        if depth < 0 or (depth == 0 and (texts[place].split() or [""])[0] in _AFTER_FROM):
            return place
    return len(texts)


def _chance(dialect: str) -> str:
    return "RAND()" if dialect in ("mysql", "tsql") else "RANDOM()"


def bare_probes(sql: str, dialect: str = "sqlite") -> list[str]:
    """The text with the least, and with the greatest, of what SQLite and MySQL may take from any row of a group.

    A column that is neither grouped nor aggregated comes from some row; where all rows of each group agree, as for the
    name that belongs to a grouped key, both probes return what the query does.

    >>> bare_probes("SELECT name, count(*) FROM t GROUP BY age")[0]
    'SELECT min(name) AS name, count(*) FROM t GROUP BY age'
    """
    if dialect not in ("sqlite", "mysql") or ("(" not in sql and "group" not in sql.lower()):
        return []
    tokens = sql_tokens(sql, dialect)
    texts = plain_words(tokens)
    places = [item for start, text in enumerate(texts) if text == "select" for item in _bare(tokens, texts, start)]
    found = []
    for function in ("min", "max") if places else ():
        probe = sql
        for start, end, alias in sorted(places, reverse=True):
            at, after = tokens[start].start, tokens[end - 1].end + 1
            probe = f"{probe[:at]}{function}({probe[at:after]}){alias}{probe[after:]}"
        found.append(probe)
    return found


def _bare(tokens: list[Token], texts: list[str], select: int) -> list[tuple[int, int, str]]:
    """The columns of one SELECT that come from any row of a group: their tokens, and the name that each would lose."""
    start = select + 1 + (texts[select + 1 : select + 2] == ["distinct"])
    depth, place, origin, group = 0, start, None, None
    while place < len(texts) and depth >= 0:
        text = texts[place]
        depth += (text == "(") - (text == ")")
        if depth == 0 and text == "from" and origin is None:
            origin = place
        elif depth == 0 and text.split() == ["group", "by"]:
            group = place
        elif depth == 0 and text.split()[:1] and text.split()[0] in _ENDS and origin is not None:
            break
        place += 1
    end = place - 1 if depth < 0 else place
    if origin is None:
        return []
    items = split_list(texts, start, origin)
    called = [
        {texts[at] for at in range(*item) if texts[at + 1 : at + 2] == ["("] and "select" not in texts[slice(*item)]}
        for item in items
    ]
    if not (group is not None or any(names & _AGGREGATES for names in called)) or "over" in texts[start:origin]:
        return []
    if any(texts[at] in ("min", "max") and texts[at + 1 : at + 2] == ["("] for at in range(start, len(texts))):
        return []  # SQLite takes the others from the row with the least or the greatest
    names = [_name(tokens, texts, *item) for item in items]
    keys = set()
    for first, last in split_list(texts, group + 1, end) if group is not None else ():
        number = tokens[first].text if last == first + 1 else ""
        within = number.isdigit() and 0 < int(number) <= len(items)
        keys |= {_plain(tokens, *names[int(number) - 1][0])} if within else {_plain(tokens, first, last)}
    bare = []
    for (first, last), calls, ((_, stop), alias) in zip(items, called, names, strict=True):
        own = _plain(tokens, first, stop)
        constant = stop == first + 1 and tokens[first].token_type in (TokenType.NUMBER, TokenType.STRING)
        skipped = calls & _AGGREGATES or "select" in texts[first:last] or tokens[stop - 1].text == "*" or constant
        if not skipped and own not in keys and alias.casefold() not in keys and stop > first:
            raw = tokens[stop - 1]
            is_column = stop - first == 1 or (stop - first == 3 and tokens[first + 1].text == ".")
            bare.append((first, stop, f" AS {_quoted(raw)}" if is_column and not alias else ""))
    return bare


def _name(tokens: list[Token], texts: list[str], start: int, end: int) -> tuple[tuple[int, int], str]:
    """Where the expression of a column is, without its alias, and that alias."""
    if end - start >= 3 and texts[end - 2] == "as":
        return (start, end - 2), tokens[end - 1].text
    named = end - start >= 2 and tokens[end - 1].token_type in (TokenType.VAR, TokenType.IDENTIFIER)
    if named and not set(tokens[end - 2].text[-1:]) & _OPERATORS:
        return (start, end - 1), tokens[end - 1].text
    return (start, end), ""


def _plain(tokens: list[Token], start: int, end: int) -> str:
    """An expression as one text; of a column, its own name alone."""
    texts = [token.text.casefold() for token in tokens[start:end]]
    return texts[2] if len(texts) == 3 and texts[1] == "." else " ".join(texts)


def _quoted(token: Token) -> str:
    return f"`{token.text}`" if token.token_type == TokenType.IDENTIFIER else token.text


class _Level:
    """What is known of the query, or of the window, inside one pair of parentheses; places are those of tokens."""

    def __init__(self, first: int, functions: frozenset[str] = frozenset()) -> None:
        self.first = first
        self.functions = functions  # of the window, if it is one
        self.order: int | None = None
        self.limit: int | None = None
        self.frame: int | None = None
        self.compound = self.distinct = self.distinct_on = False


def tie_probes(sql: str, dialect: str = "sqlite", sign: str = "") -> list[str]:
    """The text with ties broken at random wherever a LIMIT or a window's order leaves them; none where nothing does.

    With `sign` `-` they are broken in the opposite way, where the random numbers are the same.

    Where the data determine a query's result, its probe returns the same bag of rows each time. A probe that the engine
    refuses says nothing.

    >>> tie_probes("SELECT name FROM t ORDER BY age DESC LIMIT 1")
    ['SELECT name FROM t ORDER BY age DESC , RANDOM() LIMIT 1']
    """
    if not _MAY_TIE.search(sql):
        return []
    tokens = sql_tokens(sql, dialect)
    texts = plain_words(tokens)
    pairs = pairs_of(texts)
    named: dict[str, set[str]] = {}  # the functions over each named window
    for place, text in enumerate(texts[1:]):
        if texts[place] == "over" and text not in ("", "("):
            named.setdefault(text, set()).add(_function(texts, place, pairs))
    edits: list[tuple[int, int, str]] = []
    levels = [_Level(0)]
    for place, token in enumerate(tokens):
        text, level = texts[place], levels[-1]
        after = texts[place + 1] if place + 1 < len(texts) else ""
        if text == "(":
            levels.append(_Level(place + 1, _functions(texts, place, pairs, named)))
        elif text == ")" and len(levels) > 1:
            edits += _edits(sql, tokens, texts, levels.pop(), place, dialect, sign)
        elif text in (")", ";"):  # nothing opened it, or several statements
            return []
        elif orders_at(texts, place):
            level.order = place
        elif level.limit is None and (
            text == "limit"
            or (text == "offset" and dialect not in _NAMES_OFFSET)
            or (text == "fetch" and after in ("first", "next") and "ties" not in texts[place : place + 9])
        ):
            level.limit = place
        elif token.token_type in _COMPOUNDS:
            level.compound = True
        elif text == "distinct" and texts[place - 1] == "select":
            level.distinct, level.distinct_on = after != "on", after == "on"
        elif text in _FRAMES and level.functions and level.frame is None and (after in _BOUNDS or after.isdigit()):
            level.frame = place
    if len(levels) != 1:
        return []
    edits += _edits(sql, tokens, texts, levels[0], len(tokens), dialect, sign)
    for start, end, text in sorted(edits, reverse=True):
        sql = f"{sql[:start]}{text}{sql[end:]}"
    return [sql] if edits else []


def _function(texts: list[str], over: int, pairs: dict[int, int]) -> str:
    """The function before the OVER at `over`, past FILTER (...) and IGNORE NULLS."""
    before = over - 1
    while before > 0 and texts[before] in ("nulls", "ignore", "respect"):
        before -= 1
    name = pairs.get(before, 0) - 1
    if name > 0 and texts[name] == "filter":
        name = pairs.get(name - 1, 0) - 1
    return texts[name] if name >= 0 else ""


def _functions(texts: list[str], place: int, pairs: dict[int, int], named: dict[str, set[str]]) -> frozenset[str]:
    """The functions whose window the parenthesis at `place` opens; none where it opens something else."""
    if place and texts[place - 1] == "over":
        return frozenset([_function(texts, place - 1, pairs)])
    if (
        place > 1
        and texts[place - 1] == "as"
        and texts[place + 1 : place + 2] not in (["select"], ["with"], ["values"])
    ):
        return frozenset(named.get(texts[place - 2], ()))
    return frozenset()


def _edits(
    sql: str, tokens: list[Token], texts: list[str], level: _Level, end: int, dialect: str, sign: str
) -> list[tuple[int, int, str]]:
    """What to put in, and where, so that ties on a level that closes at the token `end` are broken at random."""
    chance = sign + _chance(dialect)
    term = f", {chance} " if level.order is not None else f" ORDER BY {chance} "
    if level.functions:
        at = tokens[end if level.frame is None else level.frame].start
        frame = "" if level.frame is None else texts[level.frame]
        inside = " ".join(texts[level.first : end])
        # With one key more, a frame of peers ends with the row itself. Only what comes last or first may not mind.
        splits = "exclude" in inside or (frame != "rows" and "nth_value" in level.functions)
        placed = level.functions <= _PLACED and not (splits and "unbounded following" not in inside)
        by_row = frame == "rows" and not splits and not level.functions & _RANKS
        return [(at, at, term)] if placed or by_row else []
    if level.limit is None:
        if not level.distinct_on or level.order is None or level.compound:
            return []
        at = tokens[end - 1].end + 1
        return [(at, at, f" {term}")]
    at = tokens[level.limit].start
    if not level.compound and not (level.distinct and dialect != "sqlite"):
        return [(at, at, term)]
    if texts[level.first] not in ("select", "with", "values", "("):
        return []
    keys = _outer_keys(sql, tokens, texts, level, dialect)
    if keys is None:
        return []
    # Only its own columns can order a set operation; from outside, anything can. The LIMIT inside keeps SQLite from
    # pulling a UNION ALL out of the subquery, where it could not be ordered so.
    inner = tokens[level.limit if level.order is None else level.order].start
    whole = " LIMIT -1" if dialect == "sqlite" else ""
    start = tokens[level.first].start
    return [
        (start, start, "SELECT * FROM ("),
        (inner, at, f"{whole}) AS probed ORDER BY {', '.join([*keys, chance])} "),
    ]


def _outer_keys(sql: str, tokens: list[Token], texts: list[str], level: _Level, dialect: str) -> list[str] | None:
    """What a query's ORDER BY becomes outside of it, where only the names and places of its columns are known."""
    if level.order is None:
        return []
    keys = []
    for start, end in split_list(texts, level.order + 1 + (texts[level.order] == "order"), level.limit):
        raw = [sql[token.start : token.end + 1] for token in tokens[start:end]]
        size = 3 if raw[1:2] == ["."] else 1
        for at in range(start + size, end):
            if texts[at] not in _AFTER_KEY and texts[at - 1] != "collate":
                return None
        name = tokens[start + size - 1].text
        # in SQLite a name in double quotes that is no column would be a string, the same for all rows
        key = f"`{name}`" if dialect == "sqlite" and raw[size - 1][0] == '"' else raw[size - 1]
        keys.append(" ".join([key, *raw[size:]]))
    return keys

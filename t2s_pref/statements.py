"""Where SQL statements start and end in a text that may be anything.

A model's answer need not be SQL, so nothing here parses: a statement is known by its first words, and ends outside of
quotes and comments. Every scan is linear in the text, and no regular expression can backtrack into another's work.
"""

import re


def words(text: str) -> frozenset[str]:
    """The words of a space-separated list, for looking up."""
    return frozenset(text.split())


_OBJECT = r"(?:TABLE|VIEW|INDEX|TRIGGER|SCHEMA|DATABASE|FUNCTION|PROCEDURE|SEQUENCE|TYPE|USER|ROLE)\b"
_NAME = r"""(?:\w+\b|"[^"\n]{1,200}"|`[^`\n]{1,200}`|\[[^\]\n]{1,200}\])"""
# What must follow a first keyword for it to be SQL and not an English verb or preposition ("Select the rows ...",
# "with the following query", "Create a table").
_SHAPES = {
    "SELECT": r"""\s*(?:(?:DISTINCT|ALL|TOP\s+\d+)\b\s*)?
        (?: ["'`\[(*+\-\d@?$~] | /\* | :\w
          | \w+\b\s*(?: [,(+\-*/%|=<>;)\[] | \.["`\[*\w] | :: | \Z | (?:FROM|AS|IS|IN|NOT|LIKE|AND|OR|BETWEEN|WHEN)\b
              | '[^'\n]{0,200}' | (?<=\s)\w+\s*(?:,|FROM\b) ) )""",
    "WITH": rf"\s+(?:RECURSIVE\s+)?{_NAME}\s*(?:\([^()]{{0,500}}\)\s*)?AS\s*(?:(?:NOT\s+)?MATERIALIZED\s*)?\(",
    "VALUES": r"\s*\(",
    "INSERT": r"\s+(?:OR\s+\w+\s+)?(?:INTO|OVERWRITE)\b",
    "REPLACE": r"\s+INTO\b",
    "UPDATE": rf"\s+(?:OR\s+\w+\s+)?{_NAME}(?:\.{_NAME})?(?:\s+(?:AS\s+)?\w+)?\s+SET\b",
    "DELETE": r"\s+FROM\b",
    "MERGE": r"\s+INTO\b",
    "CREATE": r"\s+(?:(?:OR\s+REPLACE|TEMP|TEMPORARY|UNIQUE|VIRTUAL|MATERIALIZED|GLOBAL|LOCAL)\s+)*" + _OBJECT,
    "DROP": r"\s+" + _OBJECT,
    "ALTER": r"\s+" + _OBJECT,
    "TRUNCATE": r"\s+TABLE\b",
    "PRAGMA": r"\s+\w+\s*(?:[;=(.]|\Z)",
    "EXPLAIN": r"\s+(?:QUERY\s+PLAN\s+|ANALYZE\s+)?(?:SELECT|WITH|INSERT|UPDATE|DELETE|VALUES)\b",
    "ATTACH": r"\s+(?:DATABASE\s+)?['\"]",
    "VACUUM": r"\s*(?:;|\Z|INTO\b)",
    "BEGIN": r"\s*(?:;|\Z|TRANSACTION\b|IMMEDIATE\b|EXCLUSIVE\b)",
    "COMMIT": r"\s*(?:;|\Z)",
    "ROLLBACK": r"\s*(?:;|\Z)",
    "END": r"\s*(?:;|\Z)",  # closes a trigger's body, after a `;`
}
_SHAPE = {word: re.compile(shape, re.I | re.X if word == "SELECT" else re.I) for word, shape in _SHAPES.items()}
HEAD = re.compile(rf"\b(?:{'|'.join(_SHAPES)})\b", re.I)
FROM = re.compile(r"\bFROM\b", re.I)
ENGLISH = re.compile(
    r"\s+(?:the|this|these|those|that|each|every|only|your|our|their|me|some|any|which|to|(?P<article>an?))"
    r"\s+(?!FROM\b|AS\b)[a-z]",
    re.I,
)
_NOUN = re.compile(r"\s+(?:statements?|clauses?|quer(?:y|ies)|commands?|keywords?|operations?|parts?|lists?)\b", re.I)
# Words that can go on with a statement after a blank line.
CLAUSES = words(
    "select from where group order having limit offset union intersect except join inner left right full cross natural "
    "outer on using and or as when then else end case set values into returning window by asc desc in exists between "
    "like not distinct all over partition with"
)

_OPEN = words("is glob regexp collate nulls filter escape")  # nor can a statement end with one of these

# What comes before a statement: white space, comments, opening parentheses.
_LEAD = re.compile(r"(?:\s+|\(|--[^\n]*|/\*(?s:.*?)(?:\*/|\Z))*")
_COMMENT = re.compile(r"--[^\n]*|/\*(?s:.*?)\*/")
_LEAD_OR_END = re.compile(r"(?:\s+|;|--[^\n]*|/\*(?s:.*?)(?:\*/|\Z))*")


def is_statement(text: str, at: int, in_prose: bool = False) -> bool:
    """Whether a statement starts at `at`. Between sentences an upper-case keyword is not enough: its shape decides."""
    head = HEAD.match(text, at)
    if not head:
        return False
    word = head.group()
    english = ENGLISH.match(text, head.end())
    # "Select a row ..." is English; `select a b from t` and `SELECT a b FROM t` name a column.
    if english and (not english["article"] or word.istitle()):
        return False
    if in_prose and _NOUN.match(text, head.end()):
        return False
    if (word.isupper() or word == "select") and not in_prose:
        return True
    return _SHAPE[word.upper()].match(text, head.end()) is not None


def statement_start(text: str) -> int:
    """Where the first keyword of a text that starts as SQL stands, after comments and parentheses, or -1."""
    lead = _LEAD.match(text).end()
    return lead if is_statement(text, lead) else -1


# A quote right after one of these is a string (`LIKE'%a'`, `x'00'`); after any other word it is an apostrophe.
_BEFORE_STRING = words(
    "select like and or then else when in as by not glob between is values escape distinct all where having x n e b"
)
_WORD_BEFORE = re.compile(r"(?:\A|\W)(\w{1,9})\Z")
_BRACKETED = re.compile(r"\[[^\]\n]{0,64}\]")


def past(text: str, at: int, unclosed: set[str]) -> int:
    """The end of the string, quoted name or comment that opens at `at`, or `at + 1` where nothing opens.

    `unclosed` remembers the quotes that never close from here on, which keeps a text of a million quotes linear.
    """
    mark = text[at]
    if mark == "-":
        end = text.find("\n", at)
        return len(text) if end < 0 else end
    if mark == "/":
        end = text.find("*/", at + 2)
        return len(text) if end < 0 else end + 2
    if mark == "[":
        bracketed = _BRACKETED.match(text, at)
        return bracketed.end() if bracketed else at + 1
    if mark in unclosed:
        return at + 1
    if mark == "'" and (before := _WORD_BEFORE.search(text[max(0, at - 10) : at])):
        if before[1].lower() not in _BEFORE_STRING:
            return at + 1
    elif mark == "'" and at and (text[at - 1].isalnum() or text[at - 1] == "_"):
        return at + 1  # after a word longer than the look back
    end = at
    while (end := text.find(mark, end + 1)) >= 0:
        if not text.startswith(mark, end + 1):
            return end + 1
        end += 1  # a doubled quote stands for itself
    unclosed.add(mark)
    return at + 1


_STOP = re.compile(
    r"""`{3,} | ['"`\[] | -- | /\* | [();] | \n[ \t]*~~~
      | \n[ \t]*(?=(?:Explanation|Note|Output|Result|Answer|Question)s?\s*:(?!:)
                  |(?:This|The)\ (?:SQL\ )?(?:query|statement)\b | Here(?:'s|\ is)\ )
      | \n\s*\n\s*""",
    re.X,
)


# A clause that is written like a sentence's beginning, and has more of a clause than its first word.
_TITLED = re.compile(
    r"""(?:Where|Having)\s+\(*[\w."`\[\]()*]{1,80}\s*(?:[=<>!]|In\s*\(|Like\s*'|Is\s+(?:Not\s+)?Null\b|Between\s+\S{1,40}\s+And\b)
      | From\s+[\w."`\[\]]{1,80}\s*(?:\Z|[,;)]|\n|(?:As|Where|Join|Group|Order)\b) | (?:Group|Order)\s+By\s | Limit\s+\d
      | (?:Inner\s+|Left\s+|Cross\s+)?Join\s+\S{1,80}\s | Union\s+(?:All\s+)?Select\b""",
    re.I | re.X,
)


def _goes_on(text: str, start: int, blank: re.Match[str], titled: bool) -> bool:
    """Whether a statement goes on after a blank line, rather than prose beginning there."""
    before = _COMMENT.sub("", text[max(start, blank.start() - 200) : blank.start()]).rstrip()
    if before[-1:] in tuple(",=<>+/|*%-") or re.split(r"\W", before)[-1].lower() in CLAUSES | _OPEN:
        return True
    if _TITLED.match(text, blank.end()):
        return True
    after = blank.end()
    if text[after : after + 1] in tuple(",)=<>+/|") or text.startswith("--", after) or is_statement(text, after):
        return True
    word = re.compile(r"\w*").match(text, after, after + 20).group()
    return word.lower() in CLAUSES and (word.isupper() or word.islower() or titled)


def statement_end(text: str, keyword: int, depth: int = 0, in_parentheses: bool = False) -> int:
    """Where the statement with its first keyword at `keyword` ends; SQL that follows its `;` belongs to it."""
    titled = HEAD.match(text, keyword).group().istitle()
    unclosed: set[str] = set()
    at = keyword
    while stop := _STOP.search(text, at):
        at, found = stop.start(), stop.group()
        if found in ("'", '"', "`", "[", "--", "/*"):
            at = past(text, at, unclosed)
        elif found == "(":
            depth, at = depth + 1, at + 1
        elif found == ")":
            depth, at = depth - 1, at + 1
            if in_parentheses and depth < 0:
                return at - 1
        elif found == ";":
            following = _LEAD_OR_END.match(text, at + 1).end()
            if following < len(text) and not is_statement(text, _LEAD.match(text, following).end()):
                fenced = text.startswith(("```", "~~~"), following)
                return following if fenced else at + 1
            at = following
        elif found.isspace() and found.count("\n") > 1:
            if depth <= 0 and not _goes_on(text, keyword, stop, titled):
                return at
            at = stop.end()
        else:  # a fence, or a line that begins an explanation
            return at
    return len(text)


def own_statement(text: str) -> tuple[int, str]:
    """The statement that a text starts with, and where it ends; (0, "") for a text that starts with anything else."""
    keyword = statement_start(text)
    if keyword < 0:
        return 0, ""
    depth = _COMMENT.sub("", text[:keyword]).count("(")
    end = statement_end(text, keyword, depth)
    return end, text[:end].strip()


_OPENING = re.compile(r"(?:\n|:|\*\*|[`\"'])[\s>*\-\d.)(]*\Z")
_MENTION = re.compile(r"([`\"'*])\w+\1")  # the keyword itself in quotes: "start with `SELECT`"
_CONTINUED = re.compile(r"(?:[(,]|\b(?:UNION|ALL|EXCEPT|INTERSECT|AS|EXISTS|IN|PLAN|EXPLAIN|ANALYZE)|\))\s*\Z", re.I)


def statement_in_prose(text: str) -> str:
    """The statement in a chatty answer, or "".

    A keyword counts where what follows has a statement's shape, and where it opens a line, follows a colon or stands in
    quotes, or is in upper case. The first that opens and has a FROM wins, then the first with a FROM, then the rest.
    """
    best, best_rank = None, -1
    next_from, next_break = -2, -2  # -2: not looked for yet, -1: no more; both only move forward
    for head in HEAD.finditer(text):
        at = head.start()
        if not is_statement(text, at, in_prose=True) or _MENTION.match(text, at - 1):
            continue
        before = ("\n" if at <= 40 else "") + text[max(0, at - 40) : at]
        if best is not None and _CONTINUED.search(before):
            continue
        opens = _OPENING.search(before) is not None
        if not opens and not head.group().isupper():
            continue
        if -1 != next_from < at:
            next_from = found.start() if (found := FROM.search(text, at)) else -1
        if -1 != next_break < at:
            next_break = text.find("\n\n", at)
        whole = head.group().upper() != "SELECT" or (next_from >= 0 and (next_break < 0 or next_from < next_break))
        if (rank := 2 * whole + opens) > best_rank:
            best, best_rank, best_before, best_opens = at, rank, before, opens
        if best_rank == 3:
            break
    if best is None:
        return ""
    mark = best_before[-2:] if best_before.endswith("**") else best_before[-1]
    if mark in ("`", "**", '"', "'"):
        line = "" if mark == "`" else r"[.,;:!)\]}]*[ \t]*(?:\n|\Z)"
        if closing := re.compile(re.escape(mark) + line).search(text, best):
            text = text[: closing.start()]
    start = best
    while best_opens and start and text[start - 1] == "(":
        start -= 1
    in_parentheses = start == best and best_before.endswith("(")
    return text[start : statement_end(text, best, best - start, in_parentheses)].strip()

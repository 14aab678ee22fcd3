"""Whether reasoning speaks of a query or an answer that was given, in English or Chinese: a policy is given none.

What is about the question, the schema or given values is no betrayal. Not covered: other languages, and hints that do
not say so.
"""

import re

# What could have been given. Not "output", "code" or "answers": in databases these are columns and tables.
_SQL = r"(?:sql|quer(?:y|ies)|statement)"
_THING = rf"(?:{_SQL}|select|answer|solution)\b"
_KIND = r"(?:(?:sql|sqlite|select|query|correct|final|right|full)\s+){0,2}"
_GIVEN = r"(?:given|provided|supplied|shown|shared|presented)"
_BETRAYALS = (
    # the reference answer, the provided SQL query, the user's query
    rf"\b(?:{_GIVEN}|reference|gold(?:en)?|target|ground[- ]truth|official|original|existing|sample|example|user's)"
    rf"\s+{_KIND}{_THING}",
    r"\bexpected\s+(?:sql\s+)?(?:query|sql|answer)\b|\bground[- ]truth\b|\banswer key\b",
    # the query (that was) given, the SQL you shared, the answer we have been given; but not what is given below, by ...
    rf"\b{_THING}\s+(?:(?:that|which)\s+)?(?:(?:is|was|were|has|had|been|already|you|i|we|they|i've|we've)\s+)"
    rf"{{0,3}}(?:{_GIVEN}|gave|mentioned above)\b(?!\s+(?:below|by|as|here|in the following|with))",
    rf"\b{_THING}\s+(?:above(?!\s+\d)|in the (?:prompt|task))\b|\b{_SQL}\s+(?:that is |is )?shown\b",
    # the user gave me the query, we are given a query, the task gives us the SQL
    rf"\b(?:user|task|prompt|we|we're|i|i'm|you)\s+(?:(?:am|are|is|was|were|has|have|had|been|already)\s+){{0,2}}"
    rf"(?:{_GIVEN}|gave|gives|told)\s+(?:(?:me|us|with|a|an|the|this)\s+){{0,3}}{_KIND}{_THING}",
    # what only somebody says who has it
    rf"\b(?:looking at|based on|according to|backwards? from|to match|justify|already know|know|explain)\s+"
    rf"(?:the|this)\s+{_KIND}(?:query|sql|answer|solution)\b|\breverse[- ]engineer",
    rf"\b(?:not|never|without)\s+(?:mention|say|reveal)(?:ing)?\s+(?:that\s+)?"
    rf"(?:it\s+was\s+given|(?:a|the|this)\s+{_THING})",
    r"(?:给定|给出|所给|提供|参考|标准)的(?:这条|该)?\s*(?:SQL|查询(?!条件|结果|要求)|答案(?!数)|语句|解答)",
    r"(?:参考|标准|所给)(?:SQL|查询|答案|语句)|给的\s*(?:SQL|查询|语句)|(?:上面|上述)的?(?:SQL|查询(?!条件)|语句)",
    r"(?:SQL|查询|答案|语句)已(?:经)?(?:给出|给定|提供)|知道最终的?(?:SQL|查询|答案)|正确答案",
)
_BETRAYAL = re.compile("|".join(_BETRAYALS), re.I)


def betrayal(reasoning: str) -> str:
    """The words that tell of a query or an answer that was given, `""` where there are none.

    >>> betrayal("The given query counts books."), betrayal("Books of a given author are counted.")
    ('given query', '')
    """
    found = _BETRAYAL.search(" ".join(reasoning.split()))
    return found.group() if found else ""

"""Whether reasoning speaks of a query or an answer that was given, in English or Chinese: a policy is given none.

What is about the question, the schema or given values is no betrayal. Not covered: other languages, and hints that do
not say so.
"""

import re

_THING = r"(?:sql|sqlite|quer(?:y|ies)|answers?|solutions?|statements?|code|outputs?)"
_KNOWN = r"(?:given|provided|supplied|reference|gold(?:en)?|expected|target|ground[- ]truth|stated|presented)"
_BETRAYALS = (
    rf"\b{_KNOWN}\s+(?:\w+\s+){{0,2}}?{_THING}\b",
    rf"\b{_THING}\s+(?:(?:that|which)\s+)?(?:(?:is|was|were|has been|have been|i was|we were|you)\s+)?"
    rf"(?:already\s+)?(?:given|provided|supplied|gave)\b",
    rf"\b(?:correct|right|final|above|following|that|this)\s+{_THING}\s+(?:is|was)\s+(?:already\s+)?(?:given|provided|above)",
    rf"\b{_THING}\s+(?:above|shown above|in the prompt|in the (?:task|question))\b",
    r"\bground[- ]truth\b|\banswer key\b|\b(?:was|were|am|are|been) (?:given|told|shown) (?:the|a|this) (?:\w+ )?"
    rf"{_THING}\b",
    r"(?:给定|给出|提供|参考|标准|正确|已知)的?\s*(?:SQL|查询|答案|语句|解答)|(?:SQL|查询|答案|语句)已(?:经)?(?:给出|给定|提供)",
)
_BETRAYAL = re.compile("|".join(_BETRAYALS), re.I)


def betrayal(reasoning: str) -> str:
    """The words that tell of a query or an answer that was given, `""` where there are none.

    >>> betrayal("The given query counts books."), betrayal("Books of a given author are counted.")
    ('given query', '')
    """
    found = _BETRAYAL.search(" ".join(reasoning.split()))
    return found.group() if found else ""

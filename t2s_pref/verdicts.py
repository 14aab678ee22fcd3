"""The verdicts on a candidate and on a gold: one truth for the workers, the columns and the counts.

Standard library only: the sandbox's workers read this file too.
"""

# The candidate ran, or the engine refused it. These, and only these, prove a candidate wrong.
WRONG_RESULT = "wrong_result"
SYNTAX_ERROR = "syntax_error"
MISSING_TABLE = "missing_table"
MISSING_COLUMN = "missing_column"
MISSING_FUNCTION = "missing_function"
OTHER_ERROR = "other_error"

WRONG = (WRONG_RESULT, SYNTAX_ERROR, MISSING_TABLE, MISSING_COLUMN, MISSING_FUNCTION, OTHER_ERROR)

# It is right: by its text, or by its result.
SAME_TEXT = "same_text"
SAME_AST = "same_ast"
EQUIVALENT = "equivalent"

RIGHT = (EQUIVALENT, SAME_AST, SAME_TEXT)

# It may be right: its result matches the gold's under a lenient reading, or is too little to tell.
AMBIGUOUS = "ambiguous"
WEAK = "weak"

# Policy, or limits of ours: nothing is known.
EMPTY = "empty"
NOT_SQL = "not_sql"
BLOCKED = "blocked"
MULTI_STATEMENT = "multi_statement"
TIMEOUT = "timeout"
RESOURCE = "resource"
WORKER_DIED = "worker_died"
UNVERIFIED = "unverified"

UNKNOWN = (AMBIGUOUS, WEAK, EMPTY, NOT_SQL, BLOCKED, MULTI_STATEMENT, TIMEOUT, RESOURCE, WORKER_DIED, UNVERIFIED)

VERDICTS = (*WRONG, *RIGHT, *UNKNOWN)

# The gold: it runs, runs and returns no row (candidates are judged all the same), or condemns no candidate of its row.
GOLD_OK = "ok"
GOLD_EMPTY = "gold_empty"
GOLD_ERROR = "gold_error"
GOLD_TIMEOUT = "gold_timeout"
GOLD_TRUNCATED = "gold_truncated"
GOLD_NONDETERMINISTIC = "gold_nondeterministic"
NO_DATABASE = "no_database"

# No verdict but the end of a run: a server that cannot be reached, or a file that is gone, says nothing on any SQL.
UNREACHABLE = "unreachable"

GOLD_USABLE = (GOLD_OK, GOLD_EMPTY)
GOLD_VERDICTS = (*GOLD_USABLE, GOLD_ERROR, GOLD_TIMEOUT, GOLD_TRUNCATED, GOLD_NONDETERMINISTIC, NO_DATABASE)

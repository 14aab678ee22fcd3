"""The one exception that means: the caller can mend this; and the errors of others, made short."""


class UserError(ValueError):
    """Something given is wrong: a file, a value, a path, a setting.

    The message is one line that names the value, what was allowed and the way out, so that the command line can print
    it as it is, without a traceback.
    """


def one_line(error: BaseException) -> str:
    """An error of another library as one line of a sensible length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__

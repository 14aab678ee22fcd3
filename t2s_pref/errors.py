"""The one exception that means: the caller can mend this."""


class UserError(ValueError):
    """Something given is wrong: a file, a value, a path, a setting.

    The message is one line that names the value, what was allowed and the way out, so that the command line can print
    it as it is, without a traceback.
    """

"""The one exception that lowkey raises for bad input."""


class LowkeyError(ValueError):
    """Bad input. The message is one line: the argument, its value, the rule and the remedy."""


def first_line(error: Exception) -> str:
    """The first line of another library's error, at most 200 characters, for a message of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(". ")

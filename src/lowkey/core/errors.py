"""The one exception that users see."""


class LowkeyError(ValueError):
    """Bad input. The message is one line: the argument, its value, the rule and the remedy."""


def first_line(error: Exception) -> str:
    """What an error of another library says, as far as one line of ours may hold it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(". ")

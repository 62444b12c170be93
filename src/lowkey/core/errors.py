"""The one exception that lowkey raises for bad input."""


class LowkeyError(ValueError):
    """Bad input. The message is one line: the argument, its value, the rule and the remedy."""


def first_line(error: BaseException, longest: int = 200) -> str:
    """The first line of another library's error, at most `longest` characters, for a message of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:longest].rstrip(". ")


def on_one_line(error: BaseException, longest: int = 200) -> str:
    """All of another library's error on one line, at most `longest` characters, for a message of ours."""
    return " ".join(str(error).split())[:longest].rstrip(". ")

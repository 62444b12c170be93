"""The one exception that users see."""


class LowkeyError(ValueError):
    """Bad input. The message is one line: the argument, its value, the rule and the remedy."""

"""Makes text that came out of files and models safe to show on a terminal."""

from __future__ import annotations

PRINTED_AS_THEY_ARE = "\n\t"


def printable(text: object) -> str:
    """The text, with escapes like `\\x1b` for characters that a terminal obeys or no encoding can write.

    Line ends and tabs stay. Names of models and methods, tokens, and error messages of other libraries come
    from files that anybody may have written, and a terminal takes commands from what it is shown.
    """
    text_form = str(text)
    if text_form.isprintable():
        return text_form
    return "".join(
        c
        if c.isprintable() or c in PRINTED_AS_THEY_ARE
        else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in text_form
    )

"""Prompts around a context and a question: ours, or those of a file in the user's folder.

A published number belongs to a published prompt. lowkey words its prompts itself, so a suite whose authors
publish their prompts as a file reads them from the folder, where they stand beside the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lowkey.core import files
from lowkey.core.errors import LowkeyError
from lowkey.core.options import shown
from lowkey.suites.files import FORMAT_REMEDY

PROMPTS = "prompts.json"  # templates by task, for any suite
_MOST_BYTES = 2**24


@dataclass(frozen=True)
class PromptedTask:
    """A task that is asked with one prompt.

    Args:
        prompt: ours, a template; of several questions about a context, the words before the first.
        metric: how an answer is scored, a name of `METRICS`.
        tokens: of an answer, at most, as the authors allow.
    """

    prompt: str
    metric: str
    tokens: int


def templates(folder: Path | None, *names: str) -> dict[str, str]:
    """Templates by task, from the first of several files that the folder has; none without a file.

    Args:
        folder: the user's folder.
        names: paths of files in it.

    Raises:
        LowkeyError: the file is no table of texts that each have one `{context}`.
    """
    for name in names if folder is not None else ():
        assert folder is not None
        path = folder / name
        if not path.exists():
            continue
        content = files.read_bytes(path, "prompts", _MOST_BYTES, FORMAT_REMEDY)
        try:
            table = files.parse_json(content.decode("utf-8-sig"))
        except ValueError as error:
            reason = " ".join(str(error).split())[:120]
            raise LowkeyError(f"{path}: is no JSON ({reason}); {FORMAT_REMEDY}") from None
        if not isinstance(table, dict):
            raise LowkeyError(f"{path}: is {shown(table)} and must be a table of templates; {FORMAT_REMEDY}")
        for task, template in table.items():
            if not isinstance(template, str) or template.count("{context}") != 1:
                raise LowkeyError(
                    f"{path}: the template of {shown(task)} is {shown(template)} and must be a text with one "
                    "{context}"
                )
        return table
    return {}


def filled(template: str, fields: dict[str, str]) -> tuple[str, str]:
    """A template around a context, as the two parts of a prompt.

    Args:
        template: has `{context}` once, and names of the other fields in braces.
        fields: the context and the other fields. Their own braces are left alone.

    Returns:
        The part up to the end of the context, and the question behind it.
    """
    before, _, behind = template.partition("{context}")

    def put(part: str) -> str:
        # one field after the other would fill braces inside a field that was put in before
        pieces = [part]
        for name, value in fields.items():
            mark, split = "{" + name + "}", []
            for i, piece in enumerate(pieces):
                # odd pieces are fields that were put in
                if i % 2:
                    split.append(piece)
                    continue
                first, *rest = piece.split(mark)
                split += [first, *(more for other in rest for more in (value, other))]
            pieces = split
        return "".join(pieces)

    return put(before) + fields["context"], put(behind)

"""Tokenizers with a chat template and a fake cache, for tasks that ask a model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pico

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}~{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chatting(end: str | None = "~"):
    """A tokenizer with a template that ends turns with `~`, which is its only special token beside <s>."""
    found = pico.tokenizer()
    found.chat_template = TEMPLATE
    if end:
        found.add_special_tokens({"additional_special_tokens": [end]})
    return found


END = 96  # a letter that the fake model ends with


class FakeCache:
    """Counts what it has seen; evicts nothing."""

    def __init__(self, name: str) -> None:
        self.name, self.seen = name, 0

    def get_seq_length(self) -> int:
        return self.seen

    def nbytes(self) -> int:
        return self.seen * (10 if self.name == "full" else 5)

    def reading(self, ids) -> AbstractContextManager[None]:
        return nullcontext()  # no small model reads along

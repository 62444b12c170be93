"""When the question is known: before the context is compressed, or after. Imports no torch."""

from __future__ import annotations

ASK_AFTER, ASK_WITH = "ask-after", "ask-with"
PROTOCOLS: dict[str, str] = {
    ASK_AFTER: "the context is compressed, then the question is read over what was kept",
    ASK_WITH: "the question is compressed with the context, as the papers of most policies do",
}
# What is reported for prompts that have no context before the question, and for texts that are scored whole.
DECODING, ROLLING = "decoding", "rolling"

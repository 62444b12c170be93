"""Text in, windows of token ids out; and the few kilobytes of public-domain text that ship with the package.

torch is imported by the functions that make tensors: the command line reads texts before it loads torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowkey.core import files
from lowkey.core.errors import LowkeyError
from lowkey.core.options import shown

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = {"calibration": "alice.txt", "evaluation": "time_machine.txt"}
MIN_WINDOWS = 4


def embedded_text(kind: str) -> str:
    """`calibration` (Alice's Adventures in Wonderland) or `evaluation` (The Time Machine), opening chapters;
    both disjoint from the training text of the embedded model."""
    return (package_files("lowkey") / "data" / EMBEDDED[kind]).read_text(encoding="utf-8")


def joined_texts(texts: str | Sequence[str] | None) -> str:
    """One text of several; the embedded calibration text when there is none."""
    return (
        texts
        if isinstance(texts, str)
        else embedded_text("calibration")
        if texts is None
        else "\n".join(texts)
    )


def read_text(path: str | Path, argument: str) -> str:
    """A UTF-8 text file. Errors: LowkeyError when missing, a folder, empty or binary."""
    path = Path(path)
    if path.is_dir():
        raise LowkeyError(f"{argument} {str(path)!r}: is a folder; give a UTF-8 text file")
    if not path.exists():
        raise LowkeyError(
            f"{argument} {str(path)!r}: no such file; give a UTF-8 text file or leave it out for the "
            "embedded text"
        )
    try:
        text = files.read_bytes(path, argument, files.MOST_TEXT, "give a plain text file").decode("utf-8")
    except UnicodeDecodeError:
        raise LowkeyError(f"{argument} {str(path)!r}: not UTF-8 text; give a plain text file") from None
    if "\0" in text:
        raise LowkeyError(
            f"{argument} {str(path)!r}: holds NUL bytes, so it is binary; give a plain text file"
        )
    if not text.strip():
        raise LowkeyError(f"{argument} {str(path)!r}: is empty; give a text of some thousand words")
    return text


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id, which is more than the number of tokens where ids have gaps."""
    return max([len(tokenizer) - 1, *tokenizer.get_vocab().values()]) + 1


def encode(tokenizer: PreTrainedTokenizerBase, text: str, model: PreTrainedModel | None = None) -> Tensor:
    """Ids (n,) without special tokens; long texts are expected, so the tokenizer's length warning is not for
    them.

    model: which is to read them. Errors: LowkeyError for a text that is no Unicode, or for tokens that the
    model does not have.
    """
    import torch

    check_unicode("text", text)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.long)
    if model is not None:
        check_ids(ids, model)
    return ids


def check_unicode(argument: str, text: str) -> None:
    """Errors: LowkeyError for halves of surrogate pairs, which Python's strings may hold and tokenizers
    refuse.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LowkeyError(
            f"{argument} {shown(text)}: holds a lone surrogate at {error.start}, which is no text; give "
            "UTF-8 text"
        ) from None


def check_ids(ids: Tensor, model: PreTrainedModel) -> None:
    """Errors: LowkeyError for ids beyond the embedding, which a tokenizer has when tokens were added to it
    and not to the model, and for ids below 0."""
    embedding: Any = model.get_input_embeddings()
    rows, largest = len(embedding.weight), int(ids.max()) if ids.numel() else 0
    if ids.numel() and int(ids.min()) < 0:
        raise LowkeyError(f"ids: {int(ids.min())} is no token; ids are counted from 0")
    if largest >= rows:
        raise LowkeyError(
            f"tokenizer: gives the id {largest}, and the model's embedding has {rows} rows; use the model's "
            "own tokenizer, or resize it"
        )


def windows(
    ids: Tensor, tokenizer: PreTrainedTokenizerBase, length: int, argument: str, least: int = MIN_WINDOWS
) -> Tensor:
    """Ids (n, length): consecutive windows, each begun with the beginning-of-text token when the tokenizer
    has one.

    Errors: LowkeyError when the text gives fewer than `least` windows.
    """
    import torch

    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = length - len(start)
    count = len(ids) // body
    if count < least:
        raise LowkeyError(
            f"{argument}: {len(ids)} tokens are too few, this context needs {least * body}; give a longer "
            "text or a shorter context"
        )
    rows = ids[: count * body].view(count, body)
    return torch.cat([torch.tensor(start, dtype=torch.long).expand(count, -1), rows], dim=1)


def in_turn(parts: Sequence[Tensor]) -> Tensor:
    """Windows (n, t) of several texts as one: the first of each, then the second of each that has one, and so
    on.
    """
    import torch

    return torch.stack([rows[i] for i in range(max(map(len, parts))) for rows in parts if i < len(rows)])


def sample_windows(
    ids: Tensor, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int, argument: str
) -> Tensor:
    """At most `count` of the windows, in random order, cut from a random phase: another seed is another
    sample.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    spare = max(1, len(ids) - MIN_WINDOWS * length)
    phase = int(torch.randint(min(length, spare), (), generator=generator))
    rows = windows(ids[phase:], tokenizer, length, argument)
    return rows[torch.randperm(len(rows), generator=generator)[:count]]

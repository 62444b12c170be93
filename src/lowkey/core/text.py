"""Texts, and the windows of token ids that are cut from them.

A few kilobytes of text in the public domain ship with the package. torch is imported by the functions that
make tensors, since the command line reads texts before it loads torch.
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
MIN_WINDOWS = 4  # fewer say too little about a text


def embedded_text(kind: str) -> str:
    """The opening chapters of a book, which ship with the package.

    Neither book was in the training text of the embedded model.

    Args:
        kind: `calibration` for Alice's Adventures in Wonderland, `evaluation` for The Time Machine.
    """
    return (package_files("lowkey") / "data" / EMBEDDED[kind]).read_text(encoding="utf-8")


def joined_texts(texts: str | Sequence[str] | None) -> str:
    """Several texts as one; the embedded calibration text for None."""
    if texts is None:
        return embedded_text("calibration")
    return texts if isinstance(texts, str) else "\n".join(texts)


def read_text(path: str | Path, argument: str) -> str:
    """Read a UTF-8 text file.

    Args:
        path: the file.
        argument: what the path is called in messages.

    Raises:
        LowkeyError: if it is missing, a folder, empty or binary.
    """
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
    """One more than the largest token id. Where ids have gaps, that is more than the number of tokens."""
    return max([len(tokenizer) - 1, *tokenizer.get_vocab().values()]) + 1


def encode(tokenizer: PreTrainedTokenizerBase, text: str, model: PreTrainedModel | None = None) -> Tensor:
    """Turn a text into token ids (n,), without special tokens.

    Args:
        tokenizer: the model's.
        text: of any length.
        model: the model that will read the ids, to check that it has all of them; None for no check.

    Raises:
        LowkeyError: for text that is not valid Unicode, or tokens that the model does not have.
    """
    import torch

    check_unicode("text", text)
    # verbose=False: long texts are expected here, and the tokenizer would warn of them
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.long)
    if model is not None:
        check_ids(ids, model)
    return ids


def check_unicode(argument: str, text: str) -> None:
    """Refuse halves of surrogate pairs, which Python's strings may hold and tokenizers do not take.

    Raises:
        LowkeyError: that names the argument.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LowkeyError(
            f"{argument} {shown(text)}: holds a lone surrogate at {error.start}, which is no text; give "
            "UTF-8 text"
        ) from None


def check_ids(ids: Tensor, model: PreTrainedModel) -> None:
    """Refuse token ids for which a model has no embedding.

    A tokenizer gives such ids if tokens were added to it and not to the model.

    Raises:
        LowkeyError: for ids beyond the embedding or below 0.
    """
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
    """Cut token ids into consecutive windows.

    Each window begins with the tokenizer's beginning-of-text token, if it has one.

    Args:
        ids: (n,).
        tokenizer: the model's.
        length: tokens of a window.
        argument: what the text is called in messages.
        least: the fewest windows that will do.

    Returns:
        Ids (windows, length).

    Raises:
        LowkeyError: if the text gives fewer than `least` windows.
    """
    import torch

    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = length - len(start)  # tokens of the text in each window
    count = len(ids) // body
    if count < least:
        raise LowkeyError(
            f"{argument}: {len(ids)} tokens are too few, this context needs {least * body}; give a longer "
            "text or a shorter context"
        )
    rows = ids[: count * body].view(count, body)
    return torch.cat([torch.tensor(start, dtype=torch.long).expand(count, -1), rows], dim=1)


def in_turn(parts: Sequence[Tensor]) -> Tensor:
    """Interleave the windows (n, t) of several texts.

    The first window of each text comes first, then the second of each text that has one, and so on.
    """
    import torch

    return torch.stack([rows[i] for i in range(max(map(len, parts))) for rows in parts if i < len(rows)])


def sample_windows(
    ids: Tensor, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int, argument: str
) -> Tensor:
    """Cut token ids into windows and take some of them in random order.

    The first window begins at a random offset, so another seed cuts other windows.

    Args:
        ids: (n,).
        tokenizer: the model's.
        length: tokens of a window.
        count: the most windows to take.
        seed: of the offset and the order.
        argument: what the text is called in messages.

    Returns:
        Ids (at most count, length).

    Raises:
        LowkeyError: if the text is too short.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    # not so far in that too few windows would be left
    spare = max(1, len(ids) - MIN_WINDOWS * length)
    phase = int(torch.randint(min(length, spare), (), generator=generator))
    rows = windows(ids[phase:], tokenizer, length, argument)
    return rows[torch.randperm(len(rows), generator=generator)[:count]]

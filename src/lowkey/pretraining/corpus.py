"""From text to token files: read and tokenized once, then mapped into memory by every run with the same text
and tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lowkey.core import files, text
from lowkey.core.errors import on_one_line
from lowkey.core.progress import Progress, silent
from lowkey.core.types import LowkeyError
from lowkey.models.loading import load_tokenizer
from lowkey.models.names import is_local
from lowkey.pretraining.recipe import Data
from lowkey.pretraining.rows import Stream

TOKENIZED_AT_ONCE = 2**20  # characters tokenized at once
PER_TOKEN = 6  # characters of a text's mean token, at most
TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
CORPUS_PARTS = ("training", "held_out")
CORPUS_JSON, CORPUS_FILE = "about.json", "tokens"
TOKEN_DTYPES = ("uint16", "uint32")
LONGEST_LINE = 2**30  # bytes of a line


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on.

    Args:
        tokenizer: the tokenizer.
        training: documents to train on.
        held_out: documents for validation, or None.
        fingerprint: sha256 of all tokens and of where documents begin.
    """

    tokenizer: PreTrainedTokenizerBase
    training: Stream
    held_out: Stream | None
    fingerprint: str


def prepare(data: Data, work: Path, progress: Progress = silent) -> Corpus:
    """The tokens of `data`. They are made if they are not there yet.

    Args:
        data: which text, and how it becomes tokens.
        work: folder for token files, unless `data.cache` names one.
        progress: shows progress.

    Raises:
        LowkeyError: text that cannot be read or is too short, or damaged token files.
    """
    named = None if data.vocab_size else load_tokenizer(data.tokenizer)
    folder = (Path(data.cache) if data.cache else work) / _identity(data, named)
    if not (folder / CORPUS_JSON).is_file():
        _make(folder, data, named, progress)
    return files.read_consistently(folder, lambda: _read(folder, named))


def _make(folder: Path, data: Data, named: PreTrainedTokenizerBase | None, progress: Progress) -> None:
    """Make a folder of token files in one step.

    If another run has made it meanwhile, both are equal, and what that run has mapped into memory stays
    there.
    """
    with files.replacing_folder(folder) as temporary:
        tokenizer = named or _train_tokenizer(data, progress)
        tokenizer.save_pretrained(temporary)
        _write(temporary, data, tokenizer, progress)


def _identity(data: Data, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The name of a folder of token files. It depends on places, sizes and times of the text files, and not
    on their contents, which may be terabytes.
    """
    # The tokenizer counts by its content, further below, and not by its name.
    about = {k: v for k, v in asdict(data).items() if k not in ("tokenizer", "cache")}
    path = Path(data.path)
    if data.path and path.exists():
        about["files"] = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in _files(path)]
    if not data.path:
        about["text"] = hashlib.sha256(text.embedded_text("calibration").encode()).hexdigest()
    if tokenizer is not None:
        about["tokenizer"] = tokenizer.backend_tokenizer.to_str() + str(tokenizer.special_tokens_map)
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


# -- reading


def documents(data: Data) -> Iterator[str]:
    """Every document that is not blank, in order."""
    path = Path(data.path)
    if not data.path:
        texts: Iterable[str] = [text.embedded_text("calibration")]
    elif path.exists() or path.suffix in TEXT_SUFFIXES or is_local(data.path):
        texts = (document for file in _files(path) for document in _documents_of(file, data.text_field))
    else:
        texts = _dataset(data)
    return (document for document in texts if document.strip())


def _files(path: Path) -> list[Path]:
    """The text files of a path, in order."""
    if not path.exists():
        raise LowkeyError(f"data.path {str(path)!r}: no such file or folder; give one, or a dataset's id")
    paths = (
        sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
        if path.is_dir()
        else [path]
    )
    if not paths:
        raise LowkeyError(
            f"data.path {str(path)!r}: no {', '.join(TEXT_SUFFIXES)} in this folder; give one that "
            "holds such files"
        )
    if paths[0].suffix not in TEXT_SUFFIXES:
        raise LowkeyError(
            f"data.path {str(path)!r}: is none of {', '.join(TEXT_SUFFIXES)}; give such a file, a "
            "folder of them, or a dataset's id"
        )
    return paths


def _documents_of(file: Path, field: str) -> Iterator[str]:
    """The documents of a file."""
    if file.suffix == ".txt":
        return iter([text.read_text(file, "data.path")])
    return (
        _text_of(row, field, str(file))
        for row in (_lines(file) if file.suffix == ".jsonl" else _parquet(file, field))
    )


def _lines(file: Path) -> Iterator[Any]:
    """The records of a file of JSON lines."""
    with files.opened_file(file, "data.path", files.ANY_SIZE, "give a file of JSON lines") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(LONGEST_LINE), b""), 1):
            if not line.strip():
                continue
            try:
                if len(line) == LONGEST_LINE:
                    raise ValueError("it has no end")
                row = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                why = str(error)[:200]
                raise LowkeyError(
                    f"data.path {str(file)!r}: line {number} is not JSON ({why}); give one object per line"
                ) from None
            yield row


def _parquet(file: Path, field: str) -> Iterator[Any]:
    """The records of a parquet file."""
    _library("pyarrow")
    from pyarrow import ArrowException, parquet

    with files.opened_file(file, "data.path", files.ANY_SIZE, "give a parquet file"):
        pass
    try:
        table = parquet.ParquetFile(file)
        known = field in table.schema_arrow.names
        for batch in table.iter_batches(batch_size=1024, columns=[field] if known else None):
            yield from batch.to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        raise LowkeyError(
            f"data.path {str(file)!r}: cannot be read ({on_one_line(error)}); give a parquet file"
        ) from None


def _dataset(data: Data) -> Iterator[str]:
    """The documents of a dataset, streamed, so that a run of few tokens does not fetch all of it."""
    _library("datasets")
    import datasets

    try:
        rows = datasets.load_dataset(
            data.path, data.name or None, split=data.split, streaming=True, **data.options
        )
        for row in rows:
            yield _text_of(row, data.text_field, data.path)
    except LowkeyError:
        raise
    except Exception as error:  # datasets raises many kinds; each is bad input or no network here
        raise LowkeyError(
            f"data.path {data.path!r}: no such file, and no dataset ({on_one_line(error)}); give a file, a "
            "folder or an id"
        ) from error


def _text_of(row: Any, field: str, where: str) -> str:
    """The text of a record."""
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        names = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise LowkeyError(
            f"data.text_field {field!r}: a record of {where!r} has no such text (it has {names}); give "
            "data.text_field"
        )
    return _whole(row[field])


def _whole(document: str) -> str:
    """The document with halves of surrogate pairs, which JSON allows and UTF-8 does not, joined to pairs or
    replaced by U+FFFD.
    """
    try:
        document.encode()
    except UnicodeEncodeError:
        return document.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return document


def _library(name: str) -> None:
    """Check that a library of the extra `train` is installed.

    Raises:
        LowkeyError: it is not.
    """
    import importlib.util

    if importlib.util.find_spec(name) is None:
        raise LowkeyError(f"{name} is not installed: pip install 'lowkey[train]'")


# -- tokenizing


def _train_tokenizer(data: Data, progress: Progress) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with tokens for the beginning and the end of a text, trained on about as
    much text as max_tokens will need.
    """
    texts: Iterator[str] = (piece.text for piece in _pieces(documents(data)))
    if data.max_tokens:
        texts = _first(texts, PER_TOKEN * data.max_tokens)
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=data.vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    raw.train_from_iterator(progress(texts, "training the tokenizer"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")


class Piece(NamedTuple):
    """Some or all of a document.

    Args:
        text: the text.
        first: whether the document begins here.
        last: whether it ends here.
    """

    text: str
    first: bool
    last: bool


def _pieces(texts: Iterable[str]) -> Iterator[Piece]:
    """Documents, long ones cut before a line or a word: what a tokenizer keeps in memory takes a hundred
    times the size of its text.
    """
    for document in texts:
        start = 0
        while len(document) - start > TOKENIZED_AT_ONCE:
            # Before the last line break, else before the last space, else anywhere.
            ends = (document.rfind(mark, start + 1, start + TOKENIZED_AT_ONCE) for mark in "\n ")
            stop = next((end for end in ends if end > start), start + TOKENIZED_AT_ONCE)
            yield Piece(document[start:stop], start == 0, False)
            start = stop
        yield Piece(document[start:], start == 0, True)


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Texts until there are this many characters."""
    for piece in texts:
        yield piece
        characters -= len(piece)
        if characters <= 0:
            return


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in lists of about `TOKENIZED_AT_ONCE` characters."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= TOKENIZED_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(folder: Path, data: Data, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> None:
    """Write token files and their description.

    All documents are first written to one file, since which of them are held out depends on the length of
    all.
    """
    kind = np.dtype(np.uint16 if text.vocabulary(tokenizer) <= 2**16 else np.uint32)
    lengths, sizes = _spool(folder / "all.bin", kind, data, tokenizer, progress)
    # Mapped, not read: it may be larger than memory.
    ids = np.memmap(folder / "all.bin", dtype=kind, mode="r")
    lengths, sizes, chosen = _choose(ids, lengths, sizes, data.held_out, tokenizer)
    ends, digest, about = np.cumsum(lengths), hashlib.sha256(), {}
    for part, which in zip(CORPUS_PARTS, (~chosen, chosen), strict=True):
        with (folder / f"{part}.bin").open("wb") as file:
            for d in np.flatnonzero(which):
                piece = ids[ends[d] - lengths[d] : ends[d]].tobytes()
                digest.update(piece)
                file.write(piece)
        starts = np.concatenate([[0], np.cumsum(lengths[which])]).astype(np.int64)
        np.save(folder / f"{part}.npy", starts)
        digest.update(starts.tobytes())
        about[part] = {
            "tokens": int(starts[-1]),
            "documents": int(which.sum()),
            "bytes": int(sizes[which].sum()),
        }
    del ids
    (folder / "all.bin").unlink()
    files.write_json(
        folder / CORPUS_JSON, {"dtype": kind.name, **about, "sha256": digest.hexdigest()}, CORPUS_FILE
    )


def _spool(
    place: Path, kind: np.dtype, data: Data, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Write all documents one after the other, each with the tokenizer's beginning and end tokens, if it has
    any.

    Returns:
        Tokens, and bytes of text, of each document.
    """
    lengths, sizes, total, length, size = [], [], 0, 0, 0
    with place.open("wb") as file:
        for piece, ids in _encoded(data, tokenizer, progress):
            np.array(ids, dtype=kind).tofile(file)
            length, size = length + len(ids), size + len(piece.text.encode())
            if not piece.last:
                continue
            lengths.append(length)
            sizes.append(size)
            total, length, size = total + length, 0, 0
            if data.max_tokens and total >= data.max_tokens:
                break
    if not total:
        raise LowkeyError(f"data.path {data.path!r}: holds no text; give some thousand words at least")
    return np.array(lengths), np.array(sizes)


def _encoded(
    data: Data, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> Iterator[tuple[Piece, list[int]]]:
    """Pieces and their ids."""
    before, after = ([] if i is None else [i] for i in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    for batch in progress(_batches(_pieces(documents(data))), "tokenizing"):
        encoded = tokenizer(
            [piece.text for piece in batch], add_special_tokens=False, verbose=False
        ).input_ids
        for piece, ids in zip(batch, encoded, strict=True):
            yield piece, (before if piece.first else []) + ids + (after if piece.last else [])


def _choose(
    ids: np.ndarray, lengths: np.ndarray, sizes: np.ndarray, share: float, tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Choose held-out documents at random, the same for every seed.

    If all documents are too long to be held out whole, the end of the last one becomes a document of its own
    and is held out.

    Args:
        ids: all tokens.
        lengths: tokens of each document.
        sizes: bytes of text of each document.
        share: share of the tokens that is held out.
        tokenizer: the tokenizer.

    Returns:
        Lengths, sizes, and which documents are held out.
    """
    room = int(share * len(ids))
    # A constant seed: runs that differ in their seed are validated on the same documents.
    order = np.random.default_rng(0).permutation(len(lengths))
    order = order[lengths[order] <= room]
    chosen = np.zeros(len(lengths), dtype=bool)
    chosen[order[np.cumsum(lengths[order]) <= room]] = True
    if chosen.any() or room < 2:
        return lengths, sizes, chosen
    tail = len(str(tokenizer.decode(ids[-room:].tolist(), skip_special_tokens=True)).encode())
    lengths, sizes = (
        np.concatenate([x[:-1], [x[-1] - end, end]]) for x, end in ((lengths, room), (sizes, tail))
    )
    return lengths, sizes, np.append(chosen, True)


# -- reading the files


def _read(folder: Path, named: PreTrainedTokenizerBase | None) -> Corpus:
    """Read a folder of token files.

    Raises:
        LowkeyError: it is damaged, or nothing is left to train on.
    """

    def refuse(rule: str) -> LowkeyError:
        return LowkeyError(f"tokens {str(folder)!r}: {rule}; delete the folder, and it is made again")

    files.verify(folder, "tokens")
    about = files.read_json(folder / CORPUS_JSON, "tokens", CORPUS_FILE)
    try:
        tokenizer = named or AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises many kinds; each is a damaged folder here
        raise refuse(f"its tokenizer cannot be loaded ({on_one_line(error)})") from None
    try:
        streams = [_stream(folder, part, about, text.vocabulary(tokenizer)) for part in CORPUS_PARTS]
        fingerprint = str(about["sha256"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
        raise refuse(on_one_line(error)) from None
    if streams[0] is None:
        raise LowkeyError("data: nothing is left to train on; hold out less")
    return Corpus(tokenizer, streams[0], streams[1], fingerprint)


def _stream(folder: Path, part: str, known: dict, vocabulary: int) -> Stream | None:
    """The documents of one part, mapped into memory; None if there are none.

    Raises:
        ValueError: counts, lengths or tokens are not as they were written; damaged files raise other errors,
            too.
    """
    # A file may be damaged in any way, and its numbers become indices: everything is checked.
    about, kind = known[part], known["dtype"]
    counts = [about[name] for name in ("tokens", "documents", "bytes")]
    if kind not in TOKEN_DTYPES or not all(type(n) is int and n >= 0 for n in counts):
        raise ValueError(f"{CORPUS_JSON} has no valid counts")
    if not about["tokens"]:
        return None
    if (folder / f"{part}.bin").stat().st_size != about["tokens"] * np.dtype(kind).itemsize:
        raise ValueError(f"{part} has not the {about['tokens']} tokens that were written")
    ids = np.memmap(folder / f"{part}.bin", dtype=kind, mode="r")
    starts = np.load(folder / f"{part}.npy", allow_pickle=False)
    if starts.dtype != np.int64 or starts.shape != (about["documents"] + 1,):
        raise ValueError(f"{part} has not the {about['documents']} documents that were written")
    if starts[0] != 0 or starts[-1] != len(ids) or bool((np.diff(starts) < 0).any()):
        raise ValueError(f"documents of {part} do not begin one after the other")
    if (
        max(int(ids[at : at + TOKENIZED_AT_ONCE].max()) for at in range(0, len(ids), TOKENIZED_AT_ONCE))
        >= vocabulary
    ):
        raise ValueError(f"{part} has tokens that its tokenizer does not have")
    return Stream(ids, starts, about["bytes"])

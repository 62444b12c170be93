"""Text in, token files out: read once, tokenized once, then mapped into memory by every run that uses the same text and tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lowkey import files, text
from lowkey.loading import load_tokenizer
from lowkey.pretraining.recipe import Data
from lowkey.pretraining.rows import Stream
from lowkey.progress import Progress, silent
from lowkey.types import LowkeyError

BATCH = 2**20  # characters tokenized at once
KINDS = (".txt", ".jsonl", ".parquet")
PARTS = ("training", "held_out")
ABOUT = "about.json"


@dataclass(frozen=True)
class Corpus:
    """fingerprint: sha256 of all tokens and where documents begin. held_out: None when nothing is held out."""

    tokenizer: PreTrainedTokenizerBase
    training: Stream
    held_out: Stream | None
    fingerprint: str


def prepare(data: Data, work: Path, progress: Progress = silent) -> Corpus:
    """The tokens of `data`, from `work` (or data.cache) if they are there, else made there. Errors: LowkeyError."""
    named = None if data.vocab_size else load_tokenizer(data.tokenizer)
    folder = (Path(data.cache) if data.cache else work) / _identity(data, named)
    if not (folder / ABOUT).is_file():
        _make(folder, data, named, progress)
    return _read(folder, named)


def _make(folder: Path, data: Data, named: PreTrainedTokenizerBase | None, progress: Progress) -> None:
    """Beside its name, then renamed; what another run has put there meanwhile is the same and may be in use, so it stays."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        tokenizer = named or _train_tokenizer(documents(data), data.vocab_size, progress)
        tokenizer.save_pretrained(temporary)
        _write(temporary, data, tokenizer, progress)
        if not folder.exists():
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _identity(data: Data, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Names the files' places, sizes and times, not their contents, which may be terabytes."""
    about = {k: v for k, v in asdict(data).items() if k not in ("tokenizer", "cache")}
    path = Path(data.path)
    if data.path and path.exists():
        about["files"] = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in _files(path)]
    if not data.path:
        about["text"] = hashlib.sha256(text.embedded("calibration").encode()).hexdigest()
    if tokenizer is not None:
        about["tokenizer"] = tokenizer.backend_tokenizer.to_str() + str(tokenizer.special_tokens_map)
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


# -- reading


def documents(data: Data) -> Iterator[str]:
    """Every document that holds text, in order."""
    path = Path(data.path)
    if not data.path:
        found: Iterable[str] = [text.embedded("calibration")]
    elif path.exists():
        found = (document for file in _files(path) for document in _documents_of(file, data.text_field))
    else:
        found = _dataset(data)
    return (document for document in found if document.strip())


def _files(path: Path) -> list[Path]:
    found = sorted(p for p in path.rglob("*") if p.suffix in KINDS and p.is_file()) if path.is_dir() else [path]
    if not found:
        raise LowkeyError(f"data.path {str(path)!r}: no {', '.join(KINDS)} in this folder; give one that holds such files")
    if found[0].suffix not in KINDS:
        raise LowkeyError(f"data.path {str(path)!r}: is none of {', '.join(KINDS)}; give such a file, a folder of them, or a dataset's id")
    return found


def _documents_of(file: Path, field: str) -> Iterator[str]:
    if file.suffix == ".txt":
        return iter([text.read_text(file, "data.path")])
    return (_text_of(row, field, str(file)) for row in (_lines(file) if file.suffix == ".jsonl" else _parquet(file, field)))


def _lines(file: Path) -> Iterator[Any]:
    number = 0
    with file.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, 1):  # noqa: B007 the message names it
                if line.strip():
                    yield json.loads(line)
        except ValueError as error:
            raise LowkeyError(f"data.path {str(file)!r}: line {number} is no JSON ({error}); give one object per line") from None


def _parquet(file: Path, field: str) -> Iterator[Any]:
    _library("pyarrow")
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.ParquetFile(file)
        known = field in table.schema_arrow.names
        for batch in table.iter_batches(batch_size=1024, columns=[field] if known else None):
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise LowkeyError(f"data.path {str(file)!r}: cannot be read ({_line(error)}); give a parquet file") from None


def _dataset(data: Data) -> Iterator[str]:
    """Streamed, so that a run of few tokens does not fetch a whole dataset."""
    _library("datasets")
    import datasets

    try:
        found = datasets.load_dataset(data.path, data.name or None, split=data.split, streaming=True, **data.options)
        for row in found:
            yield _text_of(row, data.text_field, data.path)
    except LowkeyError:
        raise
    except Exception as error:  # datasets raises many kinds; each is bad input or no network here
        raise LowkeyError(
            f"data.path {data.path!r}: no such file, and no dataset ({_line(error)}); give a file, a folder or an id"
        ) from error


def _text_of(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        names = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise LowkeyError(f"data.text_field {field!r}: a record of {where!r} has no such text (it has {names}); give data.text_field")
    return row[field]


def _library(name: str) -> None:
    import importlib.util

    if importlib.util.find_spec(name) is None:
        raise LowkeyError(f"{name} is not installed: pip install 'lowkey[train]'")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(". ")


# -- tokenizing


def _train_tokenizer(found: Iterator[str], size: int, progress: Progress) -> PreTrainedTokenizerFast:
    """Byte-level BPE with tokens for the beginning and the end of a text."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(progress(found, "training the tokenizer"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def _batches(found: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in found:
        batch.append(document)
        size += len(document)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(folder: Path, data: Data, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> None:
    """First all documents in one file, then the parts, since which documents are held out depends on how long all are."""
    kind = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    lengths, sizes = _spool(folder / "all.bin", kind, data, tokenizer, progress)
    ids = np.memmap(folder / "all.bin", dtype=kind, mode="r")
    lengths, sizes, chosen = _choose(ids, lengths, sizes, data.held_out, tokenizer)
    ends, digest, about = np.cumsum(lengths), hashlib.sha256(), {}
    for part, which in zip(PARTS, (~chosen, chosen), strict=True):
        with (folder / f"{part}.bin").open("wb") as file:
            for d in np.flatnonzero(which):
                piece = ids[ends[d] - lengths[d] : ends[d]].tobytes()
                digest.update(piece)
                file.write(piece)
        starts = np.concatenate([[0], np.cumsum(lengths[which])]).astype(np.int64)
        np.save(folder / f"{part}.npy", starts)
        digest.update(starts.tobytes())
        about[part] = {"tokens": int(starts[-1]), "documents": int(which.sum()), "bytes": int(sizes[which].sum())}
    del ids
    (folder / "all.bin").unlink()
    files.write_json(folder / ABOUT, {"dtype": kind.name, **about, "sha256": digest.hexdigest()})


def _spool(
    place: Path, kind: np.dtype, data: Data, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, bytes of text) of each document, written end to end, each with the tokenizer's bos and eos where it has them."""
    before, after = ([] if i is None else [i] for i in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    lengths, sizes, total = [], [], 0
    with place.open("wb") as file:
        for batch in progress(_batches(documents(data)), "tokenizing"):
            for document, ids in zip(batch, tokenizer(batch, add_special_tokens=False, verbose=False).input_ids, strict=True):
                if data.max_tokens and total >= data.max_tokens:
                    break
                np.array(before + ids + after, dtype=kind).tofile(file)
                lengths.append(len(before) + len(ids) + len(after))
                sizes.append(len(document.encode()))
                total += lengths[-1]
            if data.max_tokens and total >= data.max_tokens:
                break
    if not total:
        raise LowkeyError(f"data.path {data.path!r}: holds no text; give some thousand words at least")
    return np.array(lengths), np.array(sizes)


def _choose(
    ids: np.ndarray, lengths: np.ndarray, sizes: np.ndarray, share: float, tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths, sizes, and which documents are held out; the last document becomes two when all are too long to be held out whole."""
    room = int(share * len(ids))
    order = np.random.default_rng(0).permutation(len(lengths))
    order = order[lengths[order] <= room]
    chosen = np.zeros(len(lengths), dtype=bool)
    chosen[order[np.cumsum(lengths[order]) <= room]] = True
    if chosen.any() or room < 2:
        return lengths, sizes, chosen
    tail = len(str(tokenizer.decode(ids[-room:].tolist(), skip_special_tokens=True)).encode())
    lengths, sizes = (np.concatenate([x[:-1], [x[-1] - end, end]]) for x, end in ((lengths, room), (sizes, tail)))
    return lengths, sizes, np.append(chosen, True)


# -- reading the files


def _read(folder: Path, named: PreTrainedTokenizerBase | None) -> Corpus:
    about = files.read_json(folder / ABOUT, "tokens")
    kind = np.dtype(about["dtype"])
    tokenizer = named or AutoTokenizer.from_pretrained(folder)
    streams = [_stream(folder, part, about[part], kind) if about[part]["tokens"] else None for part in PARTS]
    if streams[0] is None:
        raise LowkeyError("data: nothing is left to train on; hold out less")
    return Corpus(tokenizer, streams[0], streams[1], about["sha256"])


def _stream(folder: Path, part: str, about: dict, kind: np.dtype) -> Stream:
    ids = np.memmap(folder / f"{part}.bin", dtype=kind, mode="r")
    starts = np.load(folder / f"{part}.npy")
    if len(ids) != about["tokens"] or starts[-1] != len(ids):
        raise LowkeyError(f"tokens {str(folder)!r}: {len(ids)} tokens where {about['tokens']} were written; delete the folder")
    return Stream(ids, starts, about["bytes"])

"""Models out of GGUF files: transformers unpacks their quantised weights, and what is left is the plain model
of the architecture.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lowkey.core import files
from lowkey.core.types import LowkeyError
from lowkey.models.names import GGUF_MAGIC

EXTRA = "pip install 'lowkey[gguf]'"
ARCHITECTURE, PRE_TOKENIZER = "general.architecture", "tokenizer.ggml.pre"  # fields
UINT32, STRING, ARRAY = 4, 8, 9  # kinds of fields
# bytes of the kinds that are numbers
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, UINT32: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
MOST_DIMS = 8
LONGEST_STRING = 2**24  # bytes of a string; chat templates have thousands
FLOATS = {
    frozenset(["F32"]): torch.float32,
    frozenset(["F16"]): torch.float16,
    frozenset(["F32", "F16"]): torch.float16,
}  # norms are F32
# vocabularies learned with every digit a word of its own
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r")


@dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    architecture: str
    dtype: torch.dtype  # of its numbers; bfloat16 where they are quantised
    splits: str  # the name of the rule by which text is cut before its tokens are looked for


def header(path: Path) -> Header:
    """Errors: LowkeyError for what is no GGUF file or is cut off, and when the package that reads them is
    missing.
    """
    what = f"model {str(path)!r}"
    with files.opened_file(path, "model", files.ANY_SIZE, "give a model folder or a GGUF file") as file:
        if file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise LowkeyError(
                f"{what} is no GGUF file, for it does not begin as one; give another, or download it again"
            )
        need(what)
        try:
            words, types, end = _table(file)
        except (struct.error, ValueError, OverflowError, MemoryError, RecursionError, KeyError, OSError):
            raise LowkeyError(
                f"{what}: its list of contents cannot be read; the file is damaged or cut off: download it "
                "again"
            ) from None
        size = os.fstat(file.fileno()).st_size
    if size < end:
        raise LowkeyError(f"{what}: has {size:,} bytes of {end:,}; it is cut off: download it again")
    if ARCHITECTURE not in words:
        raise LowkeyError(f"{what}: does not say of which architecture it is; give another")
    return Header(words[ARCHITECTURE], FLOATS.get(types, torch.bfloat16), words.get(PRE_TOKENIZER, ""))


def _table(file: BinaryIO) -> tuple[dict[str, str], frozenset[str], int]:
    """(the words of its fields that are words, the types of its tensors, bytes that it must have)."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    _, tensors, fields = _numbers(file, "IQQ")  # a version, which whoever reads the rest looks at
    words: dict[str, str] = {}
    alignment = 32
    for _ in range(fields):
        name, (kind,) = _string(file), _numbers(file, "I")
        if kind == STRING:
            words[name] = _string(file)
        elif name == "general.alignment" and kind == UINT32:
            (alignment,) = _numbers(file, "I")
        else:
            _skip(file, kind)
    places, types = [0], set()
    for _ in range(tensors):
        _string(file)
        (dims,) = _numbers(file, "I")
        if dims > MOST_DIMS:
            raise ValueError("no tensor has so many dimensions")
        shape = _numbers(file, f"{dims}Q")
        kind, offset = _numbers(file, "IQ")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        places.append(offset + math.prod(shape) // block * size)
        types.add(GGMLQuantizationType(kind).name)
    return words, frozenset(types), -(-file.tell() // alignment) * alignment + max(places)


def _skip(file: BinaryIO, kind: int) -> None:
    if kind == STRING:
        _string(file)
    elif kind == ARRAY:
        inner, count = _numbers(file, "IQ")
        if inner in WIDTHS:
            file.seek(count * WIDTHS[inner], os.SEEK_CUR)
        else:
            for _ in range(count):
                _skip(file, inner)
    else:
        file.seek(WIDTHS[kind], os.SEEK_CUR)


def _string(file: BinaryIO) -> str:
    (length,) = _numbers(file, "Q")
    if length > LONGEST_STRING:
        raise ValueError("no string is so long")
    return _bytes(file, length).decode("utf-8", "replace")


def _numbers(file: BinaryIO, form: str) -> tuple[int, ...]:
    return struct.unpack(f"<{form}", _bytes(file, struct.calcsize(f"<{form}")))


def _bytes(file: BinaryIO, count: int) -> bytes:
    found = file.read(count)
    if len(found) != count:
        raise ValueError("the file ends here")
    return found


def need(what: str) -> None:
    """The package that reads these files is there. Errors: LowkeyError."""
    if find_spec("gguf") is None:
        raise LowkeyError(f"{what}: GGUF files are read with the package gguf, which is missing; {EXTRA}")


def load_config(path: Path) -> PreTrainedConfig:
    """Errors: whatever transformers raises for an architecture that it cannot read."""
    return _without_quantisation(
        AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    )


def _without_quantisation(config: PreTrainedConfig) -> PreTrainedConfig:
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def load_plain(path: Path, dtype: torch.dtype, device: str) -> tuple[PreTrainedModel, dict]:
    """(the model with unpacked weights, as if it had been loaded from a plain checkpoint; what transformers
    says of the loading).

    A model that transformers loads from such a file calls itself quantised and refuses to be saved, so its
    weights move to a new one.
    """
    from transformers import GgufConfig

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
        trust_remote_code=False,
    )
    packed, found = loaded
    config = _without_quantisation(packed.config)
    plain = type(packed).from_pretrained(
        None, config=config, state_dict=packed.state_dict(), dtype=dtype, device_map=device
    )
    plain.generation_config = packed.generation_config
    return plain, found


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """With its chat template. transformers cuts text as GPT-2 does where it does not know the file's rule;
    runs of digits and the blanks before them would then be cut otherwise than when the vocabulary was
    learned."""
    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    if header(path).splits in SINGLE_DIGITS:
        cut = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)  # type: ignore[list-item]
    return tokenizer

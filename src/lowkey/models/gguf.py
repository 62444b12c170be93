"""Loads models from GGUF files.

transformers unpacks their quantised weights; the result is a plain model of the architecture.
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
ARCHITECTURE, PRE_TOKENIZER = "general.architecture", "tokenizer.ggml.pre"  # names of fields
UINT32, STRING, ARRAY = 4, 8, 9  # types of fields
# bytes of the types that are numbers
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, UINT32: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
MOST_DIMS = 8
LONGEST_STRING = 2**24  # bytes; chat templates have thousands
FLOATS = {  # the dtype of a model by the types of its tensors; norms are F32 in models of F16
    frozenset(["F32"]): torch.float32,
    frozenset(["F16"]): torch.float16,
    frozenset(["F32", "F16"]): torch.float16,
}
# pre-tokenizers under which every digit is a token of its own
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r")


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself.

    Args:
        architecture: of the model, as llama.cpp calls it.
        dtype: of its numbers; bfloat16 if they are quantised.
        pre_tokenizer: the name of the rule by which text is cut into words before it is cut into tokens.
    """

    architecture: str
    dtype: torch.dtype
    pre_tokenizer: str


def header(path: Path) -> Header:
    """Read what a GGUF file says about itself.

    Raises:
        LowkeyError: if it is no GGUF file or incomplete, or the package that reads such files is missing.
    """
    what = f"model {str(path)!r}"
    with files.opened_file(path, "model", files.ANY_SIZE, "give a model folder or a GGUF file") as file:
        if file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise LowkeyError(
                f"{what} is no GGUF file, for it does not begin as one; give another, or download it again"
            )
        check_gguf_installed(what)
        try:
            texts, types, end = _table(file)
        except (struct.error, ValueError, OverflowError, MemoryError, RecursionError, KeyError, OSError):
            raise LowkeyError(
                f"{what}: its list of contents cannot be read; the file is damaged or cut off: download it "
                "again"
            ) from None
        size = os.fstat(file.fileno()).st_size
    if size < end:
        raise LowkeyError(f"{what}: has {size:,} bytes of {end:,}; it is cut off: download it again")
    if ARCHITECTURE not in texts:
        raise LowkeyError(f"{what}: does not say of which architecture it is; give another")
    return Header(texts[ARCHITECTURE], FLOATS.get(types, torch.bfloat16), texts.get(PRE_TOKENIZER, ""))


def _table(file: BinaryIO) -> tuple[dict[str, str], frozenset[str], int]:
    """Read the list of contents.

    Returns:
        (the fields that hold text, the types of all tensors, the bytes that the file must have).
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    _, tensors, fields = _numbers(file, "IQQ")  # the first is a version, which transformers checks
    texts: dict[str, str] = {}
    alignment = 32
    for _ in range(fields):
        name, (kind,) = _string(file), _numbers(file, "I")
        if kind == STRING:
            texts[name] = _string(file)
        elif name == "general.alignment" and kind == UINT32:
            (alignment,) = _numbers(file, "I")
        else:
            _skip(file, kind)
    ends, types = [0], set()  # where each tensor ends, counted from the first
    for _ in range(tensors):
        _string(file)  # the name
        (dims,) = _numbers(file, "I")
        if dims > MOST_DIMS:
            raise ValueError("no tensor has so many dimensions")
        shape = _numbers(file, f"{dims}Q")
        kind, offset = _numbers(file, "IQ")
        # quantised numbers come in blocks: so many numbers in so many bytes
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        ends.append(offset + math.prod(shape) // block * size)
        types.add(GGMLQuantizationType(kind).name)
    # tensors begin at the next multiple of the alignment
    return texts, frozenset(types), -(-file.tell() // alignment) * alignment + max(ends)


def _skip(file: BinaryIO, kind: int) -> None:
    """Skip the value of a field of this type."""
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
    """Read a text, which is preceded by its length."""
    (length,) = _numbers(file, "Q")
    if length > LONGEST_STRING:
        raise ValueError("no string is so long")
    return _bytes(file, length).decode("utf-8", "replace")


def _numbers(file: BinaryIO, form: str) -> tuple[int, ...]:
    """Read little-endian numbers in a format of `struct`."""
    return struct.unpack(f"<{form}", _bytes(file, struct.calcsize(f"<{form}")))


def _bytes(file: BinaryIO, count: int) -> bytes:
    """Read so many bytes. Raises: ValueError if the file ends before."""
    data = file.read(count)
    if len(data) != count:
        raise ValueError("the file ends here")
    return data


def check_gguf_installed(what: str) -> None:
    """Check that the package that reads GGUF files is installed.

    Args:
        what: what needs it, for the message.

    Raises:
        LowkeyError: if it is not.
    """
    if find_spec("gguf") is None:
        raise LowkeyError(f"{what}: GGUF files are read with the package gguf, which is missing; {EXTRA}")


def load_config(path: Path) -> PreTrainedConfig:
    """The config of the model in a file. Raises: whatever transformers does if it does not know it."""
    return _without_quantisation(
        AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    )


def _without_quantisation(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the unpacked model."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def load_plain(path: Path, dtype: torch.dtype, device: str) -> tuple[PreTrainedModel, dict]:
    """Load a model with unpacked weights, as from a plain checkpoint.

    A model that transformers loads from a GGUF file calls itself quantised and refuses to be saved, so its
    weights are moved to a new model.

    Args:
        path: the GGUF file.
        dtype: of the weights.
        device: as transformers takes it.

    Returns:
        (model, what transformers says about its loading).
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
    packed, report = loaded
    config = _without_quantisation(packed.config)
    plain = type(packed).from_pretrained(
        None, config=config, state_dict=packed.state_dict(), dtype=dtype, device_map=device
    )
    plain.generation_config = packed.generation_config
    return plain, report


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, with its chat template.

    transformers cuts text as GPT-2 does if it does not know the file's pre-tokenizer. Runs of digits would
    then be cut differently than when the vocabulary was learned, so that is mended here.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    if header(path).pre_tokenizer in SINGLE_DIGITS:
        pre_tokenizer: list[Any] = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pre_tokenizer)
    return tokenizer

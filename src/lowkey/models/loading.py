"""Loads models: from a folder, the Hub, a GGUF file, or by the name of one that comes with lowkey.

What cannot be loaded raises a `LowkeyError` of one line.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib.resources import as_file
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lowkey.attention import register
from lowkey.core import files
from lowkey.core.errors import first_line
from lowkey.core.types import LowkeyError
from lowkey.models import gguf, packaged
from lowkey.models.attention_interface import attach
from lowkey.models.families import family
from lowkey.models.names import GIVE, TINY, check_device, check_dtype, check_name, check_spelling, is_gguf
from lowkey.models.packaged import PACKAGED


def load(
    name: str, dtype: str = "auto", device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and attach it.

    Args:
        name: a folder, a Hub id, a `.gguf` file, `tiny`, or another model that comes with lowkey.
        dtype: auto (as saved; bfloat16 for a quantised GGUF file), float32, bfloat16 or float16.
        device: auto, cpu, cuda, or balanced to spread the model over several GPUs.

    Returns:
        (the attached model in eval mode, its tokenizer).

    Raises:
        LowkeyError: for a folder that is no model, an unknown Hub id, a damaged file, or an unsupported
            family or dtype.
    """
    check_model_name(name)
    with _location(name) as place:
        _verify(name, place)
        try:
            model, report = _read(place, _dtype(dtype), _device(device))
            tokenizer = _read_tokenizer(place)
        except LowkeyError:
            raise
        except Exception as error:  # transformers raises many kinds; each is bad input here
            raise _no_model(name, error) from error
    if report["missing_keys"]:  # transformers would leave random numbers in their place
        raise LowkeyError(
            f"model {name!r} lacks weights ({sorted(report['missing_keys'])[0]}); it is incomplete: save or "
            "download it again"
        )
    model.config._name_or_path = name
    return attach(model.eval()), tokenizer


def check_model_name(name: str) -> None:
    """Check that there is a model of this name, of a supported family, before anything large is read.

    Raises:
        LowkeyError: if there is none.
    """
    family(read_config(name)[0])


def read_config(name: str) -> tuple[PreTrainedConfig, torch.dtype]:
    """The config of a model, of any family, without its weights.

    Args:
        name: as `load` takes it.

    Returns:
        (the config, the dtype that the model is loaded in unless another is asked for).

    Raises:
        LowkeyError: if there is no such model, or its config cannot be read.
    """
    register()  # so that transformers knows our own model type
    check_name(name)
    with _location(name) as place:
        saved = gguf.header(Path(place)).dtype if is_gguf(place) else None
        try:
            config = (
                gguf.load_config(Path(place))
                if is_gguf(place)
                else AutoConfig.from_pretrained(place, trust_remote_code=False)
            )
        except Exception as error:  # transformers raises many kinds; each is bad input here
            raise _no_model(name, error) from error
    dtype = saved or config.get_text_config().dtype or config.dtype
    return config, dtype if isinstance(dtype, torch.dtype) else torch.float32


def _read(place: Path | str, dtype: torch.dtype | str, device: str) -> tuple[Any, dict]:
    """Load the weights. Returns (model, what transformers says about its loading)."""
    if is_gguf(place):
        return gguf.load_plain(
            Path(place), gguf.header(Path(place)).dtype if isinstance(dtype, str) else dtype, device
        )
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        place, dtype=dtype, device_map=device, output_loading_info=True, trust_remote_code=False
    )
    return loaded


def _read_tokenizer(place: Path | str) -> Any:
    if is_gguf(place):
        return gguf.load_gguf_tokenizer(Path(place))
    return AutoTokenizer.from_pretrained(place, trust_remote_code=False)


def _verify(name: str, place: Path | str) -> None:
    """Check that a folder that lowkey wrote was not changed. Raises: LowkeyError."""
    folder = Path(place)  # for a Hub id a folder that does not exist
    if not (folder / files.MANIFEST).exists():
        return
    try:
        files.read_consistently(folder, lambda: files.verify(folder, "model"))
    except LowkeyError as error:
        raise packaged.damaged_model(name, error) if name in PACKAGED else error from None


def _no_model(name: str, error: Exception) -> LowkeyError:
    """The error for a model that transformers cannot load."""
    if name in PACKAGED:
        return packaged.damaged_model(name, error)
    return LowkeyError(f"model {name!r} cannot be loaded: {first_line(error)}; {GIVE}")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Raises:
        LowkeyError: if there is none, or none that the tokenizers library runs.
    """
    with _location(name) as place:
        try:
            tokenizer = _read_tokenizer(place)
        except LowkeyError:
            raise
        except Exception as error:  # transformers raises many kinds; each is bad input here
            raise LowkeyError(f"tokenizer {name!r} cannot be loaded: {first_line(error)}; {GIVE}") from error
    if not tokenizer.is_fast:
        raise LowkeyError(f"tokenizer {name!r} is not one of the tokenizers library; give another")
    return tokenizer


def _location(name: str) -> AbstractContextManager[Path | str]:
    """The folder or file of a model, or its Hub id.

    Raises:
        LowkeyError: for a model that has to be downloaded first, and for a name that is nearly that of one
            that comes with lowkey.
    """
    if name == TINY:
        return as_file(package_files("lowkey") / "data" / "tiny")
    if name in PACKAGED:
        return nullcontext(packaged.packaged_folder(name))
    check_spelling(name)
    return nullcontext(name)


def local_folder(name: str) -> Path:
    """The folder on this machine that holds a model; one of the Hub is downloaded first.

    Raises:
        LowkeyError: for a model that is not there.
    """
    with _location(name) as place:
        folder = Path(place)
        if folder.is_dir():
            return folder
    try:
        patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the Hub's client raises many kinds; each is bad input here
        raise _no_model(name, error) from error


def _dtype(name: str) -> torch.dtype | str:
    check_dtype(name)
    return name if name == "auto" else getattr(torch, name)


def _device(name: str) -> str:
    check_device(name)
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise LowkeyError(f"device {name!r}: no CUDA device is available; use --device cpu")
    return name

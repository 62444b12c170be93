"""Models by folder, Hub id, GGUF file, or the name of one that comes with lowkey; one clear line when it cannot be done."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from importlib.resources import as_file
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lowkey import files, ggufs, options, packaged
from lowkey.allocate import ALLOCATORS
from lowkey.attention import register
from lowkey.families import family
from lowkey.methods import METHODS, Method
from lowkey.packaged import PACKAGED
from lowkey.policies import POLICIES
from lowkey.policies.base import Policy
from lowkey.seam import attach
from lowkey.splitting import PARTS, Allocator
from lowkey.types import Budget, LowkeyError

TINY = "tiny"
NEAR = 0.8  # how alike a name must be to one of ours not to be asked of the Hub
GIVE = f"give a model folder, a Hub id, a .gguf file, or one of {', '.join(map(repr, (TINY, *PACKAGED)))}"
STAGES = ("fits", "fit", "tunes", "tune", "finishes", "finish")
NEEDED = (*STAGES, "summary", "paper", "allocator", "layout", "grid", "every", "candidates", "numbers")  # of a method


def load(name: str, dtype: str = "auto", device: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(attached model in eval mode, tokenizer). dtype: auto (as saved; bfloat16 for a quantised GGUF file), float32, bfloat16, float16.
    device: auto, cpu, cuda, or `balanced` to spread over several GPUs.

    Errors: LowkeyError for a folder that is no model, an unknown Hub id, a damaged file, an unsupported family or dtype.
    """
    check(name)
    with _location(name) as place:
        _verify(name, place)
        try:
            model, found = _read(place, _dtype(dtype), _device(device))
            tokenizer = _read_tokenizer(place)
        except LowkeyError:
            raise
        except Exception as error:  # transformers raises many kinds; each is bad input here
            raise _no_model(name, error) from error
    if found["missing_keys"]:  # transformers would leave random numbers in their place
        raise LowkeyError(f"model {name!r} lacks weights ({sorted(found['missing_keys'])[0]}); it is incomplete: save or download it again")
    model.config._name_or_path = name
    return attach(model.eval()), tokenizer


def check(name: str) -> None:
    """That there is a model of this name, of a family that is supported, before anything large is read. Errors: LowkeyError."""
    register()  # our own model type
    with _location(name) as place:
        _check_folder(name, place)
        try:
            config = ggufs.load_config(Path(place)) if ggufs.is_gguf(place) else AutoConfig.from_pretrained(place, trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds; each is bad input here
            raise _no_model(name, error) from error
    family(config)


def _read(place: Path | str, dtype: torch.dtype | str, device: str) -> tuple[Any, dict]:
    """(model, what transformers says of its loading)."""
    if ggufs.is_gguf(place):
        return ggufs.load_plain(Path(place), ggufs.header(Path(place)).dtype if isinstance(dtype, str) else dtype, device)
    return AutoModelForCausalLM.from_pretrained(  # type: ignore[return-value]
        place, dtype=dtype, device_map=device, output_loading_info=True, trust_remote_code=False
    )


def _read_tokenizer(place: Path | str) -> Any:
    return ggufs.load_tokenizer(Path(place)) if ggufs.is_gguf(place) else AutoTokenizer.from_pretrained(place, trust_remote_code=False)


def _verify(name: str, place: Path | str) -> None:
    """A folder that lowkey wrote is as it was written."""
    folder = Path(place)
    if not (folder / files.MANIFEST).exists():
        return
    try:
        files.steady(folder, lambda: files.verify(folder, "model"))
    except LowkeyError as error:
        raise packaged.damaged(name, error) if name in PACKAGED else error from None


def _no_model(name: str, error: Exception) -> LowkeyError:
    if name in PACKAGED:
        return packaged.damaged(name, error)
    return LowkeyError(f"model {name!r} cannot be loaded: {_first_line(error)}; {GIVE}")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Errors: LowkeyError when there is none, or none that the tokenizers library runs."""
    with _location(name) as place:
        try:
            tokenizer = _read_tokenizer(place)
        except LowkeyError:
            raise
        except Exception as error:  # transformers raises many kinds; each is bad input here
            raise LowkeyError(f"tokenizer {name!r} cannot be loaded: {_first_line(error)}; {GIVE}") from error
    if not tokenizer.is_fast:
        raise LowkeyError(f"tokenizer {name!r} is not one of the tokenizers library; give another")
    return tokenizer


def _location(name: str) -> AbstractContextManager[Path | str]:
    """The folder or file of a model, or its Hub id. Errors: LowkeyError for one that has to be downloaded, and for a name that is nearly
    that of one."""
    if name == TINY:
        return as_file(package_files("lowkey") / "data" / "tiny")
    if name in PACKAGED:
        return nullcontext(packaged.place_of(name))
    if not Path(name).exists() and (near := get_close_matches(name.lower(), [TINY, *PACKAGED], 1, NEAR)):
        raise LowkeyError(f"model {name!r} is unknown; did you mean {near[0]!r}?")
    return nullcontext(name)


def is_local(name: str) -> bool:
    """Whether this can only be a place on this machine, and no id of the Hub."""
    return name.startswith((".", "/", "~")) or name.count(os.sep) > 1


def _check_folder(name: str, place: Path | str) -> None:
    path = Path(place)
    if ggufs.is_gguf(place):
        ggufs.header(path)
        return
    if path.exists() and not (path / "config.json").is_file():
        raise LowkeyError(f"model {name!r} is no model: it has no config.json; {GIVE}")
    for part in path.iterdir() if path.is_dir() else ():
        if part.exists() and not (part.is_file() or part.is_dir()):
            raise LowkeyError(f"model {name!r}: its {part.name} is neither a file nor a folder; save or download it again")
    if not path.exists() and is_local(name):
        raise LowkeyError(f"model {name!r}: no such folder; {GIVE}")


def _dtype(name: str) -> torch.dtype | str:
    known: dict[str, torch.dtype | str] = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise LowkeyError(f"dtype {name!r} is unknown; choose one of {', '.join(known)}")
    return known[name]


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "balanced") and not re.fullmatch(r"cuda(:\d+)?", name):
        raise LowkeyError(f"device {name!r} is unknown; choose auto, cpu, cuda or balanced")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise LowkeyError(f"device {name!r}: no CUDA device is available; use --device cpu")
    return name


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(". ")


def make_method(name: str, given: Mapping[str, str]) -> Method:
    """A method by its name in METHODS or as `package.module:Class`, with options given as text."""
    kind: Any = METHODS.get(name) or _outside("method", name, METHODS, NEEDED)
    return _made(f"method {name!r}", kind, given)


def make_allocator(name: str, given: Mapping[str, str]) -> Allocator:
    """An allocator of ranks by its name in ALLOCATORS or as `package.module:Class`, with options given as text."""
    kind: Any = ALLOCATORS.get(name) or _outside("allocator", name, ALLOCATORS, PARTS)
    return _made(f"allocator {name!r}", kind, given)


def make_policy(name: str, budget: str | Budget | None, given: Mapping[str, str], split: Mapping[str, str] | None = None) -> Policy:
    """A policy by its name in POLICIES or as `package.module:Class`, with options given as text: of it or, where it has none of that
    name, of its allocator. split: options of the allocator alone."""
    make: Any = POLICIES.get(name) or _outside("policy", name, POLICIES, ("score", "summary", "paper"))
    what, kind = f"policy {name!r}", getattr(make, "func", make)
    own = [f.name for f in fields(kind) if f.name != "budget"]
    chosen = {key: text if key == "allocator" else options.read(kind, key, text, what) for key, text in given.items() if key in own}
    policy = make(budget, **chosen)
    allocator = policy.split()
    of, parts = f"the allocator of {what}", [f.name for f in fields(allocator)]
    _check_options(what, given, [*own, *parts])
    _check_options(of, split or {}, parts)
    rest = {key: text for key, text in given.items() if key not in own} | dict(split or {})
    values = {key: options.read(type(allocator), key, text, of if key in (split or {}) else what) for key, text in rest.items()}
    return replace(policy, allocator=replace(allocator, **values)) if values else policy


def _made(what: str, kind: Any, given: Mapping[str, str]) -> Any:
    _check_options(what, given, [f.name for f in fields(kind)])
    made = kind(**{key: options.read(kind, key, text, what) for key, text in given.items()})
    options.check(made)  # a class from outside need not do so itself
    return made


def _check_options(what: str, given: Iterable[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise LowkeyError(f"option {name!r} of {what} is unknown; it has {', '.join(known) or 'none'}{hint}")


def _outside(what: str, name: str, table: Mapping[str, Any], needed: Sequence[str]) -> Any:
    if ":" not in name:
        near = get_close_matches(name, table, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(table)} or package.module:Class"
        raise LowkeyError(f"{what} {name!r} is unknown; {hint}")
    module, _, attribute = name.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing runs the user's file, which may raise anything
        problem = f"{type(error).__name__}: {_first_line(error)}"
        raise LowkeyError(f"{what} {name!r} cannot be imported ({problem}); give package.module:Class") from error
    if not (isinstance(kind, type) and is_dataclass(kind) and all(hasattr(kind, part) for part in needed)):
        raise LowkeyError(f"{what} {name!r} is no {what}; give a dataclass with {', '.join(needed)}")
    return kind

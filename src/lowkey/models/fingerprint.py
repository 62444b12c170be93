"""Fingerprints of models and texts, so that what was made with one is not used with another."""

from __future__ import annotations

import hashlib
import json
import weakref
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lowkey.core.errors import first_line
from lowkey.core.types import LowkeyError
from lowkey.models import families, weights
from lowkey.models.adapters import Adapters

RULE_VERSION = "2:"  # of how fingerprints are taken, with which they begin; those of the first had no mark
Checksums = dict[int, dict[tuple, bytes]]
"""Checksums of tensors that were taken before, by address in memory, then by dtype, shape and strides."""
WORDS_PER_ROW = 1024  # 64-bit words in a row of the checksum
ROUNDED_AT_ONCE = 2**18  # numbers that are rounded at a time on a CPU, so that they stay in its cache

# Fields of a config that cannot change what a model computes when it reads text. Everything else counts.
IRRELEVANT = frozenset(
    [
        # names and versions
        "name_or_path",
        "transformers_version",
        "architectures",
        "auto_map",
        "transformers_weights",
        "tokenizer_class",
        # how numbers are kept and computed: rounding makes a model the same in any dtype
        "dtype",
        "torch_dtype",
        "attn_implementation",
        "experts_implementation",
        "use_cache",
        "chunk_size_feed_forward",
        "base_model_tp_plan",
        "base_model_pp_plan",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        # ids that only generation and text processing use
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "cls_token_id",
        "decoder_start_token_id",
        # classification
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "finetuning_task",
        "task_specific_params",
        # training
        "initializer_range",
        "attention_dropout",
        "hidden_dropout",
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
        "gradient_checkpointing",
    ]
)


def model_fingerprint(model: PreTrainedModel) -> str:
    """The fingerprint of a model: of its config, its weights and its active adapters.

    All fields of the config count but IRRELEVANT ones. Every number of every weight counts, rounded to
    bfloat16, so a model loaded in float32 and in bfloat16 is the same. peft's adapters count if they are
    active, whatever they are called; a base model is the same with and without a wrapper around it. This
    takes about as long as the model takes for a token: both read all weights once.

    Raises:
        LowkeyError: for weights without numbers, or of a kind that cannot be read.
    """
    wrapped: Any = model
    base = wrapped.get_base_model() if hasattr(model, "get_base_model") else model
    adapters = Adapters(base)
    parts = {
        "config": config_text(base.config).encode(),
        "adapters": repr(sorted(adapters.settings())).encode(),
    }
    # tied weights are read once
    taken: Checksums = {weights.storage_address(p): {} for p in base.parameters() if not p.is_meta}
    # some of peft's methods add trained tokens to every text
    prompts = getattr(wrapped, "prompt_encoder", {})
    for i, adapter in enumerate(sorted(wrapped.active_adapters) if prompts else ()):
        for name, value in prompts[adapter].state_dict().items() if adapter in prompts else ():
            parts[f"prompt {i} {name}"] = _digest(value, name, taken)
    for name, value in weights.state_entries(base):
        plain = adapters.plain_name(name)
        if plain is not None:
            parts[f"weight {plain}"] = _digest(value, name, taken)
    return _joined(parts)


def _joined(parts: dict[str, bytes]) -> str:
    """The fingerprint of checksums by name."""
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(name.encode() + b"\0" + hashlib.sha256(parts[name]).digest())
    return RULE_VERSION + digest.hexdigest()


def checkpoint_fingerprint(folder: Path, config: PreTrainedConfig) -> str:
    """The fingerprint of the model that a folder holds, from its files, without loading it.

    One weight at a time is in memory. It equals `model_fingerprint` of the loaded model.

    Args:
        folder: of a checkpoint in safetensors files.
        config: the model's, as transformers reads it from the folder.

    Raises:
        LowkeyError: for a folder without such files, and for a model whose files name other weights than it
            has (one that is quantised).
    """
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(config)
    skeleton.tie_weights()
    alike: dict[int, list[str]] = {}  # names of the same weight
    for name, value in skeleton.state_dict(keep_vars=True).items():
        alike.setdefault(id(value), []).append(name)
    names = {name: group for group in alike.values() for name in group}
    parts = {"config": config_text(config).encode(), "adapters": repr([]).encode()}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    for known in names.get(name, ()):
                        if known == name or f"weight {known}" not in parts:
                            parts[f"weight {known}"] = _digest(file.get_tensor(name), name, {})
        except SafetensorError as error:
            raise LowkeyError(
                f"model {str(folder)!r}: {path.name} is damaged ({first_line(error)}); save or download it "
                "again"
            ) from None
    if missing := [name for name in names if f"weight {name}" not in parts]:
        raise LowkeyError(
            f"model {str(folder)!r}: its safetensors files hold no {min(missing)}; give a folder that "
            "save_pretrained wrote, without quantisation"
        )
    return _joined(parts)


def check_model(what: str, name: object, wanted: object, model: PreTrainedModel, remedy: str) -> None:
    """Refuse a model that something was not made for; see `check_fingerprint`. Raises: LowkeyError."""
    check_fingerprint(what, name, wanted, model_fingerprint(model), remedy)


def check_fingerprint(what: str, name: object, wanted: object, fingerprint: str, remedy: str) -> None:
    """Refuse a model that something was not made for.

    Args:
        what: what was made, for messages.
        name: of the model that it was made for, for messages.
        wanted: the fingerprint of that model.
        fingerprint: of the model at hand.
        remedy: what the user should do, for messages.

    Raises:
        LowkeyError: if the fingerprints differ.
    """
    if wanted == fingerprint:
        return
    if not str(wanted).startswith(RULE_VERSION):
        raise LowkeyError(
            f"{what} was made by an earlier version of lowkey, whose fingerprints left out numbers that "
            f"change outputs; {remedy}"
        )
    raise LowkeyError(
        f"{what} was made for model {name!r} ({str(wanted)[:14]}), this one is {fingerprint[:14]}; {remedy}"
    )


class FillingModel:
    """The model that fills a cache, watched for changes between turns.

    Args:
        model: the model.
        fingerprint: its fingerprint, if the cache holds tokens already; None for an empty cache.

    Attributes:
        model: a weak reference to the model.
        at_first: the fingerprint when the first tokens came; None before.
        error: why no fingerprint could be taken, or None.
        changed: whether it was another model at a later turn.
    """

    def __init__(self, model: PreTrainedModel, fingerprint: str | None = None) -> None:
        self.model, self.at_first, self.changed = weakref.ref(model), fingerprint, False
        self.error: LowkeyError | None = None
        self._marks = None if fingerprint is None else _quick_marks(model)

    @torch.compiler.disable
    def observe(self, tokens: int, first: bool) -> None:
        """Note which model is about to store tokens.

        For the first tokens, all weights are read. Later they are read only if quick marks have changed, and
        never for single tokens: a step of decoding must not take so long.

        Args:
            tokens: how many are about to be stored.
            first: whether the cache is empty.
        """
        model = self.model()
        if model is None or (not first and (self.at_first is None or tokens < 2)):
            return
        if first:
            self.at_first, self.error, self.changed = None, None, False
            try:
                self.at_first = model_fingerprint(model)
            except LowkeyError as error:  # matters only if the cache is saved
                self.error = error
            self._marks = _quick_marks(model)
        elif self._marks != (marks := _quick_marks(model)):
            self._marks, self.changed = marks, self.changed or model_fingerprint(model) != self.at_first

    def fingerprint(self) -> str:
        """The fingerprint of the model, for saving the cache.

        Raises:
            LowkeyError: if the model is gone, or is not the one that filled the cache.
        """
        model = self.model()
        if model is None:
            raise LowkeyError("cache: its model is gone; save while the model is loaded")
        if self.error:
            raise self.error
        now = model_fingerprint(model)
        if self.changed or self.at_first not in (None, now):
            remedy = (
                "fill a cache again"
                if self.changed
                else "put back the adapter or the weights that filled it, or fill it again"
            )
            raise LowkeyError(
                "cache: the model has changed since the cache was filled (adapters, weights or config); "
                f"{remedy}"
            )
        return now


def _quick_marks(model: PreTrainedModel) -> tuple:
    """What most changes to a model change, at almost no cost.

    Where weights are, how often they were written, the config and the adapters.
    """
    # PyTorch counts up `_version` whenever a tensor is written in place
    places = [(weights.storage_address(p), 0 if p.is_inference() else p._version) for p in model.parameters()]
    adapters = Adapters(model)
    named = [adapters.active(wrapper) for wrapper in adapters.wrappers.values()]
    return hash(tuple(places)), config_text(model.config), repr(named), repr(sorted(adapters.settings()))


def data_fingerprint(ids: Tensor) -> str:
    """The sha256 of token ids."""
    return hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()


# -- the config


def config_text(config: PreTrainedConfig) -> str:
    """The fields of a config that count, in a form that does not depend on how numbers are written.

    A field at its class's default is left out: a later transformers may add fields, and a checkpoint must
    stay the same model. Layer types are written out, since some versions infer them.
    """
    text = config.get_text_config()
    return json.dumps(
        [_relevant_fields(config, text), list(families.layer_types(text))], sort_keys=True, default=str
    )


def _relevant_fields(config: PreTrainedConfig, text: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a config that count, given the config of its text decoder."""
    usual = {} if config.has_no_defaults_at_init else type(config)().to_dict()
    fields: dict[str, Any] = {"model_type": config.model_type}
    for name, value in config.to_dict().items():
        inner = getattr(config, name, None)
        if name in IRRELEVANT or name.startswith("_") or (name == "layer_types" and config is text):
            continue
        if isinstance(inner, PreTrainedConfig):
            fields[name] = _relevant_fields(inner, text)
        elif (plain := _plain(value)) != _plain(usual.get(name)):
            fields[name] = plain
    return fields


def _plain(value: Any) -> Any:
    """A value with lists for tuples, floats for integers, and text for keys."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    # a config that was saved as JSON may come back with 10000 for 10000.0
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


# -- weights


def _digest(value: Any, name: str, taken: Checksums) -> bytes:
    """The checksum of one entry of a state dict.

    It need not be a tensor: packed and quantised weights come with types, tuples and text.
    """
    if isinstance(value, Tensor):
        return _tensor(value, name, taken)
    if isinstance(value, list | tuple):
        return b"".join(hashlib.sha256(_digest(part, name, taken)).digest() for part in value)
    if isinstance(value, dict):
        return b"".join(
            str(key).encode() + _digest(value[key], name, taken) for key in sorted(value, key=str)
        )
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype):
        return repr(value).encode()
    raise LowkeyError(
        f"model: weight {name} is a {type(value).__name__}, which cannot be read; use the model without "
        "quantisation"
    )


def _tensor(t: Tensor, name: str, taken: Checksums) -> bytes:
    """The checksum of a tensor of whatever library."""
    try:
        return _numbers(t, name, taken)
    # tensors of other libraries may do anything
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        why = first_line(error, 120)
        raise LowkeyError(
            f"model: weight {name} cannot be read ({why}); use the model without quantisation"
        ) from None


@torch.no_grad()
def _numbers(t: Tensor, name: str, taken: Checksums) -> bytes:
    """The checksum of a tensor's shape and numbers, taken once for tied weights."""
    if t.is_meta:
        raise weights.missing_numbers(name)
    if hasattr(t, "full_tensor"):  # one that is spread over devices
        t = t.full_tensor()
    if t.is_quantized:
        return _tensor(t.int_repr(), name, {}) + _tensor(t.dequantize(), name, {})
    if hasattr(t, "__tensor_flatten__"):  # a packed weight made of several tensors
        return b"".join(
            part.encode() + _tensor(getattr(t, part), name, {}) for part in t.__tensor_flatten__()[0]
        )
    t = t.detach().as_subclass(Tensor)
    # offloaded weights have no address of their own, and are not in `taken`
    key, known = (t.dtype, t.shape, t.stride()), taken.get(t.data_ptr(), {})
    if key not in known:
        known[key] = repr(tuple(t.shape)).encode() + tensor_checksum(t)
    return known[key]


def tensor_checksum(t: Tensor) -> bytes:
    """A checksum of every number of a tensor; floating-point numbers count as bfloat16.

    The bits are laid out as 64-bit words in rows of WORDS_PER_ROW. The checksum is the sums, modulo 2^64, of
    the rows and of the columns. Any single change alters it, and so does a move of numbers within a row or a
    move of rows. The sums are exact, so they are the same on every device.
    """
    flat = t.contiguous().flatten()
    # numbers that fill a row of words; what does not fill one is appended as it is
    size = WORDS_PER_ROW * 8 // (2 if _rounds(flat) else flat.element_size())
    whole = flat.numel() // size * size
    columns, rows = torch.zeros(WORDS_PER_ROW, dtype=torch.int64, device=t.device), []
    at_once = max(size, ROUNDED_AT_ONCE if t.device.type == "cpu" else 2**8 * ROUNDED_AT_ONCE)
    for part in flat[:whole].split(at_once) if whole else ():
        words = _bits(part).view(torch.int64).view(-1, WORDS_PER_ROW)
        columns += words.sum(0)
        rows.append(words.sum(1))
    sums = torch.cat([columns, *rows]).cpu().numpy().tobytes() if rows else b""
    return sums + _bits(flat[whole:]).view(torch.uint8).cpu().numpy().tobytes()


def _bits(part: Tensor) -> Tensor:
    """A tensor whose bits can be read as integers; a copy if its place in memory does not allow that."""
    if _rounds(part):
        part = part.to(torch.bfloat16)
    elif part.is_complex():
        part = torch.view_as_real(part)
    return part.clone() if part.storage_offset() * part.element_size() % 8 else part


def _rounds(t: Tensor) -> bool:
    """Whether these are weights that may also be loaded in another floating-point dtype."""
    return t.is_floating_point() and t.element_size() >= 2

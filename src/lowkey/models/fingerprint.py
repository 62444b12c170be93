"""Short names for models and texts, so that what was made with one is not used with another."""

from __future__ import annotations

import hashlib
import json
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lowkey.core.types import LowkeyError
from lowkey.models import families, weights
from lowkey.models.adapters import Adapters

RULE_VERSION = (
    "2:"  # what a fingerprint says is as good as the rule it was taken by; the first rule had no mark
)
Read = dict[int, dict[tuple, bytes]]  # checksums of what lies at a place in memory
WORDS_PER_ROW = 1024  # 64-bit words in a row of the checksum
ROUNDED_AT_ONCE = 2**18  # numbers that are rounded at a time on a CPU, so that they stay in its cache

# Fields of a config that cannot change what a model computes when it reads text. Everything else counts.
IRRELEVANT = frozenset(
    [
        # names and versions
        *(
            "name_or_path",
            "transformers_version",
            "architectures",
            "auto_map",
            "transformers_weights",
            "tokenizer_class",
        ),
        # how numbers are kept and computed: rounding makes a model the same in any dtype
        *(
            "dtype",
            "torch_dtype",
            "attn_implementation",
            "experts_implementation",
            "use_cache",
            "chunk_size_feed_forward",
        ),
        *(
            "base_model_tp_plan",
            "base_model_pp_plan",
            "output_attentions",
            "output_hidden_states",
            "return_dict",
        ),
        # ids that only generation and text processing use
        *(
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "sep_token_id",
            "cls_token_id",
            "decoder_start_token_id",
        ),
        # classification, and training
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
        *(
            "initializer_range",
            "attention_dropout",
            "hidden_dropout",
            "attn_pdrop",
            "embd_pdrop",
            "resid_pdrop",
        ),
        "gradient_checkpointing",
    ]
)


def model_fingerprint(model: PreTrainedModel) -> str:
    """Of the config, but for IRRELEVANT fields, of every number of every weight, rounded to bfloat16, and of
    the active adapters.

    Rounding makes a model loaded in float32 and in bfloat16 the same model. Adapters (peft's) that are not
    active or are disabled do not count, nor what they are called; a base model is the same with and without a
    wrapper. Takes about as long as the model takes for a token, as both read all weights once.
    Errors: LowkeyError for weights without numbers, or of a kind that cannot be read.
    """
    wrapped: Any = model
    base = wrapped.get_base_model() if hasattr(model, "get_base_model") else model
    adapters = Adapters(base)
    parts = {
        "config": config_words(base.config).encode(),
        "adapters": repr(sorted(adapters.words())).encode(),
    }
    # tied weights are read once
    read: Read = {weights.place(p): {} for p in base.parameters() if not p.is_meta}
    # of a peft model that adds tokens of its own to every text
    prompts = getattr(wrapped, "prompt_encoder", {})
    for i, adapter in enumerate(sorted(wrapped.active_adapters) if prompts else ()):
        for name, value in prompts[adapter].state_dict().items() if adapter in prompts else ():
            parts[f"prompt {i} {name}"] = _digest(value, name, read)
    for name, value in weights.entries(base):
        plain = adapters.plain(name)
        if plain is not None:
            parts[f"weight {plain}"] = _digest(value, name, read)
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(name.encode() + b"\0" + hashlib.sha256(parts[name]).digest())
    return RULE_VERSION + digest.hexdigest()


def check_model(what: str, name: object, wanted: object, model: PreTrainedModel, remedy: str) -> None:
    """Refuse another model than that of the fingerprint `wanted`. Errors: LowkeyError."""
    found = model_fingerprint(model)
    if wanted == found:
        return
    if not str(wanted).startswith(RULE_VERSION):
        why = "was made by an earlier version of lowkey, whose fingerprints left out numbers that change outputs"
        raise LowkeyError(f"{what} {why}; {remedy}")
    raise LowkeyError(
        f"{what} was made for model {name!r} ({str(wanted)[:14]}), this one is {found[:14]}; {remedy}"
    )


class FillingModel:
    """Which model filled a cache: what it was when the first tokens came, and whether it has been another one
    at a later turn.
    """

    def __init__(self, model: PreTrainedModel, found: str | None = None) -> None:
        self.model, self.found, self.changed = weakref.ref(model), found, False
        self.trouble: LowkeyError | None = None
        self._marks = None if found is None else _marks(model)

    @torch.compiler.disable
    def look(self, tokens: int, first: bool) -> None:
        """So many tokens are about to be stored, the first ones perhaps. For these all weights are read;
        later, only where something seems to have changed, and not for single tokens, since a look takes
        longer than is fit for a step of decoding."""
        model = self.model()
        if model is None or (not first and (self.found is None or tokens < 2)):
            return
        if first:
            self.found, self.trouble, self.changed = None, None, False
            try:
                self.found = model_fingerprint(model)
            except LowkeyError as error:  # matters only to those who save the cache
                self.trouble = error
            self._marks = _marks(model)
        elif self._marks != (marks := _marks(model)):
            self._marks, self.changed = marks, self.changed or model_fingerprint(model) != self.found

    def name(self) -> str:
        """The fingerprint, for saving. Errors: LowkeyError when the model is gone or is not what filled the
        cache.
        """
        model = self.model()
        if model is None:
            raise LowkeyError("cache: its model is gone; save while the model is loaded")
        if self.trouble:
            raise self.trouble
        now = model_fingerprint(model)
        if self.changed or self.found not in (None, now):
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


def _marks(model: PreTrainedModel) -> tuple:
    """What differs after most changes to a model, at no cost to speak of: where weights are, how often they
    were written, adapters.
    """
    places = [(weights.place(p), 0 if p.is_inference() else p._version) for p in model.parameters()]
    adapters = Adapters(model)
    named = [adapters.active(wrapper) for wrapper in adapters.wrappers.values()]
    return hash(tuple(places)), config_words(model.config), repr(named), repr(sorted(adapters.words()))


def data_fingerprint(ids: Tensor) -> str:
    return hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()


# -- the config


def config_words(config: PreTrainedConfig) -> str:
    """What counts of a config, in a form that does not depend on how its numbers are written.

    A field at its class's default is left out, so that one that a later transformers adds makes no other
    model of the same checkpoint; layer types are written out, since some versions infer them.
    """
    text = config.get_text_config()
    return json.dumps([_told(config, text), list(families.layer_types(text))], sort_keys=True, default=str)


def _told(config: PreTrainedConfig, text: PreTrainedConfig) -> dict[str, Any]:
    usual = {} if config.has_no_defaults_at_init else type(config)().to_dict()
    found: dict[str, Any] = {"model_type": config.model_type}
    for name, value in config.to_dict().items():
        inner = getattr(config, name, None)
        if name in IRRELEVANT or name.startswith("_") or (name == "layer_types" and config is text):
            continue
        if isinstance(inner, PreTrainedConfig):
            found[name] = _told(inner, text)
        elif (plain := _plain(value)) != _plain(usual.get(name)):
            found[name] = plain
    return found


def _plain(value: Any) -> Any:
    """Lists for tuples, floats for integers, text for keys."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


# -- weights


def _digest(value: Any, name: str, read: Read) -> bytes:
    """Of one entry of a state dict, which need not be a tensor: packed and quantised weights come with types,
    tuples and text.
    """
    if isinstance(value, Tensor):
        return _tensor(value, name, read)
    if isinstance(value, list | tuple):
        return b"".join(hashlib.sha256(_digest(part, name, read)).digest() for part in value)
    if isinstance(value, dict):
        return b"".join(str(key).encode() + _digest(value[key], name, read) for key in sorted(value, key=str))
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype):
        return repr(value).encode()
    raise LowkeyError(
        f"model: weight {name} is a {type(value).__name__}, which cannot be read; use the model without "
        "quantisation"
    )


def _tensor(t: Tensor, name: str, read: Read) -> bytes:
    try:
        return _numbers(t, name, read)
    except (
        AttributeError,
        NotImplementedError,
        RuntimeError,
        TypeError,
    ) as error:  # tensors of other libraries may do anything
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:120].rstrip(". ")
        raise LowkeyError(
            f"model: weight {name} cannot be read ({why}); use the model without quantisation"
        ) from None


@torch.no_grad()
def _numbers(t: Tensor, name: str, read: Read) -> bytes:
    if t.is_meta:
        raise weights.without_numbers(name)
    if hasattr(t, "full_tensor"):  # one that is spread over devices
        t = t.full_tensor()
    if t.is_quantized:
        return _tensor(t.int_repr(), name, {}) + _tensor(t.dequantize(), name, {})
    if hasattr(t, "__tensor_flatten__"):  # a packed weight made of several tensors
        return b"".join(
            part.encode() + _tensor(getattr(t, part), name, {}) for part in t.__tensor_flatten__()[0]
        )
    t = t.detach().as_subclass(Tensor)
    # what is offloaded has no place of its own
    key, known = (t.dtype, t.shape, t.stride()), read.get(t.data_ptr(), {})
    if key not in known:
        known[key] = repr(tuple(t.shape)).encode() + tensor_checksum(t)
    return known[key]


def tensor_checksum(t: Tensor) -> bytes:
    """Of every number of a tensor, in bfloat16 where it is floating-point: the sums, modulo 2^64, of the rows
    and of the columns of its bits as words of 64, laid out in rows of WORDS_PER_ROW. No single change leaves them as
    they were, nor does a move of numbers within a row or of rows. Exact, so the same on every device."""
    flat = t.contiguous().flatten()
    size = WORDS_PER_ROW * 8 // (2 if _rounds(flat) else flat.element_size())
    whole = flat.numel() // size * size
    columns, rows = torch.zeros(WORDS_PER_ROW, dtype=torch.int64, device=t.device), []
    for part in (
        flat[:whole].split(max(size, ROUNDED_AT_ONCE if t.device.type == "cpu" else 2**8 * ROUNDED_AT_ONCE))
        if whole
        else ()
    ):
        words = _bits(part).view(torch.int64).view(-1, WORDS_PER_ROW)
        columns += words.sum(0)
        rows.append(words.sum(1))
    sums = torch.cat([columns, *rows]).cpu().numpy().tobytes() if rows else b""
    return sums + _bits(flat[whole:]).view(torch.uint8).cpu().numpy().tobytes()


def _bits(part: Tensor) -> Tensor:
    """As a tensor that may be read as integers: a copy where its own place in memory does not allow that."""
    part = (
        part.to(torch.bfloat16) if _rounds(part) else torch.view_as_real(part) if part.is_complex() else part
    )
    return part.clone() if part.storage_offset() * part.element_size() % 8 else part


def _rounds(t: Tensor) -> bool:
    """Whether these are numbers that a model may be loaded with in another dtype."""
    return t.is_floating_point() and t.element_size() >= 2

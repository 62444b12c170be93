"""What a pretraining run is made of, as dataclasses and as a TOML file of three tables: [model], [data], [training]."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lowkey.types import LowkeyError

CHOICES = {"schedule": ("wsd", "cosine", "linear"), "optimizer": ("adamw", "muon"), "precision": ("bf16", "fp32")}
LEAST = {"tokens": 1, "batch_tokens": 1, "length": 2, "save_every": 1, "evaluate_every": 1, "log_every": 1}
BELOW = {"held_out": 0.9, "decay": 1 + 1e-9, "min_lr": 1.0, "betas": 1.0}  # other fractions are only bounded from below, by 0
LONGEST = 2**63  # what a whole number is below
LIKE = {"log_with": ("tensorboard",)}  # an example, where the default is none


@dataclass(frozen=True)
class Data:
    """Which text, and how it becomes tokens.

    path: a .txt (one document), .jsonl or .parquet file (one document per record), a folder of such files, or the id of a dataset for the
    `datasets` library, which is streamed; "" is the embedded calibration text. text_field: of .jsonl, .parquet and datasets. name, split,
    options: of `datasets.load_dataset`. tokenizer: a folder, a Hub id or `tiny`. vocab_size: not 0 trains a byte-level BPE of this size on
    the data instead (on the held-out part too; the model never sees that). held_out: share of the tokens kept for validation, as whole
    documents (drawn at random, the same for every seed); where every document is larger than that, the end of the last one. 0: no
    validation. max_tokens: stop reading after the document that passes it; 0 reads all. cache: a folder for token files that several runs
    may share; "" keeps them in the run's own folder.
    """

    path: str = ""
    text_field: str = "text"
    name: str = ""
    split: str = "train"
    options: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str = "tiny"
    vocab_size: int = 0
    held_out: float = 0.05
    max_tokens: int = 0
    cache: str = ""

    def __post_init__(self) -> None:
        _check(self, "data")
        if self.vocab_size and self.vocab_size < 260:
            raise LowkeyError(f"data.vocab_size {self.vocab_size}: 256 bytes and 2 special tokens come first; give at least 260, or 0")
        if self.vocab_size and self.tokenizer != "tiny":
            raise LowkeyError(
                f"data.vocab_size {self.vocab_size}: trains a tokenizer, and data.tokenizer {self.tokenizer!r} names one; drop one"
            )


@dataclass(frozen=True)
class Training:
    """How to train.

    tokens: in all. batch_tokens: per optimizer step, over all devices and accumulation. length: tokens per row. micro_batch: rows per
    forward and device; 0: all of a device's rows at once. lr: peak. schedule: `wsd` (a constant between warm-up and a linear decay over
    the last share `decay` of all steps; decay 0 stays constant), `cosine` or `linear`. warmup: below 1 a share of all steps, from 1 on a
    number of steps. min_lr: where the decay ends, as a share of the peak. optimizer: `adamw` or `muon` (see `optim.split`). betas: of
    AdamW. weight_decay: of hidden matrices only. clip: largest global norm of the gradient; 0: no clipping. precision: `bf16` is autocast
    with weights in fp32. seed: of the initial weights, the order of the data, and dropout. compile: through torch.compile. save_every,
    evaluate_every, log_every: steps. evaluate_tokens: held-out tokens used, 0 for all. log_with: also `tensorboard`, `trackio`, `wandb`,
    ... (accelerate's trackers). stop_on_divergence: raise when the loss diverges (see `health`); otherwise go on as long as it is finite
    and say so in the result.
    """

    tokens: int = 10_000_000
    batch_tokens: int = 8192
    length: int = 256
    micro_batch: int = 0
    lr: float = 3e-3
    schedule: str = "wsd"
    warmup: float = 0.05
    decay: float = 0.2
    min_lr: float = 0.0
    optimizer: str = "adamw"
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    precision: str = "bf16"
    seed: int = 0
    compile: bool = False
    gradient_checkpointing: bool = False
    save_every: int = 500
    evaluate_every: int = 250
    evaluate_tokens: int = 0
    log_every: int = 10
    log_with: tuple[str, ...] = ()
    stop_on_divergence: bool = True

    def __post_init__(self) -> None:
        _check(self, "training")
        if len(self.betas) != 2:
            raise LowkeyError(f"training.betas {list(self.betas)}: are two numbers, like [0.9, 0.95]")
        if self.lr <= 0:
            raise LowkeyError(f"training.lr {self.lr:g}: must be above 0, like 3e-3")
        if self.batch_tokens % self.length:
            raise LowkeyError(f"training.batch_tokens {self.batch_tokens}: must be a multiple of length {self.length}")
        if self.tokens < self.batch_tokens:
            raise LowkeyError(f"training.tokens {self.tokens}: are fewer than batch_tokens {self.batch_tokens}; give at least one step's")
        if self.warmup_steps + (self.decay_steps if self.schedule == "wsd" else 0) > self.steps:
            raise LowkeyError(
                f"training.warmup {self.warmup:g}: with the decay it is longer than all {self.steps} steps; give less of either"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps: whole batches in `tokens`."""
        return self.tokens // self.batch_tokens

    @property
    def rows(self) -> int:
        """Rows per optimizer step."""
        return self.batch_tokens // self.length

    @property
    def warmup_steps(self) -> int:
        return round(self.warmup * self.steps) if self.warmup < 1 else round(self.warmup)

    @property
    def decay_steps(self) -> int:
        return round(self.decay * self.steps)


@dataclass(frozen=True)
class Recipe:
    """model: fields of the config class (see `models.build`), or `path`, a model to train further, whose tokenizer is used unless [data]
    names another; may stay empty when a model is given to `pretrain`."""

    model: Mapping[str, Any] = field(default_factory=dict)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)

    @classmethod
    def read(cls, path: str | Path, settings: Sequence[str] = ()) -> Recipe:
        """A TOML file; settings like `training.lr=1e-3` replace or add single fields. Errors: LowkeyError."""
        try:
            tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise LowkeyError(f"recipe {str(path)!r}: no such file; give a TOML file like recipes/lrkv-tiny.toml") from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise LowkeyError(f"recipe {str(path)!r}: cannot be read ({error}); give a TOML file") from None
        for setting in settings:
            _set(tables, setting)
        return cls.of(tables)

    @classmethod
    def of(cls, tables: Mapping[str, Any]) -> Recipe:
        """Out of plain tables. Errors: LowkeyError for an unknown field or a value that cannot be."""
        for name, table in tables.items():
            _known(name, ("model", "data", "training"), "table", "recipe")
            if not isinstance(table, Mapping):
                raise LowkeyError(f"recipe {name} {table!r}: is a table; write [{name}] and its fields below")
        model, given = dict(tables.get("model", {})), dict(tables.get("data", {}))
        if "path" in model:
            if not isinstance(model["path"], str):
                raise LowkeyError(f"model.path {model['path']!r}: must be text in quotes, a folder or a Hub id")
            if given.get("vocab_size"):
                raise LowkeyError(f"data.vocab_size {given['vocab_size']}: the model of model.path has its own tokenizer; leave it out")
            given.setdefault("tokenizer", model["path"])
        return cls(model, _of(Data, "data", {"data": given}), _of(Training, "training", tables))

    def describe(self) -> dict[str, Any]:
        """Plain tables, as they come back from a file."""
        return json.loads(json.dumps({"model": dict(self.model), "data": asdict(self.data), "training": asdict(self.training)}))

    def toml(self) -> str:
        """A file that `read` takes back."""
        tables = self.describe()
        return (
            "\n\n".join("\n".join([f"[{name}]", *(f"{k} = {_written(v)}" for k, v in table.items())]) for name, table in tables.items())
            + "\n"
        )


def nearest(name: str, known: Sequence[str]) -> str:
    """The remedy for a name that is not known."""
    near = get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"


def _known(name: str, known: Sequence[str], what: str, where: str) -> None:
    if name not in known:
        raise LowkeyError(f"{what} {name!r} of {where} is unknown; {nearest(name, known)}")


def _of(kind: Any, name: str, tables: Mapping[str, Any]) -> Any:
    given, known = tables.get(name, {}), [f.name for f in fields(kind)]
    for key in given:
        _known(key, known, "field", f"[{name}]")
    return kind(**given)


def _check(table: Any, name: str) -> None:
    """Every field of the type of its default and in range; whole numbers may be written like 1e7."""
    for f in fields(table):
        default = {} if f.name == "options" else f.default
        value = _typed(f"{name}.{f.name}", getattr(table, f.name), default, LIKE.get(f.name, default))
        object.__setattr__(table, f.name, value)
        if f.name in CHOICES and value not in CHOICES[f.name]:
            raise LowkeyError(f"{name}.{f.name} {value!r} is unknown; {nearest(value, CHOICES[f.name])}")
        for number in value if f.name == "betas" else [value]:
            if isinstance(number, int | float):
                _in_range(f"{name}.{f.name}", number, LEAST.get(f.name, 0), BELOW.get(f.name, LONGEST if type(number) is int else None))


def _in_range(what: str, number: float, low: float, high: float | None) -> None:
    if not number >= low or (high is not None and not number < high) or number == float("inf"):
        rule = f"at least {low}" + ("" if high is None else f" and below {high:.12g}")
        raise LowkeyError(f"{what} {number:g}: must be {rule}; leave it out for the default")


def _typed(what: str, value: Any, default: Any, like: Any) -> Any:
    kind = type(default)
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    if kind is tuple and isinstance(value, list | tuple):
        return tuple(_typed(what, v, default[0] if default else "", like[0]) for v in value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = {int: "a whole number", float: "a number", str: "text in quotes", bool: "true or false", tuple: "a list", dict: "a table"}
        raise LowkeyError(f"{what} {value!r}: must be {names[kind]}, like {_written(like)}")
    return value


def _set(tables: dict[str, Any], setting: str) -> None:
    place, equals, written = setting.partition("=")
    table, dot, key = place.strip().partition(".")
    if not (equals and dot and key):
        raise LowkeyError(f"setting {setting!r}: write it as table.field=value, like training.lr=1e-3")
    try:
        value = tomllib.loads(f"value = {written}")["value"]
    except tomllib.TOMLDecodeError:
        value = written.strip()  # a bare word is text
    if isinstance(tables.setdefault(table, {}), dict):
        tables[table][key] = value


def _written(value: Any) -> str:
    """A value as TOML; JSON's text, numbers and lists are TOML too."""
    if isinstance(value, Mapping):
        inside = ", ".join(f"{json.dumps(k)} = {_written(v)}" for k, v in value.items())
        return f"{{{inside}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, value))}]"
    return json.dumps(value)

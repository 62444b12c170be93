"""What a pretraining run is made of, as dataclasses and as a TOML file with the tables [model], [data] and
[training].
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lowkey.core import files
from lowkey.core.errors import LowkeyError
from lowkey.core.options import check_options, nearest_name, option

EXAMPLE = "give a TOML file like recipes/lrkv-tiny.toml"


@dataclass(frozen=True)
class Data:
    """Which text, and how it becomes tokens.

    Args:
        path: a .txt file (one document), a .jsonl or .parquet file (one document per record), a folder of
            such files, or the id of a dataset for the `datasets` library, which is streamed. "" is the
            embedded calibration text.
        text_field: field of a record that holds its text.
        name: configuration of a dataset.
        split: split of a dataset.
        options: further options of `datasets.load_dataset`.
        tokenizer: a folder, a Hub id or `tiny`.
        vocab_size: train a byte-level BPE of this size on the data instead (on the held-out part too, which
            the model never sees); 0 uses `tokenizer`.
        held_out: share of the tokens for validation: whole documents, drawn at random, the same for every
            seed; where every document is larger than that, the end of the last one. 0 for no validation.
        max_tokens: stop reading after the document that exceeds this number; 0 reads everything.
        cache: folder for token files that several runs may share; "" keeps them in the run's own folder.
    """

    path: str = option("", any_text=True)
    text_field: str = option("text", any_text=True)
    name: str = option("", any_text=True)
    split: str = option("train", any_text=True)
    options: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str = option("tiny", any_text=True)
    vocab_size: int = option(0, at_least=0, at_most=2**24)
    held_out: float = option(0.05, at_least=0, below=0.9)
    max_tokens: int = option(0, at_least=0)
    cache: str = option("", any_text=True)

    def __post_init__(self) -> None:
        check_options(self, "data.")
        if self.vocab_size and self.vocab_size < 260:
            raise LowkeyError(
                f"data.vocab_size {self.vocab_size}: 256 bytes and 2 special tokens come first; give at "
                "least 260, or 0"
            )
        if self.vocab_size and self.tokenizer != "tiny":
            raise LowkeyError(
                f"data.vocab_size {self.vocab_size}: trains a tokenizer, and data.tokenizer "
                f"{self.tokenizer!r} names one; drop one"
            )


@dataclass(frozen=True)
class Training:
    """How to train.

    Args:
        tokens: number of tokens in all.
        batch_tokens: tokens per optimizer step, over all devices and accumulation.
        length: tokens per row.
        micro_batch: rows per forward pass and device; 0 for all of a device's rows at once.
        lr: peak learning rate.
        schedule: `wsd` (constant between warm-up and a linear decay), `cosine` or `linear`.
        warmup: length of the warm-up: below 1 a share of all steps, else a number of steps.
        decay: share of all steps in which `wsd` decays; 0 stays constant.
        min_lr: where the decay ends, as a share of the peak.
        optimizer: `adamw` or `muon` (see `optim.split_parameters`).
        betas: betas of AdamW.
        lr_factors: factors on the learning rate, by parts of parameter names (* and ? stand for any
            characters); all other parameters have 1.
        weight_decay: weight decay of hidden matrices.
        clip: largest global norm of the gradient; 0 for no clipping.
        precision: `bf16` (autocast, with weights in fp32) or `fp32`.
        seed: seed of the initial weights, the order of the data, and dropout.
        compile: run the model through torch.compile.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        save_every: steps between checkpoints.
        evaluate_every: steps between validations.
        evaluate_tokens: held-out tokens that a validation reads; 0 for all.
        log_every: steps between lines of the log.
        log_with: further trackers of accelerate: `tensorboard`, `trackio`, `wandb`, ...
        stop_on_divergence: raise when the loss diverges (see `health`); otherwise train on as long as it is
            finite, and say so in the result.
    """

    tokens: int = option(10_000_000, at_least=1)
    batch_tokens: int = option(8192, at_least=1, at_most=2**40)
    length: int = option(256, at_least=2, at_most=2**24)
    micro_batch: int = option(0, at_least=0, at_most=2**24)
    lr: float = option(3e-3, above=0)
    schedule: str = option("wsd", choices=("wsd", "cosine", "linear"))
    warmup: float = option(0.05, at_least=0)
    decay: float = option(0.2, at_least=0, at_most=1)
    min_lr: float = option(0.0, at_least=0, below=1)
    optimizer: str = option("adamw", choices=("adamw", "muon"))
    betas: tuple[float, float] = option((0.9, 0.95), at_least=0, below=1)
    lr_factors: Mapping[str, float] = option(default_factory=dict, at_least=0, at_most=1000)
    weight_decay: float = option(0.1, at_least=0, at_most=1000)
    clip: float = option(1.0, at_least=0)
    precision: str = option("bf16", choices=("bf16", "fp32"))
    seed: int = option(0, at_least=0)
    compile: bool = False
    gradient_checkpointing: bool = False
    save_every: int = option(500, at_least=1)
    evaluate_every: int = option(250, at_least=1)
    evaluate_tokens: int = option(0, at_least=0)
    log_every: int = option(10, at_least=1)
    log_with: tuple[str, ...] = option((), any_text=True)
    stop_on_divergence: bool = True

    def __post_init__(self) -> None:
        check_options(self, "training.")
        if self.batch_tokens % self.length:
            raise LowkeyError(
                f"training.batch_tokens {self.batch_tokens}: must be a multiple of length {self.length}"
            )
        if self.tokens < self.batch_tokens:
            raise LowkeyError(
                f"training.tokens {self.tokens}: are fewer than batch_tokens {self.batch_tokens}; give at "
                "least one step's"
            )
        if self.warmup_steps + (self.decay_steps if self.schedule == "wsd" else 0) > self.steps:
            raise LowkeyError(
                f"training.warmup {self.warmup:g}: with the decay it is longer than all {self.steps} steps; "
                "give less of either"
            )

    @property
    def steps(self) -> int:
        """Number of optimizer steps: whole batches in `tokens`."""
        return self.tokens // self.batch_tokens

    @property
    def rows(self) -> int:
        """Rows per optimizer step."""
        return self.batch_tokens // self.length

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up."""
        return round(self.warmup * self.steps) if self.warmup < 1 else round(self.warmup)

    @property
    def decay_steps(self) -> int:
        """Steps of the decay."""
        return round(self.decay * self.steps)


@dataclass(frozen=True)
class Recipe:
    """A pretraining run.

    Args:
        model: fields of the config class (see `models.build`); or `path`, a model to train further, whose
            tokenizer is used unless [data] names another. May be empty if `pretrain` is given a model.
        data: which text.
        training: how to train.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)

    @classmethod
    def read(cls, path: str | Path, settings: Sequence[str] = ()) -> Recipe:
        """Read a TOML file.

        Args:
            path: the file.
            settings: replace or add single fields, like `training.lr=1e-3`.

        Raises:
            LowkeyError: a file that cannot be read, an unknown field, or a value that cannot be.
        """
        try:
            tables = files.parse_toml(
                files.read_bytes(Path(path), "recipe", files.MOST_TOML, EXAMPLE).decode()
            )
        except LowkeyError:
            raise
        except ValueError as error:
            raise LowkeyError(
                f"recipe {str(path)!r}: cannot be read ({error!s:.200}); give a TOML file"
            ) from None
        for setting in settings:
            _set(tables, setting)
        return cls.of(tables)

    @classmethod
    def of(cls, tables: Mapping[str, Any]) -> Recipe:
        """The recipe of plain tables.

        Raises:
            LowkeyError: an unknown field, or a value that cannot be.
        """
        for name, table in tables.items():
            _known(name, ("model", "data", "training"), "table", "recipe")
            if not isinstance(table, Mapping):
                raise LowkeyError(f"recipe {name} {table!r}: is a table; write [{name}] and its fields below")
        model, given = dict(tables.get("model", {})), dict(tables.get("data", {}))
        if "path" in model:
            if not isinstance(model["path"], str):
                raise LowkeyError(
                    f"model.path {model['path']!r}: must be text in quotes, a folder or a Hub id"
                )
            if given.get("vocab_size"):
                raise LowkeyError(
                    f"data.vocab_size {given['vocab_size']}: the model of model.path has its own tokenizer; "
                    "leave it out"
                )
            given.setdefault("tokenizer", model["path"])
        return cls(model, _of(Data, "data", {"data": given}), _of(Training, "training", tables))

    def describe(self) -> dict[str, Any]:
        """Plain tables, as they come back from a file."""
        return json.loads(
            json.dumps(
                {"model": dict(self.model), "data": asdict(self.data), "training": asdict(self.training)}
            )
        )

    def toml(self) -> str:
        """A file that `read` takes back."""
        tables = self.describe()
        return (
            "\n\n".join(
                "\n".join([f"[{name}]", *(f"{k} = {_written(v)}" for k, v in table.items())])
                for name, table in tables.items()
            )
            + "\n"
        )


def _known(name: str, known: Sequence[str], what: str, where: str) -> None:
    """Check a name.

    Args:
        name: the name.
        known: names that there are.
        what: what the name is of, for the message.
        where: where it stands, for the message.

    Raises:
        LowkeyError: it is not among them; the message has the nearest one.
    """
    if name not in known:
        raise LowkeyError(f"{what} {name!r} of {where} is unknown; {nearest_name(name, known)}")


def _of(kind: Any, name: str, tables: Mapping[str, Any]) -> Any:
    """A dataclass of one of the tables."""
    given, known = tables.get(name, {}), [f.name for f in fields(kind)]
    for key in given:
        _known(key, known, "field", f"[{name}]")
    return kind(**given)


def _set(tables: dict[str, Any], setting: str) -> None:
    """Put one setting (`table.field=value`) into tables."""
    place, equals, written = setting.partition("=")
    table, dot, key = place.strip().partition(".")
    if not (equals and dot and key):
        raise LowkeyError(f"setting {setting!r}: write it as table.field=value, like training.lr=1e-3")
    try:
        value = files.parse_toml(f"value = {written}")["value"]
    except tomllib.TOMLDecodeError:
        value = written.strip()  # a bare word is text
    except ValueError as error:
        raise LowkeyError(f"setting {setting!r:.80}: {error}; give a value like 1e-3") from None
    if isinstance(tables.setdefault(table, {}), dict):
        tables[table][key] = value


def _written(value: Any) -> str:
    """A value as TOML. JSON's text, numbers and lists are TOML too."""
    if isinstance(value, Mapping):
        inside = ", ".join(f"{json.dumps(k)} = {_written(v)}" for k, v in value.items())
        return f"{{{inside}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, value))}]"
    return json.dumps(value)

"""Measure what a conversion costs at the start, in nats, and save it as a folder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.attention import LowkeyForCausalLM, layer_costs, model_bytes_per_token, register
from lowkey.conversion import source
from lowkey.conversion.exactness import Exactness, exactness
from lowkey.core import files, text
from lowkey.core.progress import Progress, silent
from lowkey.core.types import device_of
from lowkey.models import families
from lowkey.models.fingerprint import model_fingerprint
from lowkey.plan.plan import versions
from lowkey.version import __version__


@dataclass(frozen=True)
class Loss:
    """Cross-entropy over a number of tokens.

    Args:
        nats: mean per token, in nats.
        tokens: number of tokens.
    """

    nats: float
    tokens: int


def held_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: str | None, context: int, windows: int
) -> Tensor:
    """Windows of text that a loss is measured on.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        corpus: a text; None for the embedded evaluation text.
        context: tokens of a window.
        windows: number of windows at most.

    Returns:
        Ids (n, t).
    """
    ids = text.encode(tokenizer, text.embedded_text("evaluation") if corpus is None else corpus, model)
    length = families.readable_length(model, context)
    return text.windows(ids, tokenizer, length, "data", least=1)[:windows]


@torch.no_grad()
def starting_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: str | None = None,
    *,
    context: int = 512,
    windows: int = 32,
    batch: int = 4,
    progress: Progress = silent,
) -> Loss:
    """Cross-entropy of the source or of what was made of it, in the model's dtype with logits in fp32.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        corpus: a text; None for the embedded evaluation text.
        context: tokens of a window.
        windows: number of windows at most.
        batch: windows that are read at a time.
        progress: shows progress over batches.

    Raises:
        LowkeyError: the text is shorter than a window.
    """
    rows = held_out(model, tokenizer, corpus, context, windows)
    total = 0.0
    for ids in progress(rows.to(device_of(model)).split(batch), "starting loss", -(-len(rows) // batch)):
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        total += float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").double())
    tokens = rows[:, 1:].numel()
    return Loss(total / tokens, tokens)


def conversion_record(
    model: PreTrainedModel, made: LowkeyForCausalLM, before: Loss, after: Loss, how: dict[str, Any]
) -> dict[str, Any]:
    """What convert.json holds.

    Args:
        model: the source.
        made: the new model.
        before: loss of the source.
        after: loss of the new model.
        how: fields and options that were given.
    """
    start = exactness(model, made.config)
    return {
        "format": 1,
        "source": model.config._name_or_path,
        "source_sha256": model_fingerprint(model),
        "attention": made.config.attention,
        **how,
        # With `lost` and `exact_with`, what `Exactness` is made of again for the card.
        "exact": start.exact,
        "lost": start.why,
        "exact_with": None if start.instead is None else dict(start.instead),
        "dtype": str(made.dtype).removeprefix("torch."),
        "loss": {
            "source": _finite(before.nats),
            "converted": _finite(after.nats),
            "unit": "nats per token",
            "tokens": before.tokens,
        },
        "parameters": {"source": _parameters(model), "converted": _parameters(made)},
        "cache_bytes_per_token": {
            "source": source.full_bytes_per_token(model),
            "converted": model_bytes_per_token(layer_costs(made.config), made.dtype.itemsize),
        },
        "versions": versions(),
    }


def _finite(value: float) -> float | None:
    """A number, or None for what JSON cannot hold."""
    return value if math.isfinite(value) else None


def _parameters(model: PreTrainedModel) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def save_conversion(
    made: LowkeyForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, Any],
    path: str | Path,
    force: bool = False,
) -> Path:
    """Write the model with the code that runs it, its tokenizer, convert.json and a model card as one folder,
    all of it or nothing.

    Args:
        made: the new model.
        tokenizer: its tokenizer.
        record: what `conversion_record` gave.
        path: the folder.
        force: replace what is there.

    Returns:
        The folder.

    Raises:
        LowkeyError: `path` holds files and `force` is False, or it cannot be written.
    """
    folder = Path(path)
    files.check_folder(folder, force)
    register()
    with files.replacing_folder(folder) as temporary:
        made.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        files.write_json(temporary / "convert.json", record, "convert")
        files.write_text(temporary / "README.md", conversion_card(record))
    return folder


def conversion_card(record: dict[str, Any]) -> str:
    """The model card, in Markdown."""
    loss, cache, name = record["loss"], record["cache_bytes_per_token"], record["source"] or "a model"
    fields = ", ".join(f"{k} {v}" for k, v in record.get("fields", {}).items())
    start = Exactness(record["exact"], record["lost"], record["exact_with"])
    share = f"{100 * cache['converted'] / cache['source']:.1f} %"
    form = record["dtype"] + (f" ({fields})" if fields else "")
    return f"""---
library_name: transformers
tags: [kv-cache-compression]
---
# {name} with attention `{record["attention"]}`

Its cache takes {cache["converted"]} bytes per token instead of {cache["source"]} ({share}) in {form}.
Nothing was trained yet: cross-entropy on {loss["tokens"]} tokens of held-out text is
{_nats(loss["converted"])} nats per token, {_nats(loss["source"])} before. The start is {start}.
Train it further with `lowkey pretrain`. convert.json says how it was made.

```python
import lowkey.attention
from transformers import AutoModelForCausalLM

lowkey.attention.register()  # or trust_remote_code=True: the code lies beside the weights
model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
```

Made by lowkey {__version__}. The licence of the original weights applies.
"""


def _nats(value: float | None) -> str:
    """A loss in words."""
    return "no finite number of" if value is None else f"{value:.4f}"

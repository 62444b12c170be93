"""What of a model is trained: some linear maps in full, others through LoRA adapters; all of it can be left
out, and merged.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lowkey.core.options import shown
from lowkey.core.types import LowkeyError
from lowkey.models import families
from lowkey.models.attention_interface import attach


class FullLinear(nn.Module):
    """A linear map that is trained in full, in fp32 or wider, beside the frozen original, which answers where
    `active` is off.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.active = base, True
        self.weight, self.bias = (
            None if p is None else nn.Parameter(_wide(p)) for p in (base.weight, base.bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return self.base(x)
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The original with what was learned."""
        for mine, own in ((self.weight, self.base.weight), (self.bias, self.base.bias)):
            if own is not None:
                own.copy_(mine)
        return self.base


@dataclass(frozen=True)
class TrainableModel:
    """A copy of a model, frozen but for what is trained. adapters: the same as peft sees it, or None where
    nothing has an adapter.
    wholes: maps trained in full, by name."""

    model: PreTrainedModel
    adapters: Any
    wholes: dict[str, FullLinear]

    @classmethod
    def of(
        cls, model: PreTrainedModel, lora: Sequence[str], full: Sequence[str], **adapter: Any
    ) -> TrainableModel:
        """lora, full: patterns of linear maps as their layer names them, like `self_attn.*`; what both name
        is trained in full.
        adapter: fields of peft's LoraConfig. In eval mode but for the adapters' dropout. Errors: as
        `check_trainable`."""
        check_trainable(model, lora, full)
        twin = attach(copy.deepcopy(model)).eval().requires_grad_(False)
        whole = _named(twin, full)
        names = [name for name in _named(twin, lora) if name not in whole]
        adapters = _lora(twin, names, adapter) if names else None
        wholes = {name: FullLinear(twin.get_submodule(name)) for name in whole}  # type: ignore[arg-type]
        for name, module in wholes.items():
            twin.set_submodule(name, module)
        return cls(twin, adapters, wholes)

    def parameters(self) -> dict[str, Tensor]:
        """All that is trained, by name."""
        root = self.adapters or self.model
        return {name: p for name, p in root.named_parameters() if p.requires_grad}

    @contextmanager
    def original(self) -> Iterator[PreTrainedModel]:
        """The model as it was, without gradients."""
        for module in self.wholes.values():
            module.active = False
        try:
            with torch.no_grad():
                if self.adapters is None:
                    yield self.model
                else:
                    with self.adapters.disable_adapter():
                        yield self.model
        finally:
            for module in self.wholes.values():
                module.active = True

    def merged(self) -> PreTrainedModel:
        """A plain model with all that was learned; nothing else of this is usable afterwards."""
        for name, module in self.wholes.items():
            self.model.set_submodule(name, module.merged())
        return self.model if self.adapters is None else self.adapters.merge_and_unload()


def peft() -> Any:
    """Errors: LowkeyError where it is not installed."""
    try:
        import peft
    except ImportError:
        raise LowkeyError("peft is not installed: pip install 'lowkey[train]'") from None
    return peft


def _lora(model: PreTrainedModel, names: list[str], fields: dict[str, Any]) -> Any:
    config = peft().LoraConfig(target_modules=names, bias="none", **fields)
    adapted = peft().get_peft_model(model, config, autocast_adapter_dtype=True).eval()
    for name, module in adapted.named_modules():
        if name.endswith(".lora_dropout"):
            module.train()
    return adapted


def check_trainable(model: PreTrainedModel, lora: Sequence[str], full: Sequence[str]) -> None:
    """Errors: LowkeyError for a pattern that names nothing, and where there is no pattern at all."""
    known = dict.fromkeys(_inside(model).values())
    for what, patterns in (("lora", lora), ("full", full)):
        for pattern in patterns:
            if not any(fnmatchcase(own, pattern) for own in known):
                raise LowkeyError(
                    f"{what} {shown(pattern)}: names no linear map of a layer; there are {', '.join(known)}"
                )
    if not (lora or full):
        raise LowkeyError(
            "lora () and full (): there is nothing to train; name some linear maps, like 'self_attn.*', in "
            "either"
        )


def _inside(model: PreTrainedModel) -> dict[str, str]:
    """Linear maps of the decoder layers: by full name, the name within the layer."""
    names = {m: name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    blocks = families.decoder_layers(model)
    return {names[m]: own for block in blocks for own, m in block.named_modules() if isinstance(m, nn.Linear)}


def _named(model: PreTrainedModel, patterns: Sequence[str]) -> list[str]:
    """Full names of the linear maps that any of the patterns names."""
    return [
        name for name, own in _inside(model).items() if any(fnmatchcase(own, pattern) for pattern in patterns)
    ]


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True)

"""What of a model is trained: some linear layers in full, others through LoRA adapters."""

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
    """A linear layer that is trained in full, beside its frozen original.

    The trained weights are in fp32 or wider, since small steps would be lost in 16 bits.

    Attributes:
        base: the original.
        active: whether the trained weights answer; otherwise the original does.
        weight, bias: what is trained.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.active = base, True
        self.weight, self.bias = (
            None if p is None else nn.Parameter(_widened(p)) for p in (base.weight, base.bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b, in x's dtype."""
        if not self.active:
            return self.base(x)
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return the original with the trained weights in its own dtype."""
        for trained, original in ((self.weight, self.base.weight), (self.bias, self.base.bias)):
            # `copy_` rounds to the dtype of the original.
            if original is not None:
                original.copy_(trained)
        return self.base


@dataclass(frozen=True)
class TrainableModel:
    """A copy of a model, frozen but for what is trained.

    Args:
        model: the copy, attached, in eval mode but for the adapters' dropout.
        adapters: the same model as peft wraps it; None if nothing has an adapter.
        full: the layers that are trained in full, by full name.
    """

    model: PreTrainedModel
    adapters: Any
    full: dict[str, FullLinear]

    @classmethod
    def of(
        cls, model: PreTrainedModel, lora: Sequence[str], full: Sequence[str], **adapter: Any
    ) -> TrainableModel:
        """Copy a model and make linear layers of its decoder layers trainable.

        Args:
            model: stays as it is.
            lora: patterns of the names of linear layers within a decoder layer, like `self_attn.*`, that get
                a LoRA adapter.
            full: patterns of those that are trained in full; what both name is trained in full.
            adapter: fields of peft's LoraConfig.

        Raises:
            LowkeyError: as `check_trainable`.
        """
        check_trainable(model, lora, full)
        # The model need not be attached, and stays as it is, so the copy is attached.
        twin = attach(copy.deepcopy(model)).eval().requires_grad_(False)
        full_names = _matching(twin, full)
        lora_names = [name for name in _matching(twin, lora) if name not in full_names]
        adapters = _with_adapters(twin, lora_names, adapter) if lora_names else None
        linear: dict[str, Any] = dict(twin.named_modules())
        layers = {name: FullLinear(linear[name]) for name in full_names}
        # After peft, which looks for plain linear layers by name.
        for name, module in layers.items():
            twin.set_submodule(name, module)
        return cls(twin, adapters, layers)

    def parameters(self) -> dict[str, Tensor]:
        """Return all that is trained, by name."""
        # These names are in saved work; with adapters they begin at peft's wrapper.
        root = self.adapters or self.model
        return {name: p for name, p in root.named_parameters() if p.requires_grad}

    @contextmanager
    def original(self) -> Iterator[PreTrainedModel]:
        """Give the model as it was before training, without gradients, inside a `with` block."""
        for module in self.full.values():
            module.active = False
        try:
            with torch.no_grad():
                if self.adapters is None:
                    yield self.model
                else:
                    with self.adapters.disable_adapter():
                        yield self.model
        finally:
            for module in self.full.values():
                module.active = True

    def merged(self) -> PreTrainedModel:
        """Return a plain model with all that was learned; this object cannot be used afterwards."""
        for name, module in self.full.items():
            self.model.set_submodule(name, module.merged())
        return self.model if self.adapters is None else self.adapters.merge_and_unload()


def import_peft() -> Any:
    """Return the module peft.

    Raises:
        LowkeyError: if it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise LowkeyError("peft is not installed: pip install 'lowkey[train]'") from None
    return peft


def _with_adapters(model: PreTrainedModel, names: list[str], fields: dict[str, Any]) -> Any:
    """Return the model with adapters at these linear layers, only their dropout in training mode."""
    peft = import_peft()
    config = peft.LoraConfig(target_modules=names, bias="none", **fields)
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=True).eval()
    # `eval` turned the adapters' dropout off together with the model's own.
    for name, module in adapted.named_modules():
        if name.endswith(".lora_dropout"):
            module.train()
    return adapted


def check_trainable(model: PreTrainedModel, lora: Sequence[str], full: Sequence[str]) -> None:
    """Check that there is something to train, and that every pattern names some linear layer.

    Raises:
        LowkeyError: for a pattern that names nothing, and if there is no pattern at all.
    """
    known = dict.fromkeys(_linear_layers(model).values())
    for option, patterns in (("lora", lora), ("full", full)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise LowkeyError(
                    f"{option} {shown(pattern)}: matches no linear layer; there are {', '.join(known)}"
                )
    if not (lora or full):
        raise LowkeyError(
            "lora () and full (): there is nothing to train; name some linear layers, like "
            "'self_attn.*', in either"
        )


def _linear_layers(model: PreTrainedModel) -> dict[str, str]:
    """Return the linear layers of all decoder layers: by full name, the name within the decoder layer."""
    full_names = {m: name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {
        full_names[m]: name
        for layer in families.decoder_layers(model)
        for name, m in layer.named_modules()
        if isinstance(m, nn.Linear)
    }


def _matching(model: PreTrainedModel, patterns: Sequence[str]) -> list[str]:
    """Return the full names of the linear layers that any of the patterns names."""
    layers = _linear_layers(model)
    return [full for full, name in layers.items() if any(fnmatchcase(name, p) for p in patterns)]


def _widened(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True)

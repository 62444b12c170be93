"""Small trained models, their conversion to another attention, and the comparison of their logits."""

from __future__ import annotations

import pico
import torch
from torch import Tensor
from transformers import PreTrainedModel
from typer.testing import CliRunner

from lowkey.attention import LowkeyConfig, LowkeyForCausalLM
from lowkey.cli.app import app
from lowkey.conversion import ConversionOptions

IDS = pico.prompt(24)
D, H = pico.HEAD_DIM, 8
OWN = {
    "vocab_size": pico.VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}
ALIGNED = ConversionOptions(basis="aligned")


def build(name: str, **overrides: object) -> PreTrainedModel:
    """In fp64, with biases and norms as training leaves them, not zeros and ones."""
    if name == "own":
        torch.manual_seed(0)
        model = LowkeyForCausalLM(LowkeyConfig(**{**OWN, "initializer_range": 0.15, **overrides})).eval()
    else:
        model = pico.build(name, **overrides)
    generator = torch.Generator().manual_seed(7)
    for parameter, values in model.named_parameters():
        if parameter.endswith("bias"):
            values.data.normal_(generator=generator)
        elif "norm" in parameter:
            values.data.add_(0.3 * torch.randn(values.shape, generator=generator))
    return model.double()


@torch.no_grad()
def logits(model: PreTrainedModel, still: bool = False) -> Tensor:
    """`still`: all tokens at position 0, where rotation turns nothing; without a mask they would be taken for
    texts of one token each.
    """
    positions, mask = (torch.zeros_like(IDS), torch.ones_like(IDS)) if still else (None, None)
    return model(IDS, position_ids=positions, attention_mask=mask, use_cache=False).logits


def equal(
    model: PreTrainedModel, made: PreTrainedModel, still: bool = False, tolerance: float | None = None
) -> bool:
    """Relative to the largest logit; transformers' own norms round to fp32, ours keep fp64."""
    want = logits(model, still)
    tolerance = tolerance or (1e-9 if type(model) is LowkeyForCausalLM else 3e-6)
    return bool((logits(made, still) - want).abs().max() <= tolerance * want.abs().max())


GATED = {"attention": "gqa", "num_key_value_heads": 4, "attn_output_gate": True, "head_norm": "own"}


def run(*words: object) -> tuple[int, str, str]:
    """Run a command: (exit status, stdout, what it raised)."""
    ran = CliRunner().invoke(app, [str(w) for w in words])
    return ran.exit_code, ran.stdout, str(ran.exception or "")


SMALL = ("--context", 64, "--windows", 4)

"""The plan: what is stored of a model's keys and values, as a folder that loads anywhere.

A plan holds all four axes: low-rank maps, which may merge heads; a packing in integers; an eviction policy;
and the window of exact tokens. Any of them may be absent. In place of the last three, gates may give every
token a rank of its own.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from lowkey.core import files
from lowkey.core.types import Factors, Layout, LowkeyError
from lowkey.models.families import check_layout, geometry
from lowkey.models.fingerprint import check_model
from lowkey.plan.card import plan_card
from lowkey.plan.reading import (
    MAPS,
    PLAN_CARD,
    PLAN_FIELDS,
    PLAN_FILE,
    PLAN_FORMAT,
    PLAN_JSON,
    PLAN_TENSORS,
    read_plan,
)
from lowkey.plan.token_ranks import DYNAMIC_PLAN_JSON, TokenRanks
from lowkey.plan.window_bytes import CacheBytes
from lowkey.storage.exact import Exact
from lowkey.storage.packing import scheme_or_none
from lowkey.version import __version__

NO_METHOD = {"name": "none", "parameters": {}}  # of plans without low-rank maps


@dataclass(frozen=True)
class Plan:
    """What is stored of the keys and values of a model, and where it comes from.

    Args:
        factors: the maps of each compressed layer, by layer index; empty if keys and values keep their rank.
        layout: whether keys are stored rotated.
        method: that fitted the maps, {"name": ..., "parameters": {...}}.
        allocator: that chose the ranks, in the same form.
        budget: that was asked for, as text.
        geometry: the shapes of the model, as `models.families.Geometry` has them.
        provenance: fingerprints of model and data, seed and versions.
        profile: candidate ranks, the error at each, and the chosen ranks, for every layer.
        orthonormal: whether the maps back are the transposes of the maps into the latents.
        sinks: number of sinks that caches keep exactly.
        recent: number of recent tokens that caches keep exactly.
        heads: for each kind of head score (`r2`, ...), the scores of the KV heads of every compressed layer,
            which HeadKV policies read.
        bits: the packing of latents, as `make_cache` takes it; None for the model's dtype.
        policy: which tokens are kept, as `lowkey.policies.policy_to_dict` writes it; None to keep all.
        token_ranks: gates that give every token a rank of its own; None for the ranks of `factors`, which all
            tokens share.
        folder: that it was read from, for messages; None if it was not.
    """

    factors: dict[int, Factors]
    layout: Layout
    method: dict
    allocator: dict
    budget: str
    geometry: dict
    provenance: dict
    profile: dict = field(default_factory=dict)
    orthonormal: bool = True
    sinks: int = 0
    recent: int = 0
    heads: dict = field(default_factory=dict)
    bits: str | None = None
    policy: dict | None = None
    token_ranks: TokenRanks | None = None
    folder: Path | None = field(default=None, compare=False)

    @property
    def ranks(self) -> dict[int, tuple[int, int]]:
        """(r_K, r_V) per compressed layer."""
        return {i: f.ranks for i, f in self.factors.items()}

    def bytes_per_token(self, itemsize: int) -> float:
        """The predicted bytes that one more token adds to the compressed layers.

        Where every token has a rank of its own, it is a token like the held-out ones in the mean.
        """
        g, whole = self.geometry, self.cache_bytes(itemsize, 1)
        if self.token_ranks is not None:
            # buckets do not keep tokens in order, so unrotated keys need their positions: int32
            position_bytes = 4 if self.layout == "pre_rope" else 0
            numbers = self.token_ranks.share * 2 * g["kv_heads"] * g["head_dim"]
            return len(self.factors) * (numbers * itemsize + position_bytes)
        total = sum(
            whole.latent_token_bytes(i, merge, width)
            for layer in self.stored_shapes()
            for i, (merge, width) in enumerate(layer)
        )
        return int(total) if total == int(total) else total  # packed latents may take a part of a byte

    def stored_shapes(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """For each compressed layer, of keys and of values: (KV heads that share a latent, its width)."""
        if not self.factors:
            whole = (1, self.geometry["head_dim"])
            return [(whole, whole)] * len(self.geometry["compressible"])
        return [
            ((f.merge[0], f.k_down.shape[-1]), (f.merge[1], f.v_down.shape[-1]))
            for f in self.factors.values()
        ]

    def cache_bytes(self, itemsize: int, tokens: int) -> CacheBytes:
        """The bytes of a cache of so many tokens in the compressed layers, given the bytes of a number."""
        g, exact = self.geometry, Exact(self.sinks, self.recent)
        return CacheBytes(
            len(self.stored_shapes()),
            g["kv_heads"],
            g["head_dim"],
            itemsize,
            exact,
            scheme_or_none(self.bits),
            tokens,
        )

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that the plan was not made for, by fingerprint and by shape.

        Raises:
            LowkeyError: for such a model.
        """
        # by fingerprint first: its message says which model the plan is for
        known = self.provenance
        check_model(
            "plan", known.get("model", "?"), known.get("model_sha256"), model, "compress this model anew"
        )
        shape = geometry(model)
        layers = sorted(self.factors) or list(self.geometry["compressible"])
        gated = layers if self.token_ranks is None else sorted(self.token_ranks.gates)
        if (layers, gated, self.geometry["kv_heads"], self.geometry["head_dim"]) != (
            list(shape.compressible),
            list(shape.compressible),
            shape.kv_heads,
            shape.head_dim,
        ):
            raise LowkeyError(
                "plan does not cover the layers and heads of this model; it is damaged: make it again"
            )
        if self.factors:
            check_layout(model, self.layout)

    def check_fixed_ranks(self, purpose: str) -> None:
        """Refuse a plan that gives every token a rank of its own.

        Args:
            purpose: what needs ranks that all tokens share, for the message.

        Raises:
            LowkeyError: for such a plan.
        """
        if self.token_ranks is not None:
            name = f"plan {str(self.folder)!r}" if self.folder else f"plan of method {self.method['name']!r}"
            raise LowkeyError(
                f"{purpose} with {name}: it gives every token a rank of its own, which only eval and "
                "generate can use, and make_cache without a policy, bits or exact tokens; give a plan that "
                "lowkey compress made"
            )

    def save(self, path: str | Path, force: bool = False) -> str:
        """Write the plan as a folder, in one step.

        The folder holds plan.json, plan.safetensors and a card. Another plan of lowkey's is replaced.

        Args:
            path: the folder.
            force: whether to replace another folder that lowkey wrote, too.

        Returns:
            The checksum of everything but the card.

        Raises:
            LowkeyError: if the folder holds anything else, or cannot be written.
        """
        folder = Path(path)
        again = DYNAMIC_PLAN_JSON if os.path.exists(folder / DYNAMIC_PLAN_JSON) else PLAN_JSON
        files.check_folder(folder, force, again)
        with files.replacing_folder(folder) as temporary:
            checksum = files.write_tensors(temporary / PLAN_TENSORS, self._tensors(), PLAN_FILE)
            files.write_text(temporary / PLAN_CARD, plan_card(self))
            return files.write_json(
                temporary / PLAN_JSON, {**self.describe(), "tensors_sha256": checksum}, PLAN_FILE
            )

    def describe(self) -> dict:
        """The plan without its maps and gates, as plan.json holds it."""
        ranks = {str(i): list(r) for i, r in self.ranks.items()}
        order = {str(i): f.order.tolist() for i, f in self.factors.items() if f.order is not None}
        sizes = {dtype: self.bytes_per_token(size) for dtype, size in (("float32", 4), ("bfloat16", 2))}
        return {
            "format": PLAN_FORMAT,
            **{n: getattr(self, n) for n in PLAN_FIELDS},
            "token_ranks": None if self.token_ranks is None else self.token_ranks.describe(),
            "ranks": ranks,
            "order": order,
            "bytes_per_token": sizes,
        }

    def digest(self) -> str:
        """A checksum of the maps and gates."""
        return files.digest(self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of plan.safetensors, by name.

        Orthonormal plans store the maps into the latents only; the maps back are their transposes.
        """
        names = (*(("k_down", "v_down") if self.orthonormal else MAPS), "k_mean", "v_mean", "frequencies")
        tensors = {f"{i}.{n}": getattr(f, n) for i, f in self.factors.items() for n in names}
        tensors |= {} if self.token_ranks is None else self.token_ranks.tensors()
        # clones, since layers may share maps, and a safetensors file refuses shared memory
        return {name: t.float().contiguous().clone() for name, t in tensors.items() if t is not None}

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel | None = None) -> Plan:
        """Load a plan and check all that it says.

        Args:
            path: the folder.
            model: the model that the plan must have been made for, or None.

        Raises:
            LowkeyError: for a newer format, a damaged or hostile file, NaN, wrong shapes, or another model.
        """
        folder = Path(path)
        factors, fields = files.read_consistently(folder, lambda: read_plan(folder))
        plan = cls(factors, **fields, folder=folder)
        if model is not None:
            plan.check(model)
        return plan


def versions() -> dict[str, str]:
    """The versions of lowkey, torch, transformers and Python."""
    return {
        "lowkey": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }

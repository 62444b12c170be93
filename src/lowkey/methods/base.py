"""What a low-rank method is, and what calibration hands to one that looks at the whole model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor
from transformers import PreTrainedModel

from lowkey.core.options import Checked, option
from lowkey.core.progress import Progress, silent
from lowkey.core.types import Factors, LayerBases, LayerStatistics, Layout
from lowkey.models import families
from lowkey.ops.products import group_size
from lowkey.probes.gradients import GradientMoments, fisher_bases, gather_gradient_moments
from lowkey.probes.layer_probe import LayerProbe
from lowkey.storage.exact import NO_EXACT_TOKENS, Exact


@dataclass(frozen=True)
class CalibrationContext:
    """The model, the calibration windows and the settings that a method's stages work with.

    Args:
        model: an attached model in eval mode.
        windows: token ids (n, t) of all calibration windows.
        held_out: how many of the last windows are for judging only.
        layout: whether keys are stored before or after their rotation.
        measured_ranks: the ranks at which bases are trained and errors measured, in ascending order; the last
            one is the head dim.
        seed: of everything random.
        batch: windows per forward pass.
        progress: shows how far a stage is.
        choices: every rank that may be chosen, if these are more than the measured ones.
        exact: the tokens that the cache will store as they are, as far as the windows hold any others.
        work: a folder of this very job, to save into and to resume from; or None.
    """

    model: PreTrainedModel
    windows: Tensor
    held_out: int
    layout: Layout
    measured_ranks: list[int]
    seed: int
    batch: int = 4
    progress: Progress = silent
    choices: tuple[int, ...] = ()
    exact: Exact = NO_EXACT_TOKENS
    work: Path | None = None

    @property
    def selectable_ranks(self) -> list[int]:
        """Every rank that may be chosen."""
        return list(self.choices or self.measured_ranks)

    @property
    def training_windows(self) -> Tensor:
        """The windows that a method may fit on."""
        return self.windows[: -self.held_out]

    @property
    def held_out_windows(self) -> Tensor:
        """The windows that only judge what was fitted on the others."""
        return self.windows[-self.held_out :]

    @cached_property
    def gradient_moments(self) -> GradientMoments:
        """Second moments of keys, values and their gradients over the training windows; gathered once."""
        return gather_gradient_moments(
            self.model, self.training_windows, self.layout, self.exact, self.seed, self.work, self.progress
        )


PlainForm = Literal["fewer heads", "narrower heads"]


class Method(Checked, ABC):
    """A low-rank method: from calibration text to maps that compress keys and values.

    A subclass is a frozen dataclass whose fields are its options with their ranges (`core.options`). It has
    up to three stages: `fit` for each layer on its own, `tune` for all layers together before ranks are
    chosen, and `finish` for all layers at the chosen ranks.

    Attributes:
        summary: what the method does, in one line.
        paper: its source, like `arXiv:2601.21686`; empty if there is none.
        allocator: name of the rank allocator of its paper, or `greedy`.
        layout: whether its paper stores keys before (`pre_rope`) or after (`post_rope`) their rotation.
        grid: the ranks at which errors are measured, in the syntax of `--ranks`: those of its paper, or `8`.
        serves_any_rank: whether its bases serve every rank, so that allocators that compare no measured
            errors may choose any. Otherwise only ranks of the grid are chosen.
        has_fit: whether calibration calls `fit`. A method whose `tune` needs no bases goes without.
        has_tune: whether calibration calls `tune`.
        plain_form: what a plan becomes when `lowkey export` folds it into the weights; None if it cannot be.
        plain_options: the options of such plans.
    """

    summary: ClassVar[str]
    paper: ClassVar[str] = ""
    allocator: ClassVar[str] = "greedy"
    layout: ClassVar[Layout] = "post_rope"
    grid: ClassVar[str] = "8"
    serves_any_rank: ClassVar[bool] = True
    has_fit: ClassVar[bool] = True
    has_tune: ClassVar[bool] = False
    plain_form: ClassVar[PlainForm | None] = None
    plain_options: ClassVar[Mapping[str, str]] = {}

    @property
    def has_finish(self) -> bool:
        """Whether calibration calls `finish`. A class that always has this stage sets `has_finish = True`."""
        return False

    @abstractmethod
    def fit(self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], seed: int) -> LayerBases:
        """Fit the bases of one layer.

        Args:
            statistics: second moments of the layer's keys, values, queries and inputs.
            probe: the layer itself, with its inputs and outputs.
            ranks: the ranks that may be chosen, in ascending order.
            seed: of everything random.
        """

    def candidates(self, heads: int, head_dim: int, ranks: list[int]) -> list[int]:
        """Return those of `ranks` that this method can serve in a model with `heads` KV heads.

        The full rank, which is the last of `ranks`, is always among them.

        Raises:
            LowkeyError: if the method's options do not fit the model.
        """
        return ranks

    def numbers_per_token(self, rank: int, heads: int, head_dim: int) -> int:
        """Return how many numbers one token takes in a layer's keys, or in its values, at a served rank."""
        return rank * heads

    def tune(self, bases: dict[int, LayerBases], context: CalibrationContext) -> dict[int, LayerBases]:
        """Return better bases of all layers, before ranks are chosen."""
        return bases

    def finish(self, factors: dict[int, Factors], context: CalibrationContext) -> dict[int, Factors]:
        """Return better factors of all layers, at the ranks that were chosen."""
        return factors


def whole_head_ranks(group: int, head_dim: int, ranks: list[int]) -> list[int]:
    """Return those of `ranks` that stand for 1, 2, ... whole heads of each group.

    n of `group` heads are a rank of n head_dim / group per head, rounded up.
    """
    # -(-a // b) rounds a / b up.
    wanted = {-(-n * head_dim // group) for n in range(1, group + 1)}
    return [r for r in ranks if r in wanted]


def whole_head_numbers(rank: int, group: int, head_dim: int) -> int:
    """Return how many numbers the whole heads of a group take that a rank stands for."""
    return rank * group // head_dim * head_dim


@dataclass(frozen=True)
class GradientMethod(Method):
    """A method whose bases come from the gradients of the whole model's loss.

    Args:
        group: how many KV heads share one latent; it divides their number, or is 0 (default) for all.
    """

    allocator: ClassVar[str] = "spectrum"
    layout: ClassVar[Layout] = "pre_rope"
    has_tune: ClassVar[bool] = True
    has_fit: ClassVar[bool] = False

    group: int = option(0, at_least=0, at_most=1024)

    def candidates(self, heads: int, head_dim: int, ranks: list[int]) -> list[int]:
        """Return all ranks; refuse a group that does not divide the heads."""
        group_size(heads, self.group or heads)
        return ranks

    def fit(self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], seed: int) -> LayerBases:
        """Not called: the loss needs the whole model, so `tune` makes the bases."""
        raise NotImplementedError("the loss needs the whole model: see tune")

    def closed_form(self, context: CalibrationContext, ridge: float) -> dict[int, LayerBases]:
        """Return the oblique projectors of `probes.gradients.fisher_bases` for every layer."""
        heads = families.geometry(context.model).kv_heads
        return fisher_bases(context.gradient_moments, heads, self.group or heads, ridge)

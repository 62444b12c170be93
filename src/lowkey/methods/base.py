"""What calibration asks of a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from lowkey.core.options import Checked, option
from lowkey.core.progress import Progress, silent
from lowkey.core.types import Factors, LayerBases, LayerStatistics, Layout
from lowkey.models import families
from lowkey.ops.products import group_size
from lowkey.probes.gradients import GradientMoments, fisher_bases, gather_gradient_moments
from lowkey.probes.layer_probe import LayerProbe
from lowkey.storage.exact import NOTHING, Exact


@dataclass(frozen=True)
class CalibrationContext:
    """What a method that looks at the whole model works on. rows (n, t): ids of the calibration windows; the
    last `held` only judge.

    ranks: those at which bases are trained and errors measured; choices: every one that may be chosen, when
    these are more.
    exact: the tokens that the cache will keep as they are, as far as these windows show any other. work: the
    folder of this very job, to save into and to resume from.
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
    exact: Exact = NOTHING
    work: Path | None = None

    @property
    def selectable_ranks(self) -> list[int]:
        """Every rank that may be chosen."""
        return list(self.choices or self.measured_ranks)

    @property
    def training_windows(self) -> Tensor:
        return self.windows[: -self.held_out]

    @property
    def held_out_windows(self) -> Tensor:
        return self.windows[-self.held_out :]

    @cached_property
    def gradient_moments(self) -> GradientMoments:
        """Of keys, values and their gradients over the fitting windows: gathered once, however often they are
        asked for.
        """
        return gather_gradient_moments(
            self.model, self.training_windows, self.layout, self.exact, self.seed, self.work, self.progress
        )


class Method(Checked, ABC):
    """A frozen dataclass whose fields are its options, with their ranges (see `lowkey.core.options`).

    summary, paper: what it is and its source; allocator: the rule that its paper splits a budget by, or
    `greedy`; layout: the one its paper stores keys in; grid: the candidate ranks of its paper, as `--ranks`
    takes them, or 8, at which errors are measured. every: whether its bases serve any rank, so that
    allocators that compare no measured errors may choose any; if not, only ranks of the grid are chosen.
    tunes, finishes: whether it has the two stages of the same names, which look at the whole model. fits:
    whether `fit` is asked; not where `tune` needs nothing of it.
    """

    summary: ClassVar[str]
    paper: ClassVar[str] = ""
    allocator: ClassVar[str] = "greedy"
    layout: ClassVar[Layout] = "post_rope"
    grid: ClassVar[str] = "8"
    serves_any_rank: ClassVar[bool] = True
    has_tune: ClassVar[bool] = False
    has_fit: ClassVar[bool] = True
    has_finish: ClassVar[bool] = False

    @abstractmethod
    def fit(self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], seed: int) -> LayerBases:
        """Bases of one layer for the ranks that may be chosen, from its second moments and, if need be, its
        weights and inputs.
        """

    def candidates(self, heads: int, head_dim: int, ranks: list[int]) -> list[int]:
        """Which of these ranks this method can serve, in a model of so many KV heads; always with the full
        rank, which is among them.
        """
        return ranks

    def numbers_per_token(self, rank: int, heads: int, head_dim: int) -> int:
        """What a token takes in a layer, of keys or of values of all heads, at a rank that is served."""
        return rank * heads

    def tune(self, bases: dict[int, LayerBases], context: CalibrationContext) -> dict[int, LayerBases]:
        """Better bases of all layers, before ranks are chosen."""
        return bases

    def finish(self, factors: dict[int, Factors], context: CalibrationContext) -> dict[int, Factors]:
        """Better factors, of the ranks that were chosen."""
        return factors


def whole_head_ranks(group: int, head_dim: int, ranks: list[int]) -> list[int]:
    """The ranks among these that stand for 1, 2, ... whole heads of each group, rounded up where the group
    does not divide them.
    """
    wanted = {-(-n * head_dim // group) for n in range(1, group + 1)}
    return [r for r in ranks if r in wanted]


def whole_head_numbers(rank: int, group: int, head_dim: int) -> int:
    """What the whole heads of a group take that such a rank stands for."""
    return rank * group // head_dim * head_dim


@dataclass(frozen=True)
class GradientMethod(Method):
    """A method whose bases come from the gradients of the whole model's loss.

    group: how many KV heads share one latent, a divisor of their number, or 0 for all.
    """

    allocator: ClassVar[str] = "spectrum"
    layout: ClassVar[Layout] = "pre_rope"
    has_tune: ClassVar[bool] = True
    has_fit: ClassVar[bool] = False

    group: int = option(0, at_least=0, at_most=1024)

    def candidates(self, heads: int, head_dim: int, ranks: list[int]) -> list[int]:
        group_size(heads, self.group or heads)
        return ranks

    def fit(self, statistics: LayerStatistics, probe: LayerProbe, ranks: list[int], seed: int) -> LayerBases:
        raise NotImplementedError("no layer says by itself what the loss is; see tune")

    def closed_form(self, context: CalibrationContext, ridge: float) -> dict[int, LayerBases]:
        heads = families.geometry(context.model).kv_heads
        return fisher_bases(context.gradient_moments, heads, self.group or heads, ridge)

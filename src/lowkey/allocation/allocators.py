"""The rank allocators by name. They split one budget over layers, keys and values.

Any allocator works with any basis, except that `threshold`, `tail` and `spectrum` read energies, which not
all bases have.
"""

from __future__ import annotations

from lowkey.allocation.base import RankAllocator
from lowkey.allocation.by_error import Greedy, Pareto, UniformRanks, WeightedPareto
from lowkey.allocation.by_signal import Condition, Depth, Fisher
from lowkey.allocation.by_spectrum import Spectrum, Tail, Threshold

RANK_ALLOCATORS: dict[str, type[RankAllocator]] = {
    "uniform": UniformRanks,
    "pareto": Pareto,
    "weighted-pareto": WeightedPareto,
    "greedy": Greedy,
    "threshold": Threshold,
    "tail": Tail,
    "spectrum": Spectrum,
    "fisher": Fisher,
    "condition": Condition,
    "depth": Depth,
}

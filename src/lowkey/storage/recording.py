"""Remembers forward passes, so that a cache can take back their newest tokens.

What a recent window has compressed cannot become exact again, and what was evicted is gone. A recorded pass
is therefore not shortened in place: the layers go back to their state before it, and take in again those of
its tokens that stay. The result is that of a cache that never saw the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lowkey.models.attention_interface import Call

if TYPE_CHECKING:  # that module imports this one
    from lowkey.storage.rollback import Snapshot


@dataclass(frozen=True)
class GivenTokens:
    """What one forward pass gave to one layer.

    Args:
        keys: (b, h, t, d), rotated.
        values: (b, h, t, d).
        call: the attention call; None for layers that only store.
    """

    keys: Tensor
    values: Tensor
    call: Call | None

    def part(self, start: int, stop: int) -> GivenTokens:
        """The tokens from `start` to `stop`, as a call of their own would have brought them."""
        keys, values, call = self.keys[:, :, start:stop], self.values[:, :, start:stop], self.call
        if call is not None:
            mask, positions, t = call.mask, call.positions, self.keys.shape[2]
            if mask is not None:
                mask = mask[:, start:stop, : mask.shape[2] - t + stop]
            if positions is not None:
                positions = positions[:, start:stop]
            call = replace(call, query=call.query[..., start:stop, :], mask=mask, positions=positions)
        return GivenTokens(keys, values, call)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that are held."""
        yield from (self.keys, self.values)
        if self.call is not None:
            of_the_call = (self.call.query, self.call.mask, self.call.positions)
            yield from (t for t in of_the_call if t is not None)


@dataclass(frozen=True)
class Recording:
    """The forward passes since the last `crop`.

    Args:
        all_passes: whether passes are recorded until the next `crop`. Otherwise only one is: a second one
            that comes without a `crop` between them shows that nobody speculates, and ends the recording.
        before: the state of each layer before the first of the passes.
        passes: what each pass gave to each layer.
    """

    all_passes: bool = False
    before: dict[Any, Snapshot] = field(default_factory=dict)
    passes: tuple[dict[Any, GivenTokens], ...] = ()

    def next_pass(self) -> Recording | None:
        """The recording with room for one more pass; None if that ends it."""
        if self.passes and not self.all_passes:
            return None
        return replace(self, before=dict(self.before), passes=(*self.passes, {}))

    def emptied(self) -> Recording:
        """The same recording without what it has recorded."""
        return Recording(self.all_passes)

    def lengths(self) -> list[int]:
        """The number of tokens of each pass."""
        return [next(iter(given.values())).keys.shape[2] for given in self.passes if given]

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that are held."""
        for snapshot in self.before.values():
            yield from snapshot.tensors()
        for one in self.passes:
            for given in one.values():
                yield from given.tensors()

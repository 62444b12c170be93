"""What our cache layers share, and transformers' own layers with byte counts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lowkey.core.types import LowkeyError
from lowkey.models.attention_interface import Call, Incoming, cast_for_autocast
from lowkey.storage.rollback import RestorableLayer, storage_bytes

RECORD_FIRST = "call cache.activate_past_recording() before the tokens come"


class StoringLayer(RestorableLayer):
    """A layer that stores tokens in its own form and computes attention over them itself.

    `update` does not store: it returns an `Incoming`, which the attention function hands back to `attend`
    together with the query. A layer therefore sees keys, values and queries in one call.

    Args:
        exact_prefill: what a chunk of several tokens sees of itself. True: its own exact keys and values,
            which are compressed afterwards (decode-only compression). False: what will be stored.

    Attributes:
        seen: number of tokens seen, including tokens that were evicted since and padding.
        exact_prefill: as given; may be switched at any time.
        dtype: the dtype of the keys that came first.
        saved_counters: attributes that a saved layer needs beside its tensors: counts and flags.
    """

    is_sliding = False
    dtype: torch.dtype
    device: torch.device
    saved_counters: ClassVar[tuple[str, ...]] = ("seen", "exact_prefill")

    def __init__(self, exact_prefill: bool = False) -> None:
        super().__init__()
        self.seen, self.exact_prefill = 0, exact_prefill

    @abstractmethod
    def predicted_nbytes(self) -> int:
        """The bytes that the layer's formula gives for the tokens seen; tests hold it equal to `nbytes`."""

    @abstractmethod
    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """Store new tokens and answer the attention call.

        Args:
            keys: rotated keys (b, h, t, d) of the new tokens.
            values: values (b, h, t, d) of the new tokens.
            call: queries, mask and positions.

        Returns:
            The attention output (b, h, g, t, d).
        """

    def nbytes(self) -> int:
        """The bytes of the storages that are really held."""
        return storage_bytes(self.tensors().values())

    def host_nbytes(self) -> int:
        """The part of `nbytes` that lies in host memory by choice, wherever the model is."""
        return 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Any, Any]:
        """Count new keys and values (b, h, t, d) as seen, and send them on to the attention function."""
        key_states, value_states = cast_for_autocast(key_states), cast_for_autocast(value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.dtype = key_states.dtype
        # counted now, since transformers asks for the length before attention runs; `undo` takes it back
        self.seen += key_states.shape[2]
        incoming = Incoming(self, key_states, value_states)
        return incoming, incoming

    def replay(self, keys: Tensor, values: Tensor, call: Call | None) -> None:
        """Take in recorded tokens again; as `attend`, but the answer is not wanted."""
        if call is not None:
            self.attend(keys, values, call)

    def call_answered(self, keys: Tensor, values: Tensor, call: Call) -> None:
        """Called by the attention function with the arguments of `attend` when it returned."""
        if self.forward_pass is not None:
            self.forward_pass.record(self, keys, values, call)

    def attend_succeeded(self) -> None:
        """Called by the attention function when nothing can fail any more."""
        if self.forward_pass is not None:
            self.forward_pass.end_layer()

    def attend_failed(self) -> None:
        """Called by the attention function when `attend` or a check before it raised: undo the whole pass."""
        if self.forward_pass is not None:
            self.forward_pass.undo()

    def get_seq_length(self) -> int:
        """The number of tokens seen; transformers derives the positions of new tokens from it."""
        self.undo_unfinished()
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys that a mask covers, offset of the first): all tokens seen, and the new ones."""
        self.undo_unfinished()
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1

    def map_tensors(self, f: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor that is held by `f` of it."""
        for name, tensor in self.tensors().items():
            setattr(self, name, f(tensor))

    def reset(self) -> None:
        """Forget all tokens."""
        self.undo_unfinished()
        # None and not deleted, so that the names stay; `lazy_initialization` makes tensors again
        for name in self.tensors():
            setattr(self, name, None)
        self.seen, self.is_initialized = 0, False

    def select_sequences(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Keep some sequences of the batch.

        Args:
            choose: takes a tensor (b, ...) and returns the sequences to hold from now on, in their new order.
        """
        self.map_tensors(choose)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the sequences (b) into another order, as beam search does."""
        self.undo_unfinished()
        self.select_sequences(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences with these indices."""
        self.undo_unfinished()
        self.select_sequences(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Hold every sequence so many times, copies side by side."""
        self.undo_unfinished()
        self.select_sequences(lambda t: t.repeat_interleave(repeats, dim=0))

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]  # upstream has a constant
        """Whether `crop` leaves no trace, once `activate_past_recording` was called."""
        return self.flaw_of_guesses() is None

    def flaw_of_guesses(self) -> str | None:
        """Why a call whose tokens may be taken back would not give what single steps give, or None."""
        if self.exact_prefill:
            return (
                "exact prefill shows a call of several tokens its own exact keys, which steps of decoding do "
                "not see; call cache.exact_prefill(False) behind the prompt"
            )
        return None

    @property
    def calls_are_steps(self) -> bool:
        """Whether a call of several tokens stores what as many steps of decoding do."""
        return True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens in place.

        A refusal may leave the layer half changed: `LowkeyCache.crop` then puts it back.

        Args:
            tokens_to_remove: how many, negative as in transformers.

        Raises:
            LowkeyError: unless the layer can do so; this one cannot.
        """
        raise LowkeyError(
            f"crop({tokens_to_remove}): this kind of cache takes back only tokens that it was told to "
            f"record; {RECORD_FIRST}"
        )

    def offload(self) -> None:
        """Move everything to the CPU."""
        self.map_tensors(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back to the layer's device."""
        self.map_tensors(lambda t: t.to(self.device, non_blocking=True))


class StockLayer(RestorableLayer, DynamicLayer):
    """transformers' own full cache layer, with byte counts and undo."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """As transformers' own, after a check of batch size and dtype. Raises: LowkeyError."""
        if held := self.tensors():
            self.check_fits(key_states, len(held["keys"]), held["keys"].dtype)
        return super().update(key_states, value_states, *args, **kwargs)

    def tensors(self) -> dict[str, Tensor]:
        """Keys and values (b, h, s, d), if there are any."""
        held = {"keys": self.keys, "values": self.values}
        # upstream begins with empty tensors of one dimension
        return {name: t for name, t in held.items() if t is not None and t.ndim == 4}

    def growing_dims(self) -> dict[str, int]:
        """Keys and values grow along the tokens."""
        return dict.fromkeys(self.tensors(), 2)

    def get_seq_length(self) -> int:
        """The number of tokens seen."""
        self.undo_unfinished()
        return super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys that a mask covers, offset of the first)."""
        self.undo_unfinished()
        return super().get_mask_sizes(query_length)

    def reset(self) -> None:
        """Forget all tokens."""
        self.undo_unfinished()
        super().reset()

    def replay(self, keys: Tensor, values: Tensor, call: Call | None) -> None:
        """Take in recorded tokens (b, h, t, d) again."""
        self.update(keys, values)

    @property
    def calls_are_steps(self) -> bool:
        """True: every token is stored as it came."""
        return True

    def flaw_of_guesses(self) -> str | None:
        """None: any token can be taken back."""
        return None

    def crop(self, tokens_to_remove: int) -> None:
        """As transformers' own, but the memory of the removed tokens is freed."""
        super().crop(tokens_to_remove)
        for name, tensor in self.tensors().items():
            setattr(self, name, tensor.clone())  # upstream keeps a view of all of it

    def nbytes(self) -> int:
        """The bytes of the storages that are really held."""
        return storage_bytes(self.tensors().values())

    def predicted_nbytes(self) -> int:
        """The bytes of keys and values of all tokens seen."""
        return self._dense_bytes(super().get_seq_length())

    def _dense_bytes(self, tokens: int) -> int:
        return sum(
            len(t) * t.shape[1] * tokens * t.shape[3] * t.element_size() for t in self.tensors().values()
        )


class StockSlidingLayer(StockLayer, DynamicSlidingWindowLayer):
    """transformers' own sliding-window layer, with byte counts.

    Upstream keeps a view of the last chunk; here the tokens before the window are really freed.

    Attributes:
        score_only_tokens: so many tokens at the end of each chunk are seen by that chunk and then forgotten,
            as in the evicting layers of the same cache.
    """

    score_only_tokens = 0

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window)
        del self._sliding_window_tensor  # only upstream's export reads it

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """As a full layer's; upstream would need the tensor deleted above."""
        DynamicLayer.lazy_initialization(self, key_states, value_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Return what the new tokens see, and keep the last `sliding_window - 1` tokens."""
        full = super().update(key_states, value_states, *args, **kwargs)
        stop = full[0].shape[2] - self.score_only_tokens
        window = slice(max(0, stop - (self.sliding_window - 1)), stop)
        # clones, since upstream's views keep the whole prompt alive
        self.keys, self.values = (x[:, :, window].clone() for x in full)
        self.cumulative_length -= self.score_only_tokens
        return full

    def growing_dims(self) -> dict[str, int]:
        """None: the window moves, so tensors do not only grow."""
        return {}

    def crop(self, tokens_to_remove: int) -> None:
        """As `StockLayer.crop`. Raises: LowkeyError if tokens that have left the window would return."""
        if self.cumulative_length >= self.sliding_window:
            raise LowkeyError(
                f"crop({tokens_to_remove}): tokens have left the sliding window of {self.sliding_window} and "
                f"would have to return; {RECORD_FIRST}"
            )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.score_only_tokens = 0

    def predicted_nbytes(self) -> int:
        """The bytes of keys and values of the tokens in the window."""
        return self._dense_bytes(min(self.cumulative_length, self.sliding_window - 1))


def batch_positions(seen_before: int, call: Call, batch: int) -> Tensor:
    """Positions (b, t) of the new tokens: the model's own, or counted when the model gives none.

    Args:
        seen_before: number of tokens seen before the new ones.
        call: the attention call.
        batch: b, to which positions that are the same for all sequences are expanded.
    """
    t = call.query.shape[3]
    if call.positions is None:
        return torch.arange(seen_before, seen_before + t, device=call.query.device).expand(batch, t)
    return call.positions.expand(batch, t)

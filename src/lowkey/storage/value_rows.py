"""A guided layer with a tier of tokens of which only the values are held (SmallKV, arXiv:2508.02751).

The keys of these tokens are gone, so that their attention weights come from the small model. A token takes
half of what it took, and cannot get its key back; it stays as long as its score lets it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowkey.models.attention_interface import Call
from lowkey.ops.ragged import join_rows, pad_rows, starts_of, top_mask
from lowkey.storage.cache_wide_eviction import Candidates
from lowkey.storage.guided import GuidedLayer


class ValueRowsLayer(GuidedLayer):
    """A `GuidedLayer` whose rows also hold values without keys; see the module's docstring.

    It stores keys and values as the model made them, never in low rank.

    Attributes:
        alone_v: (m, d), values without keys, row after row.
        alone_positions: (m), their positions.
        alone_starts: (b h + 1), where each row begins.
        alone_entries: m.
    """

    alone_v: Tensor
    alone_positions: Tensor
    alone_starts: Tensor
    alone_entries = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty tensors for this batch size, device and dtype."""
        super().lazy_initialization(key_states, value_states)
        self.alone_v = value_states.new_empty(0, value_states.shape[3])
        self.alone_positions, self.alone_starts = self.rows_positions.clone(), self.rows_starts.clone()

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are held, by attribute name."""
        if not self.is_initialized:
            return {}
        names = ("alone_v", "alone_positions", "alone_starts")
        return super().tensors() | {name: getattr(self, name) for name in names}

    def ragged(self) -> dict[str, tuple[str, ...]]:
        """The tensors that lie row after row, by the name of the tensor that says where rows begin."""
        return super().ragged() | {"alone_starts": ("alone_v", "alone_positions")}

    def select_sequences(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Keep some sequences of the batch; see `StoringLayer.select_sequences`."""
        super().select_sequences(choose)
        self.alone_entries = len(self.alone_v) if self.is_initialized else 0

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.alone_entries = 0

    # -- bytes

    @property
    def alone_entry_bytes(self) -> int:
        """The bytes of one value without its key: the value and its position."""
        d = self.recent_v.shape[3]
        return d * self.recent_v.element_size() + self.alone_positions.element_size()

    def index_bytes(self) -> int:
        """The bytes that are held whatever is kept, where rows of values begin included."""
        return super().index_bytes() + len(self.alone_starts) * self.alone_starts.element_size()

    def predicted_nbytes(self) -> int:
        """As `GuidedLayer`'s, with the values without keys."""
        if not self.is_initialized:
            return 0
        starts = len(self.alone_starts) * self.alone_starts.element_size()
        return super().predicted_nbytes() + self.alone_entries * self.alone_entry_bytes + starts

    def positions_of_values(self, sequence: int) -> list[Tensor]:
        """For each KV head, the positions whose values are held without keys, ascending."""
        at, real = pad_rows(self.alone_positions.long(), self.alone_starts)
        own = slice(sequence * self.row_heads, (sequence + 1) * self.row_heads)
        return [p[there].sort().values for p, there in zip(at[own], real[own], strict=True)]

    # -- attending

    @property
    def asks_small_model(self) -> bool:
        """Whether the next tokens have to be read by the small model, too: it has the weights of values."""
        return super().asks_small_model or self.alone_entries > 0

    def flaw_of_guesses(self) -> str | None:
        """As `EvictingLayer`'s; the small model takes no token back."""
        if self.alone_entries:
            return "a small model has to read every token before, and takes none back; use another policy"
        return super().flaw_of_guesses()

    def attend(self, keys: Tensor, values: Tensor, call: Call) -> Tensor:
        """Answer the call, store the new tokens, and evict if it is time; see `StoringLayer.attend`.

        With b the small model's weights on the values without keys and m their sum, the answer is what the
        other tokens give, plus `sum_t b_t v_t`. The mix `exact` first takes (1 - m) of the former.
        """
        alone = self._from_values(call) if self.alone_entries else None
        out = super().attend(keys, values, call)
        if alone is None:
            return out
        mass, added = alone
        kept = out * (1 - mass).unsqueeze(-1) if self.policy.mix == "exact" else out
        return (kept + added).to(out.dtype)

    def _from_values(self, call: Call) -> tuple[Tensor, Tensor]:
        """The weights of the values without keys, summed (b, h, g, t), and the sum of the weighted values."""
        self._check_read()
        (b, h, g, t), rows = call.query.shape[:4], (len(self.offset), self.row_heads)
        at, real = (x.unflatten(0, rows) for x in pad_rows(self.alone_positions.long(), self.alone_starts))
        held = pad_rows(self.alone_v, self.alone_starts)[0].unflatten(0, rows)
        weights = self.observed.weights(self.head_map, t).view(b, h, g, t, -1)
        places = at[:, :, None, None].expand(-1, -1, g, t, -1)
        own = weights.gather(4, places).masked_fill(~real[:, :, None, None], 0.0)
        return own.sum(4), (own.flatten(2, 3) @ held.float()).view(b, h, g, t, -1)

    # -- evicting

    def _scores_of_all(self, scores: Tensor) -> Tensor:
        """Scores (b, h, s) of candidates, with those of the values without keys behind them."""
        if not self.alone_entries:
            return scores
        every = self.policy.token_scores(self._small_attention())
        at, real = (
            x.unflatten(0, (-1, self.row_heads))
            for x in pad_rows(self.alone_positions.long(), self.alone_starts)
        )
        return torch.cat([scores, every.gather(2, at).masked_fill(~real, -torch.inf)], 2)

    def keep_best(self, candidates: Candidates, scores: Tensor, counts: Tensor) -> None:
        """Keep the best candidates with keys, the next best by their values; the others are freed.

        Args:
            candidates: all tokens with keys that may stay.
            scores: (b, h, s'), of these and, behind them, of the values without keys.
            counts: (b, h), how many tokens with keys would take what each row may.
        """
        s, lengths = candidates.positions.shape[2], self.alone_starts.diff()
        with_keys, alone = scores[..., :s], scores[..., s : s + int(lengths.max())]
        whole, values = self._tiers(with_keys, counts, lengths.view(counts.shape))
        rest = with_keys.masked_fill(top_mask(with_keys, whole), -torch.inf)
        chosen = top_mask(torch.cat([rest, alone], 2), values)
        stays = torch.ones_like(self.alone_positions, dtype=torch.bool)
        if self.alone_entries:
            there = pad_rows(self.alone_positions, self.alone_starts)[1]
            stays = chosen[..., s:].flatten(0, 1)[there]
        left, new = chosen[..., s:].sum(2).flatten(), chosen[..., :s]
        # before the keys go, since the candidates are read as they are stored
        read = self._candidates_as_read(candidates, None)[1]
        starts, new_starts = starts_of(left), starts_of(new.sum(2).flatten())
        old_v, old_positions = self.alone_v[stays], self.alone_positions[stays]
        self.alone_v = join_rows(old_v, starts, read[new], new_starts)
        self.alone_positions = join_rows(old_positions, starts, candidates.positions[new].int(), new_starts)
        self.alone_starts, self.alone_entries = starts + new_starts, len(self.alone_v)
        super().keep_best(candidates, with_keys, whole)

    def _tiers(self, scores: Tensor, counts: Tensor, alone: Tensor) -> tuple[Tensor, Tensor]:
        """How many tokens (b, h) each row keeps with keys, and how many by their values.

        The values take the policy's share of the budget, in bytes, and no more than there are.

        Args:
            scores: (b, h, s), of the tokens with keys.
            counts: (b, h), how many tokens with keys would take what each row may.
            alone: (b, h), how many values without keys each row has.
        """
        there, fixed = ((~scores.isneginf()).sum(2), scores.isposinf().sum(2))
        each = self.entry_bytes / self.alone_entry_bytes  # values that take the bytes of one token
        budget, total = counts.double(), there + alone
        whole = counts - (self.policy.marginal * budget).floor().long()
        # where all tokens fit in one form or the other, as many as possible have keys
        whole = whole.maximum(((each * budget - total) / (each - 1)).floor().long())
        whole = whole.maximum(fixed).minimum(there).minimum(counts)
        values = ((budget - whole) * each + 1e-9).floor().long().minimum(total - whole)
        return whole, values

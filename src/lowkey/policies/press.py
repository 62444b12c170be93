"""Scores of other libraries as policies: classes with the interface of kvpress's presses.

A press has `score(module, hidden_states, keys, values, attentions, kwargs)`, which gives a score (b, h, s) of
every cached pair, and a `compress`, which keeps the best. Here a press only scores. What is kept is stored as
for every policy, so its memory is freed, and any budget, allocator and trigger goes with it.

A press is written for an attention module and its hidden states; a cache layer has neither. It has the
rotated queries, and a press makes nothing else of the two: so the module that a press is given hands the
queries back where it would project hidden states. Any other use of them is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowkey.core.budget import Budget
from lowkey.core.errors import LowkeyError, first_line
from lowkey.core.options import hints_of, option
from lowkey.ops.rope import unrotate
from lowkey.policies.base import EvictionContext, Policy

LATER = torch.iinfo(torch.int64).max  # a position behind all others
SHARE = "compression_ratio"  # the field that tells a press which share of the tokens is dropped
# What a press may have instead of the first class that has a `score`, and what follows from that.
DOES_MORE = {
    "compress": "does more than keep the pairs of the highest scores; give the press whose score it uses, "
    "with an allocator for the split over layers and heads",
    "post_init_from_model": "reads the model, which a policy does not see; give a press that scores keys, "
    "values and queries",
    "forward_hook": "acts on calls of the model; give a press that only scores",
}


@dataclass(frozen=True)
class PressPolicy(Policy):
    """The score of a press. `press_policy` makes the class of one press, with its options.

    The press sees each sequence of a batch by itself, without padding, and nothing of it that was evicted.
    Heads that hold different numbers of tokens are scored apart from one another. The press is told which
    share of the tokens is dropped, so the budget is one of tokens. Attention weights are not given to it, and
    what it makes of soft-capped attention or of another scaling is its own affair.

    Args:
        sinks: number of first tokens that are always kept (default 0: a press protects what it wants to).
        recent: number of newest tokens that are always kept (default 0).
    """

    summary: ClassVar[str] = "the score of another library's press"
    paper: ClassVar[str] = ""
    press: ClassVar[Any] = None

    sinks: int = option(0, at_least=0, at_most=2**24)
    recent: int = option(0, at_least=0, at_most=2**24)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protect_prompt or Budget.parse(self.budget or "1 B").unit not in ("%", "tokens"):
            what = "protect_prompt" if self.protect_prompt else f"budget {self.budget}"
            raise LowkeyError(
                f"{what} of {type(self).__name__}: a press is told which share of all tokens is dropped; "
                "give '25%' or '512 tokens', without protect_prompt"
            )
        self._made(0.0)  # a press may refuse its options

    @property
    def uses_rotations(self) -> bool:
        """True: the rotation of queries is undone."""
        return True

    def score(self, context: EvictionContext) -> Tensor:
        """What the press says of every candidate (b, h, s); see `Policy.score`.

        Raises:
            LowkeyError: the press asks for what a cache does not have, or gives scores of another shape.
        """
        scores = torch.zeros(context.valid.shape, device=context.keys.device)
        for row in range(len(scores)):
            lengths = context.valid[row].sum(-1)
            # without queries nothing is scored anew
            if bool((context.query_positions[row] >= 0).any()):
                for length in filter(None, lengths.unique().tolist()):
                    heads = (lengths == length).nonzero().squeeze(1)
                    scores[row, heads] = self._scores_of(context, row, heads, length)
        return scores

    def _scores_of(self, context: EvictionContext, row: int, heads: Tensor, length: int) -> Tensor:
        """Scores (n, s) of n heads of a sequence that hold `length` tokens each; 0 for what is not valid."""
        positions = context.positions[row, heads].masked_fill(~context.valid[row, heads], LATER)
        order = positions.argsort(-1)[:, :length]
        positions = positions.gather(1, order)
        keys, values = (
            x[row, heads].take_along_dim(order.unsqueeze(-1), 1) for x in (context.keys, context.values)
        )
        layer = _Layer(context, row, heads, keys, positions)
        seen = int(positions.max()) + 1
        press = self._made(self._share_dropped(seen, length))
        given = {"position_embeddings": layer.rotations, "hidden_states": layer.hidden}
        try:
            got = press.score(layer.module, layer.hidden, keys[None], values[None], None, given)
        except Exception as error:  # the code of others may raise anything
            raise LowkeyError(
                f"policy {type(self).__name__}: its score fails over what a cache has, which is keys, "
                f"values, queries and rotations ({type(error).__name__}: {first_line(error)})"
            ) from error
        if tuple(got.shape) != (1, len(heads), length):
            raise LowkeyError(
                f"policy {type(self).__name__}: gave scores of shape {tuple(got.shape)}; a score is a number "
                f"for each pair, {(1, len(heads), length)}"
            )
        return torch.zeros_like(context.valid[row, heads], dtype=torch.float32).scatter(
            1, order, got[0].float()
        )

    def _share_dropped(self, seen: int, candidates: int) -> float:
        """The share of the candidates of a head that the budget drops, on average over heads."""
        budget = Budget.parse(self.budget or "100%")
        kept = seen * budget.amount / 100 if budget.unit == "%" else budget.amount
        return min(max(0.0, 1 - kept / candidates), 1 - 1 / candidates)

    def _made(self, dropped: float) -> Any:
        """The press with these options. Raises: LowkeyError if it refuses them."""
        own = {f.name: getattr(self, f.name) for f in _options(self.press)}
        try:
            return self.press(**own, **{SHARE: dropped})
        except Exception as error:  # the code of others may raise anything
            raise LowkeyError(
                f"policy {type(self).__name__}: refuses its options {own} ({type(error).__name__}: "
                f"{first_line(error)}); give others"
            ) from error


def adapted(kind: Any, name: str) -> Any:
    """The policy of a press, if a class from outside is one; otherwise the class as it is.

    Args:
        kind: the class.
        name: what the user calls it.

    Raises:
        LowkeyError: a press that does more than score.
    """
    is_press = isinstance(kind, type) and is_dataclass(kind) and hasattr(kind, "compress")
    return press_policy(kind, name) if is_press and not hasattr(kind, "summary") else kind


def press_policy(press: type, name: str = "") -> type[PressPolicy]:
    """The policy of a press: a class with the options of both.

        press_policy(kvpress.SnapKVPress)("25%", window_size=32, allocator="ada")

    Args:
        press: a dataclass with a `score` and a field `compression_ratio`.
        name: what messages call it; empty for its own name.

    Raises:
        LowkeyError: it has no score, or does more than score.
    """
    what = f"policy {name or press.__qualname__!r}"
    if not hasattr(press, "score"):
        raise LowkeyError(
            f"{what}: has no score, and drops in a way of its own; give the press whose score it uses, with "
            "an allocator for the split over layers and heads"
        )
    first = next(kind for kind in reversed(press.__mro__) if "score" in vars(kind))
    for part, consequence in DOES_MORE.items():
        if getattr(press, part, None) is not getattr(first, part, None):
            raise LowkeyError(f"{what}: its {part} {consequence}")
    hints, own = hints_of(press), _options(press)
    if SHARE not in {f.name for f in fields(press)}:
        raise LowkeyError(f"{what}: has no field {SHARE}; give a press whose share is set at once")
    if taken := {f.name for f in own} & {f.name for f in fields(PressPolicy)}:
        raise LowkeyError(f"{what}: its option {min(taken)!r} is one of every policy, too; rename it")
    options = [
        (f.name, hints.get(f.name, Any), field(default=f.default, default_factory=f.default_factory))
        for f in own
    ]
    namespace = {
        "press": press,
        "summary": f"the score of {press.__qualname__}",
        "__doc__": press.__doc__,
        "__module__": press.__module__,
    }
    return make_dataclass(
        press.__name__, options, bases=(PressPolicy,), namespace=namespace, frozen=True, kw_only=True
    )


def _options(press: Any) -> list[Any]:
    """The fields of a press that are options: all but the share, and those of its own bookkeeping."""
    return [f for f in fields(press) if f.init and f.name != SHARE and not f.name.startswith("_")]


class _Layer:
    """What a press is given of one sequence in one layer.

    Args:
        context: of the layer.
        row: number of the sequence.
        heads: numbers of the KV heads (n).
        keys: their candidates (n, s, d), rotated.
        positions: (n, s), of the candidates.
    """

    def __init__(self, context: EvictionContext, row: int, heads: Tensor, keys: Tensor, positions: Tensor):
        at = context.query_positions[row]
        real, dtype = at >= 0, context.keys.dtype
        cos, sin = (x[row][:, real].float() for x in context.rope(context.query_positions.clamp_min(0), keys))
        queries = context.queries[row, heads][:, :, real]
        g, d = queries.shape[1], queries.shape[3]
        plain = unrotate(queries.flatten(0, 1).float(), cos, sin).to(dtype)
        # keys can be given as a projection of hidden states only if every candidate has a query
        whole = positions.shape[1] == int(real.sum()) and bool((positions == at[real]).all())
        plain_keys = unrotate(keys.float(), cos, sin).to(dtype) if whole else None
        self.rotations = (cos.to(dtype), sin.to(dtype))
        self.hidden = _Hidden(plain, plain_keys)
        first = int(at[real].min())

        def rotary_emb(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
            # a press counts positions from the first of its hidden states
            ids = (position_ids + first).expand(len(context.query_positions), -1)
            of_row = [part[row].to(x.dtype) for part in context.rope(ids, context.queries)]
            return of_row[0], of_row[1]

        config = SimpleNamespace(
            num_attention_heads=len(heads) * g, num_key_value_heads=len(heads), _attn_implementation="sdpa"
        )
        self.module = SimpleNamespace(
            config=config,
            head_dim=d,
            layer_idx=context.layer,
            num_key_value_groups=g,
            scaling=context.scaling,
            rotary_emb=rotary_emb,
            q_proj=lambda hidden: hidden.projected(hidden.queries),
            **({"k_proj": lambda hidden: hidden.projected(hidden.keys)} if whole else {}),
        )


class _Hidden:
    """Stands for hidden states (1, w, width): all that is known of them is what they are projected to.

    Args:
        queries: (H, w, d), without rotation.
        keys: (n, w, d), without rotation; None where some tokens have no query.
    """

    def __init__(self, queries: Tensor, keys: Tensor | None) -> None:
        self.queries, self.keys = queries, keys
        self.dtype, self.device = queries.dtype, queries.device

    @property
    def shape(self) -> torch.Size:
        """(1, w, width), with the width of the queries."""
        return torch.Size((1, self.queries.shape[1], self.queries.shape[0] * self.queries.shape[2]))

    def __getitem__(self, at: Any) -> _Hidden:
        """A run of tokens, as `hidden_states[:, start:stop]` gives it."""
        if not (isinstance(at, tuple) and len(at) == 2 and at[0] == slice(None) and isinstance(at[1], slice)):
            raise TypeError("hidden states are not known, only what they are projected to")
        return _Hidden(self.queries[:, at[1]], None if self.keys is None else self.keys[:, at[1]])

    def projected(self, of_heads: Tensor) -> Tensor:
        """Queries or keys (H, w, d) as a projection gives them: (1, w, H * d)."""
        return of_heads.transpose(0, 1).flatten(1).unsqueeze(0)

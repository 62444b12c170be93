"""Requests as token ids, and their way through a cache: read the context, compress it, read the rest.

Nothing here knows lm-eval.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.cache.cache import LowkeyCache
from lowkey.cache.prefill import prefill, read
from lowkey.core.types import device_of
from lowkey.evaluate.settings import Setting
from lowkey.harness.protocols import ASK_WITH, DECODING, ROLLING

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """One request.

    Args:
        key: name under which its answer is saved.
        number: place among the requests of a call.
        task: name of its task.
        context: ids that are read and compressed.
        tail: ids that are read over the compressed context.
        scored: ids of the continuation whose likelihood is asked for; the last ids of the tail, but for its
            first, predict them. Empty where an answer is written.
        over_length: whether tokens were cut off, since the model has not so many positions.
        protocol: how the question is asked.
        options: of writing the answer.
    """

    key: str
    number: int
    task: str
    context: Ids
    tail: Ids
    protocol: str
    scored: Ids = ()
    over_length: bool = False
    options: str = ""

    def record(self, answer: Any, held: float, written: int) -> dict[str, Any]:
        """What is saved of the answered request.

        Args:
            answer: the answer.
            held: bytes that the compressed context took.
            written: tokens of the answer.
        """
        rolling = self.protocol == ROLLING
        return {
            "answer": answer,
            **asdict(
                RequestMeasure(
                    task=self.task,
                    protocol=self.protocol,
                    # a text that is scored whole is its own context
                    context_tokens=len(self.tail if rolling else self.context),
                    question_tokens=0 if rolling else len(self.tail) - max(0, len(self.scored) - 1),
                    output_tokens=written,
                    kept_bytes=held,
                    over_length=self.over_length,
                )
            ),
        }


@dataclass(frozen=True)
class RequestMeasure:
    """What is reported of a request beside its answer.

    Args:
        task: name of its task.
        protocol: how the question was asked.
        context_tokens: tokens that were compressed.
        question_tokens: tokens of the prompt that were read over the compressed context.
        output_tokens: tokens of the continuation, or of the answer that was written.
        kept_bytes: bytes that the compressed context took, padding of its batch included.
        over_length: whether tokens were cut off.
    """

    task: str
    protocol: str
    context_tokens: int
    question_tokens: int
    output_tokens: int
    kept_bytes: float
    over_length: bool


def request_summary(measures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The means of what is reported of the requests of one task.

    Args:
        measures: what `Request.record` gave, one for each request.
    """
    names = ("context_tokens", "question_tokens", "output_tokens", "kept_bytes")
    means = {name: sum(m[name] for m in measures) / len(measures) for name in names}
    context = means["context_tokens"] * len(measures)
    return {
        "protocol": ", ".join(sorted({str(m["protocol"]) for m in measures})),
        **means,
        "kept_bytes_per_token": sum(m["kept_bytes"] for m in measures) / context if context else None,
        "over_length": sum(bool(m["over_length"]) for m in measures) / len(measures),
        "requests": len(measures),
    }


@dataclass(frozen=True)
class ContextBatch:
    """Requests about contexts that are read together.

    Args:
        contexts: the distinct contexts, each with the tokens that choose what is kept of it.
        requests: the requests, each with the place of its context.
    """

    contexts: list[tuple[Ids, Ids]]
    requests: list[tuple[int, Request]]

    def parts(self, most: int) -> Iterator[list[tuple[int, Request]]]:
        """The requests in groups whose tails are equally long, so that no padding stands behind a context.

        Args:
            most: requests of a group. Those that read the same tokens count once.
        """
        by_length: dict[int, dict[tuple[int, Ids], list[tuple[int, Request]]]] = {}
        for place, request in self.requests:
            same = by_length.setdefault(len(request.tail), {}).setdefault((place, request.tail), [])
            same.append((place, request))
        for groups in by_length.values():
            alike = list(groups.values())
            for start in range(0, len(alike), most):
                yield [pair for group in alike[start : start + most] for pair in group]


def batches(requests: Sequence[Request], size: int, setting: Setting, padded: bool) -> Iterator[ContextBatch]:
    """Batches of requests. Each distinct context is read once.

    Args:
        requests: the requests.
        size: contexts of a batch.
        setting: what is measured.
        padded: whether contexts of different lengths are read together.
    """
    kinds: dict[tuple, dict[tuple[Ids, Ids], list[Request]]] = {}
    for request in requests:
        # in `ask-with` the first token of the tail, the last one of the prompt, chooses with the others
        chooses = setting.evicts and request.protocol == ASK_WITH and request.context
        seen = request.tail[:1] if chooses else ()
        length = len(request.context) if not padded or not request.context else -1
        # contexts of other tasks would be padded to each other, and the bytes of one counted for another
        kind = (request.task, request.protocol, request.options, bool(request.scored), length)
        kinds.setdefault(kind, {}).setdefault((request.context, seen), []).append(request)
    for contexts in kinds.values():
        # the longest come first, so that rows of a batch are of similar length
        order = sorted(contexts, key=lambda pair: (-len(pair[0]), pair))
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            yield ContextBatch(
                chosen, [(place, r) for place, pair in enumerate(chosen) for r in contexts[pair]]
            )


@dataclass
class Read:
    """Contexts that were read and compressed.

    Args:
        cache: the cache; None if the contexts are empty.
        ids: (b, t), the contexts, padded on the left.
        mask: (b, t), 1 for tokens.
        held: bytes that a context took.
    """

    cache: LowkeyCache | None
    ids: Tensor
    mask: Tensor
    held: float


@torch.no_grad()
def read_contexts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    setting: Setting,
    batch: ContextBatch,
    chunk: int | None,
    pad: int,
) -> Read:
    """Read the contexts of a batch into a fresh cache and compress them.

    What is read later is kept whole: the question and the answer. Only where a prompt has no context before
    its question, the policy goes on evicting while the answer is written.

    Args:
        model: the model, attached.
        tokenizer: its tokenizer.
        setting: what is measured.
        batch: the batch.
        chunk: tokens that are read at a time; None for all.
        pad: id of padding.
    """
    device, width = device_of(model), max(len(context) for context, _ in batch.contexts)
    seen = len(batch.contexts[0][1])
    rows = [[pad] * (width - len(x)) + [*x, *more] for x, more in batch.contexts]
    real = [[0] * (width - len(x)) + [1] * (len(x) + len(more)) for x, more in batch.contexts]
    ids, mask = (torch.tensor(x, dtype=torch.long, device=device) for x in (rows, real))
    if not width:
        return Read(None, ids, mask, 0.0)
    cache = setting.make()
    prefill(model, tokenizer, cache, ids, seen, mask, chunk)
    if batch.requests[0][1].protocol != DECODING:
        cache.freeze()
    return Read(cache, ids[:, :width], mask[:, :width], cache.nbytes() / len(rows))


def continued(
    setting: Setting, contexts: Read, part: Sequence[tuple[int, Request]], last: bool
) -> tuple[LowkeyCache, Tensor, Tensor, list[int]]:
    """A cache that goes on from the contexts of some requests.

    Args:
        setting: what is measured.
        contexts: the contexts.
        part: requests whose tails are equally long, each with the place of its context.
        last: whether the contexts are not needed any more.

    Returns:
        The cache; ids (b, t) and mask (b, t) of context and tail; and for each request its row. Requests that
        read the same tokens share one.
    """
    places: dict[tuple[int, Ids], int] = {}
    rows = [places.setdefault((place, request.tail), len(places)) for place, request in part]
    of_context = [place for place, _ in places]
    tails = torch.tensor([tail for _, tail in places], dtype=torch.long, device=contexts.ids.device)
    ids = torch.cat([contexts.ids[of_context], tails], 1)
    mask = torch.cat([contexts.mask[of_context], torch.ones_like(tails)], 1)
    if contexts.cache is None:
        cache = setting.make()
    elif last and of_context == list(range(len(contexts.ids))):
        cache = contexts.cache
    else:
        cache = contexts.cache.branch(of_context)
    return cache, ids, mask, rows


@torch.no_grad()
def tail_logits(
    model: PreTrainedModel, cache: LowkeyCache, ids: Tensor, mask: Tensor, part: Sequence[tuple[int, Request]]
) -> Tensor:
    """Logits (b, n, V) of the newest tokens, which predict the continuations.

    Args:
        model: the model, attached.
        cache: what `continued` gave.
        ids: (b, t), context and tail.
        mask: (b, t), as given by `continued`.
        part: the requests.
    """
    tail = len(part[0][1].tail)
    return read(model, cache, ids[:, ids.shape[1] - tail :], mask, max(len(r.scored) for _, r in part))


@torch.no_grad()
def streamed_logits(
    model: PreTrainedModel, cache: LowkeyCache, ids: Tensor, piece: int, keep: int
) -> Iterator[Tensor]:
    """Logits of a text that is read piece by piece, each over the compressed cache of those before.

    Args:
        model: the model, attached.
        cache: a fresh cache.
        ids: (b, t), without padding.
        piece: tokens of a piece.
        keep: of so many of the last tokens, logits are given.

    Yields:
        Logits (b, n, V).
    """
    mask = torch.ones_like(ids)
    for start in range(0, ids.shape[1], piece):
        end = min(start + piece, ids.shape[1])
        wanted = end - max(start, ids.shape[1] - keep)
        logits = read(model, cache, ids[:, start:end], mask[:, :end], max(1, wanted))
        if wanted > 0:
            yield logits

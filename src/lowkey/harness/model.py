"""lm-eval's Hugging Face model over a compressed cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.core.files.measured import Measured
from lowkey.core.options import nearest_name
from lowkey.core.progress import Progress, silent
from lowkey.core.types import LowkeyError
from lowkey.evaluate.settings import Setting
from lowkey.harness.protocols import ASK_AFTER, DECODING, PROTOCOLS, ROLLING
from lowkey.harness.requests import (
    ContextBatch,
    Ids,
    Request,
    batches,
    continued,
    read_contexts,
    request_summary,
    streamed_logits,
    tail_logits,
)
from lowkey.harness.setting import setting_of
from lowkey.harness.splitting import context_length
from lowkey.models import loading

# What HFLM honours for a model that is loaded already.
PASSED_ON = (
    *("truncation", "logits_cache", "max_length", "softmax_dtype", "mixed_precision_dtype", "max_batch_size"),
    *("add_bos_token", "prefix_token_id", "think_end_token", "enable_thinking", "chat_template_args"),
)
OWN = (
    *("pretrained", "plan", "policy", "budget", "bits", "gates", "protocol", "chunk", "batch_size", "dtype"),
    *("device", "option.NAME"),
)
SCORED_AT_ONCE = 32  # tokens of a text that are scored at a time, over the compressed cache of those before


class LowkeyLM(HFLM):
    """An lm-eval model whose contexts are compressed before they are asked about.

    Every batch has a fresh cache. What the requests of a task took is in `measures`, and in lm-eval's results
    under `config`.

    Args:
        pretrained: a model as `lowkey.load` takes it, or a loaded and attached one.
        tokenizer: of a loaded model.
        setting: what is measured; None to make it of the next arguments.
        plan: folder of a plan.
        policy: name of a policy.
        budget: what the policy keeps.
        bits: packed integers.
        gates: folder of what the policy has learnt of the model.
        protocol: a name of `PROTOCOLS`.
        chunk: tokens of a context that are read at a time; None for all.
        batch_size: contexts that are read together.
        dtype: of a model that is loaded, as `lowkey.load` takes it.
        device: of a model that is loaded, as `lowkey.load` takes it.
        measured: earlier answers of the same job.
        progress: shows progress.
        more: of HFLM's arguments those in `PASSED_ON`; `option.NAME` is an option of the policy.

    Raises:
        LowkeyError: for an unknown argument, or a setting that no request can be measured over.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        setting: Setting | None = None,
        plan: str | None = None,
        policy: str | None = None,
        budget: str | int | None = None,
        bits: str | int | None = None,
        gates: str | None = None,
        protocol: str = ASK_AFTER,
        chunk: int | None = None,
        batch_size: int | str = 1,
        dtype: str = "auto",
        device: str | None = None,
        measured: Measured | None = None,
        progress: Progress = silent,
        **more: Any,
    ) -> None:
        options = {name.removeprefix("option."): more.pop(name) for name in list(more) if "." in name}
        self.protocol, size = checked_protocol(protocol), checked_batch_size(batch_size)
        if unknown := [name for name in more if name not in PASSED_ON]:
            raise LowkeyError(
                f"model argument {unknown[0]!r}: is not known; {nearest_name(unknown[0], OWN + PASSED_ON)}"
            )
        if isinstance(pretrained, str):
            # lm-eval names the first GPU where nobody names a device
            place = "auto" if device is None or device.startswith("cuda:") else device
            pretrained, tokenizer = loading.load(pretrained, dtype, place)
        more = {name: value for name, value in more.items() if value is not None}
        super().__init__(pretrained, tokenizer=tokenizer, batch_size=size, **more)
        self.setting = setting or setting_of(self.model, plan, policy, budget, bits, gates, options)
        check_setting(self.setting)
        self.chunk, self.contexts_at_once = chunk, size
        self.measured, self.show = measured or Measured(), progress
        self.measures: list[dict[str, Any]] = []
        self.occurrences: dict[str, int] = {}

    # -- what lm-eval calls

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations over compressed contexts, and whether each is written greedily."""
        made = [self._scored_request(i, instance) for i, instance in enumerate(requests)]
        answers = self._answered(made, self._score)
        found = [(-float("inf") if total is None else float(total), bool(same)) for total, same in answers]
        for instance, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", instance.args, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, each piece over the compressed cache of those before it."""
        if self.setting.needs_second_pass:
            raise LowkeyError(
                f"{self.setting.name}: chooses tokens by reading the context a second time, and "
                "loglikelihood_rolling reads a text once; leave such tasks out"
            )
        made, counts = list[Request](), list[int]()
        for instance in requests:
            windows = [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(instance.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for number, (context, scored) in enumerate(windows):
                tail = tuple([*context, *scored][:-1])
                key, task = self._key(instance, number), str(instance.task_name)
                made.append(Request(key, len(made), task, (), tail, ROLLING, tuple(scored), len(windows) > 1))
            counts.append(len(windows))
        answers = iter(self._answered(made, self._stream))
        totals = [sum(float(next(answers)[0]) for _ in range(count)) for count in counts]
        for instance, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", instance.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers that are written over compressed contexts."""
        made = [self._written_request(i, instance) for i, instance in enumerate(requests)]
        answers = self._answered(made, self._write)
        for instance, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", instance.args, answer)
        return answers

    def get_model_info(self) -> dict:
        """What lm-eval writes of the model into its results, with what was held."""
        return super().get_model_info() | {
            "lowkey": {
                "setting": self.setting.row() | {"name": self.setting.name},
                "protocol": self.protocol,
                "tasks": self.summaries(),
            }
        }

    def summaries(self) -> dict[str, dict]:
        """By task, the means of what was measured of its requests."""
        tasks = dict.fromkeys(str(m["task"]) for m in self.measures)
        return {task: request_summary([m for m in self.measures if m["task"] == task]) for task in tasks}

    # -- requests

    def _key(self, instance: Instance, window: int = 0) -> str:
        """The name under which an answer is saved. Equal requests are counted, since they may be sampled."""
        asked = [self.setting.name, instance.task_name, instance.request_type, list(instance.args), window]
        name = hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()[:24]
        self.occurrences[name] = number = self.occurrences.get(name, 0) + 1
        return f"{name} {number}"

    def _scored_request(self, number: int, instance: Instance) -> Request:
        """A request for the likelihood of a continuation, with the tokens that HFLM would read."""
        prompt, continuation = instance.args[:2]
        if prompt:
            start, scored = self._encode_pair(prompt, continuation)
        else:
            start, scored = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            if scored[0] == self.prefix_token_id:
                start, scored = scored[:1], scored[1:]
        ids = (start + scored)[-(self.max_length + 1) :][:-1]
        cut = len(start) + len(scored) - 1 - len(ids)
        latest = len(ids) - len(scored)  # the last token of the prompt predicts the continuation
        wanted = self._context_tokens(instance, prompt, start, scored=True) - cut
        split = max(0, min(wanted, latest))
        return Request(
            self._key(instance),
            number,
            str(instance.task_name),
            tuple(ids[:split]),
            tuple(ids[split:]),
            self.protocol,
            tuple(scored),
            cut > 0,
        )

    def _written_request(self, number: int, instance: Instance) -> Request:
        """A request for an answer, with the tokens that HFLM would read."""
        prompt, given = instance.args[:2]
        room = self.max_length - normalize_gen_kwargs(dict(given), self.max_gen_toks)["max_gen_toks"]
        if room < 1:
            raise LowkeyError(
                f"task {instance.task_name!r}: its answers may take all of max_length {self.max_length}; "
                "give a larger one"
            )
        whole = self.tok_batch_encode([prompt], truncation=self.truncation)[0][0].tolist()
        ids = whole[-room:]
        cut, latest = len(whole) - len(ids), len(ids) - 1
        split = max(0, min(self._context_tokens(instance, prompt, whole, scored=False) - cut, latest))
        return Request(
            self._key(instance),
            number,
            str(instance.task_name),
            # without a context before the question, the prompt is compressed as the answer is written
            tuple(ids[: split or latest]),
            tuple(ids[split or latest :]),
            self.protocol if split else DECODING,
            (),
            cut > 0,
            json.dumps(given, sort_keys=True),
        )

    def _context_tokens(self, instance: Instance, prompt: str, ids: list[int], scored: bool) -> int:
        """How many tokens of a prompt are compressed before the rest is read."""
        document = instance.doc if isinstance(instance.doc, Mapping) else {}
        decoding = not scored and document.get("context") == "" and "suite" in document
        if self.protocol != ASK_AFTER:
            return 0 if decoding else len(ids) - 1
        place = context_length(str(instance.task_name), document, prompt, scored)
        if place is None:
            return len(ids) - 1
        alone = self.tok_encode(prompt[:place]) if place else []
        # a token that reaches into the question is the question's
        same = (i for i, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b)
        return next(same, min(len(alone), len(ids)))

    # -- the way through the cache

    def _answered(
        self, requests: list[Request], answer: Callable[[ContextBatch], Iterator[tuple]]
    ) -> list[Any]:
        """The answers to requests, in their order. Those that were saved are not asked again."""
        todo = [r for r in requests if r.key not in self.measured]
        padded = self.chunk is None and self.setting.small is None
        work = list(batches(todo, self.contexts_at_once, self.setting, padded))
        try:
            own = self.measured.share(work)
            for batch in self.show(own, f"{self.setting.name}, {len(todo)} requests"):
                for request, found, held, written in answer(batch):
                    self.measured.once(request.key, lambda: request.record(found, held, written))  # noqa: B023
        finally:
            self.measured.write()  # also after an interrupt: the same job then resumes
        self.measured.gather()
        saved = [self.measured[r.key] for r in requests]
        self.measures += [{k: v for k, v in s.items() if k != "answer"} for s in saved]
        return [s["answer"] for s in saved]

    def _score(self, batch: ContextBatch) -> Iterator[tuple[Request, list, float, int]]:
        """Answers to a batch of `loglikelihood`."""
        contexts = self._read(batch)
        parts = list(batch.parts(self.contexts_at_once))
        for part in parts:
            cache, ids, mask, rows = continued(self.setting, contexts, part, part is parts[-1])
            with self._precision():
                logits = tail_logits(self.model, cache, ids, mask, part)
            logits = F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
            for (_, request), row in zip(part, rows, strict=True):
                found = _likelihood(logits[row], request.scored)
                yield request, found, contexts.held, len(request.scored)

    def _stream(self, batch: ContextBatch) -> Iterator[tuple[Request, list, float, int]]:
        """Answers to a batch of `loglikelihood_rolling`."""
        for part in batch.parts(self.contexts_at_once):
            ids = torch.tensor([r.tail for _, r in part], device=self.device)
            cache, keep = self.setting.make(), max(len(r.scored) for _, r in part)
            # logits of a whole text would be the largest tensor of all, so each piece's are used at once
            found, at = [[0.0, True] for _ in part], ids.shape[1] - keep
            with self._precision():
                for logits in streamed_logits(self.model, cache, ids, self.chunk or SCORED_AT_ONCE, keep):
                    logits = F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
                    for row, (_, request) in enumerate(part):
                        start = at - (ids.shape[1] - len(request.scored))
                        scored = request.scored[max(0, start) : max(0, start + logits.shape[1])]
                        if scored:
                            total, same = _likelihood(logits[row], scored)
                            found[row] = [found[row][0] + total, found[row][1] and same]
                    at += logits.shape[1]
            for row, (_, request) in enumerate(part):
                yield request, found[row], cache.nbytes() / len(part), len(request.scored)

    def _write(self, batch: ContextBatch) -> Iterator[tuple[Request, str, float, int]]:
        """Answers to a batch of `generate_until`."""
        contexts = self._read(batch)
        given = normalize_gen_kwargs(json.loads(batch.requests[0][1].options), self.max_gen_toks)
        until = handle_stop_sequences(
            given.pop("until", None), eos=self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        )
        most = given.pop("max_gen_toks")
        given.pop("max_length", None)
        if given.get("num_beams", 1) != 1:
            raise LowkeyError(
                f"num_beams {given['num_beams']}: a compressed cache is not searched in beams; leave it out"
            )
        parts = list(batch.parts(self.contexts_at_once))
        for part in parts:
            cache, ids, mask, rows = continued(self.setting, contexts, part, part is parts[-1])
            whole = self._model_generate(
                context=ids,
                max_length=ids.shape[1] + most,
                stop=until,
                attention_mask=mask,
                past_key_values=cache,
                **given,
            )
            for (_, request), row in zip(part, rows, strict=True):
                new = whole[row, ids.shape[1] :].tolist()
                yield request, self._text(new, until), contexts.held, self._length(new)

    def _text(self, new: list[int], until: list[str]) -> str:
        """The answer that HFLM makes of new tokens."""
        end = self.think_end_token
        if isinstance(end, int) and end in new:
            new = new[len(new) - new[::-1].index(end) :]
        words = self.tok_decode(new)
        words = words.lstrip() if isinstance(end, int) else words
        return postprocess_generated_text(words, until, end if isinstance(end, str) else None)

    def _length(self, new: list[int]) -> int:
        """Tokens of an answer, without the padding behind it."""
        padding = {self.tokenizer.pad_token_id, self.eot_token_id}
        return next((len(new) - i for i, token in enumerate(reversed(new)) if token not in padding), 0)

    def _read(self, batch: ContextBatch) -> Any:
        """The contexts of a batch, read and compressed."""
        pad = self.tokenizer.pad_token_id or 0
        with self._precision():
            return read_contexts(self.model, self.tokenizer, self.setting, batch, self.chunk, pad)

    def _precision(self) -> Any:
        """Autocast, where mixed precision was asked for."""
        dtype = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)


def _likelihood(logits: Tensor, scored: Ids | Sequence[int]) -> list:
    """The log-likelihood of ids, and whether each is the most likely one.

    Args:
        logits: (n, V), log-probabilities; the last rows predict the ids.
        scored: the ids.
    """
    ids = torch.tensor(scored, device=logits.device)
    own = logits[len(logits) - len(ids) :]
    same = bool((own.argmax(-1) == ids).all())
    return [float(own.gather(1, ids.unsqueeze(1)).sum()), same]


def checked_protocol(protocol: str) -> str:
    """A protocol. Raises: LowkeyError for an unknown one."""
    if protocol not in PROTOCOLS:
        raise LowkeyError(f"protocol {protocol!r}: is not known; {nearest_name(protocol, PROTOCOLS)}")
    return protocol


def checked_batch_size(size: int | str) -> int:
    """A batch size. Raises: LowkeyError for `auto` or a number below 1."""
    if not str(size).isdigit() or int(size) < 1:
        raise LowkeyError(f"batch size {size!r}: contexts that are read together; give a number of 1 or more")
    return int(size)


def check_setting(setting: Setting) -> None:
    """Refuse what no task of lm-eval can be measured over. Raises: LowkeyError."""
    if setting.sees_answer:
        raise LowkeyError(f"{setting.name}: is shown the right answer, which lm-eval does not hand over")
    if setting.small is not None:
        raise LowkeyError(f"{setting.name}: a small model reads along, which lm-eval's tasks cannot drive")

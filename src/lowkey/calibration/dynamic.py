"""Plans in which a gate gives every token a rank of its own (arXiv:2603.04411).

    plan = make_dynamic_plan(model, tokenizer, training=GateTraining(target=0.4))
    cache = lowkey.make_cache(model, plan)

Only the paper's abstract is known to us; the design is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.calibration.calibrate import HELD_OUT_SHARE, Sample, calibration_windows, provenance_of
from lowkey.calibration.statistics import gather_statistics
from lowkey.core import files
from lowkey.core.options import nearest_name
from lowkey.core.progress import Progress, silent
from lowkey.core.types import LAYOUTS, Budget, Heads, Layout, LowkeyError
from lowkey.methods import DYNAMIC_METHODS, dynakv
from lowkey.methods.dynakv import GateTraining
from lowkey.models import families
from lowkey.models.attention_interface import attach
from lowkey.plan.plan import NO_METHOD, Plan
from lowkey.plan.token_ranks import TokenRanks

(DYNAMIC_METHOD,) = DYNAMIC_METHODS  # the only one


def make_dynamic_plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str] | None = None,
    *,
    layout: Layout = "post_rope",
    key_bases: Heads = "shared",
    sample: Sample | None = None,
    training: GateTraining | None = None,
    work: Path | None = None,
    progress: Progress = silent,
) -> Plan:
    """Fit PCA bases and train gates on a text.

    Args:
        model: a model; it becomes attached.
        tokenizer: the model's tokenizer.
        texts: what to calibrate on. None: the embedded text.
        layout: whether keys are stored before or after their rotation.
        key_bases: one basis of keys for all KV heads of a layer (`shared`), or one for each (`per_head`).
        sample: which windows of the text to use; a quarter of them only judges. None: the defaults.
        training: how to train; `training.target` is the share of coordinates to keep. None: the defaults.
        work: a folder to save progress into and to resume from.
        progress: shows how far it is.

    Raises:
        LowkeyError: for an unsupported model or layout, too short a text, or a target out of reach.
    """
    shape, sample, training = families.geometry(model), sample or Sample(), training or GateTraining()
    if layout not in list(LAYOUTS):
        raise LowkeyError(f"layout {layout!r} is unknown; {nearest_name(layout, LAYOUTS)}")
    families.check_layout(model, layout)
    dynakv.check_target(training.target, shape.head_dim)
    attach(model)
    windows = calibration_windows(model, tokenizer, texts, sample)
    held_out = max(1, round(HELD_OUT_SHARE * len(windows)))
    provenance = provenance_of(model, windows, sample)
    job = {
        "provenance": provenance,
        "layout": layout,
        "key_bases": key_bases,
        "training": asdict(training),
        "batch": sample.batch,
    }
    # Whatever changes the bases or the gates, so that only the same job is resumed.
    work = files.job_folder(work, job)
    # Bases are fitted on the training windows; the held-out ones only judge the gates.
    batches = progress(windows[:-held_out].split(sample.batch), "second moments")
    statistics = gather_statistics(model, batches, work)
    bases = {i: dynakv.pca_bases(s, layout, key_bases) for i, s in statistics.items()}
    trained = dynakv.train_gates(model, bases, windows, held_out, layout, training, progress, work)
    d = shape.head_dim
    gates = {i: gate.to(torch.device("cpu")) for i, gate in trained.gates.items()}
    return Plan(
        factors={i: b.at(d, d) for i, b in bases.items()},
        layout=layout,
        method={"name": DYNAMIC_METHOD, "parameters": {}},
        allocator=NO_METHOD,
        budget=str(Budget(100 * training.target, "%")),
        geometry=asdict(shape),
        provenance=provenance,
        token_ranks=TokenRanks(
            gates, dynakv.levels_of(d), trained.share, trained.divergence, asdict(training)
        ),
    )

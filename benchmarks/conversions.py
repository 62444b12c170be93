"""What a trained model loses when it is given another attention, before and after a little training.

    python benchmarks/conversions.py docs/results/smollm2 --model smollm2 --calibration novels.txt \\
        --data one.txt --data two.txt --data three.txt

Each form is converted in the metric of what projections make of the calibration text where that helps, and
trained further on that text. `as it is` is the model itself, given the same training, so that what training
on this text does by itself can be told from recovery. Losses are in nats per token over windows of held-out
texts. Models and losses are kept in OUT/work until all is done: the same command goes on after an
interrupt. Writes OUT/conversions.json and prints a Markdown table.
"""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.attention import layer_costs
from lowkey.conversion import ConversionOptions, convert, input_moments, starting_loss
from lowkey.core import files, text
from lowkey.core.progress import bars
from lowkey.models import families
from lowkey.models.loading import load
from lowkey.pretraining import Recipe, pretrain

ALIGNED = ConversionOptions(basis="aligned")
FORMS: dict[
    str, tuple[str, dict, ConversionOptions, bool]
] = {  # attention, its fields, options, whether whitened
    "as it is": ("gqa", {"num_key_value_heads": 3}, ConversionOptions(), False),
    "MLA, c = 160, e = 32": ("mla", {"kv_lora_rank": 160, "qk_rope_head_dim": 32}, ConversionOptions(), True),
    "MLA, c = 96, e = 32": ("mla", {"kv_lora_rank": 96, "qk_rope_head_dim": 32}, ConversionOptions(), True),
    "LRKV full, r = 12": ("lrkv", {"lrkv_rank": 12}, ALIGNED, True),
    "MEA, 2 heads": ("mea", {"mea_num_component_heads": 2}, ALIGNED, True),
    "MEA, 1 head": ("mea", {"mea_num_component_heads": 1}, ALIGNED, True),
    "GQA, 1 head": ("gqa", {"num_key_value_heads": 1}, ALIGNED, True),
}


def main(
    out: Path,
    calibration: Annotated[Path, typer.Option(help="a UTF-8 text to whiten with and to train on")],
    data: Annotated[list[Path], typer.Option(help="held-out texts; repeat")],
    model: str = "smollm2",
    steps: int = 32,
    batch: Annotated[int, typer.Option(help="tokens per step")] = 2048,
    length: int = 512,
    lr: float = 3e-4,
    context: int = 1024,
    windows: Annotated[int, typer.Option(help="of each text")] = 4,
    only: Annotated[str, typer.Option(help="labels, separated by semicolons")] = "",
) -> None:
    loaded, tokenizer = load(model, "float32", "cpu")
    shape, rows, place = families.geometry(loaded), [], out / "conversions.json"
    texts = {path.name: text.read_text(path, "data") for path in data}
    training = {
        "tokens": steps * batch,
        "batch_tokens": batch,
        "length": length,
        "micro_batch": 1,
        "lr": lr,
        "warmup": 0.1,
        "decay": 0.5,
    }
    recipe = {
        "data": {"path": str(calibration), "tokenizer": model, "held_out": 0.0},
        "training": training | {"save_every": 8},
    }
    for label, (attention, fields, options, whitened) in FORMS.items():
        work = out / "work" / "".join(c if c.isalnum() else "-" for c in label)
        known = work.with_suffix(".json")
        if only and label not in only.split(";"):
            continue
        if not known.exists():
            moments = _moments(loaded, tokenizer, calibration, length) if whitened else None
            made = convert(loaded, attention, options=options, moments=moments, progress=bars, **fields)
            before = _losses(made.float(), tokenizer, texts, context, windows)
            trained = pretrain(Recipe.of(recipe), work, model=made, progress=bars, device="cpu")
            stored = statistics.mean(layer.stored for layer in layer_costs(made.config))
            after = _losses(trained.model, tokenizer, texts, context, windows)
            row = {
                "label": label,
                "attention": attention,
                **fields,
                "options": vars(options),
                "whitened": whitened,
                "stored": stored,
            }
            row |= {
                "before": before,
                "after": after,
                "seconds": trained.result["seconds"],
                "training": training,
            }
            known.write_text(json.dumps(row))
            shutil.rmtree(work)  # half a gigabyte
        rows.append(json.loads(known.read_text()))
    full = shape.kv_heads * shape.head_dim * 2
    files.write_json(
        place, {"model": model, "context": context, "full": full, "rows": rows}, "benchmark", ours=True
    )
    print("| form | bytes | loss before | after | minus the model's own |\n|---|---|---|---|---|")
    start = rows[0]["after"]
    for r in rows:
        lost = statistics.mean(r["after"][name] - start[name] for name in start)
        mean = [statistics.mean(r[when].values()) for when in ("before", "after")]
        print(
            f"| {r['label']} | {100 * r['stored'] / full:.0f} % | {mean[0]:.3f} | {mean[1]:.3f} "
            f"| {lost:.3f} |"
        )


def _moments(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Path, length: int
) -> dict[int, torch.Tensor]:
    ids = text.encode(tokenizer, text.read_text(corpus, "calibration"), model)
    return input_moments(
        model, text.sample_windows(ids, tokenizer, length, 32, 0, "calibration"), progress=bars
    )


def _losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: dict[str, str],
    context: int,
    windows: int,
) -> dict[str, float]:
    model.eval()
    return {
        name: starting_loss(model, tokenizer, t, context=context, windows=windows, batch=1).nats
        for name, t in texts.items()
    }


if __name__ == "__main__":
    typer.run(main)

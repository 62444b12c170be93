"""kvpress and lowkey side by side: the same model, texts, questions and number of kept tokens.

    python benchmarks/kvpress/compare.py OUT.json --work FOLDER [--contexts 4 --tokens 512]

Each library runs in an environment and a process of its own (theirs.py, ours.py) and writes files, which this
script compares. A context of told facts is read and a quarter of its tokens is kept; then every fact is asked
for over what was kept, so nothing that evicts has seen a question. Every method runs in kvpress as it is, in
lowkey as it is (`ours`), and in lowkey with kvpress's options (`alike`). With `--beside`, a folder of
`pip install --target` with kvpress in it (docs/how-to/use-a-press.md), kvpress's scores run as policies of
lowkey, too (`press`).

The same command goes on after an interrupt. With `--prepare` it only writes FOLDER/job.json, whose contexts
can then be given to the two sides one by one; with `--join` it only compares what they have written. Times
are ratios to the full cache of the same library, on the same context in the same process.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from environment import PINNED, python
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parents[1]))
from policies import draw_context

from lowkey.core import files, text
from lowkey.core.intervals import paired_bootstrap
from lowkey.evaluate.asking import Frame
from lowkey.evaluate.machine import machine
from lowkey.models.loading import load, load_tokenizer
from lowkey.models.packaged import folder

HERE = Path(__file__).parent
DROPPED = 0.75
SNAPKV = {"window": 64, "kernel": 5, "pooling": "mean", "recent": 64, "sinks": 0}  # kvpress's, in our words
BARE = {"sinks": 0, "recent": 0}
SCORERS = (
    "StreamingLLMPress",
    "KnormPress",
    "KeyDiffPress",
    "TOVAPress",
    "SnapKVPress",
    "ExpectedAttentionPress",
)
REPEAT = "\n\nRepeat the previous context exactly."


def press(name: str, inner: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """How theirs.py makes a press; the share goes to the innermost one."""
    if inner:
        return {"name": name, "inner": inner, "options": options}
    return {"name": name, "options": {"compression_ratio": DROPPED, **options}}


# Method: kvpress's press, our policy at its defaults (or nothing), our policy with kvpress's options.
METHODS: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "random": (press("RandomPress", seed=0), ("random", {}), None),
    "streamingllm": (press("StreamingLLMPress"), ("streamingllm", {}), None),
    "knorm": (press("KnormPress"), ("knorm", {}), ("knorm", BARE)),
    "keydiff": (press("KeyDiffPress"), ("keydiff", {}), ("keydiff", BARE)),
    "tova": (press("TOVAPress"), ("tova", {}), ("tova", {"sinks": 0, "recent": 1})),
    "snapkv": (press("SnapKVPress"), ("snapkv", {}), ("snapkv", SNAPKV)),
    "expected-attention": (
        press("ExpectedAttentionPress"),
        ("expected-attention", {}),
        ("expected-attention", {"allocator": "uniform", "epsilon": 0, "recent": 0}),
    ),
    "expected-attention, Ada-KV": (
        press("AdaKVPress", press("ExpectedAttentionPress", epsilon=0.01)),
        None,
        ("expected-attention", {"recent": 0}),
    ),
    "pyramidkv": (press("PyramidKVPress"), ("pyramidkv", {}), ("snapkv", SNAPKV)),
    "pyramidkv, window 4": (
        press("PyramidKVPress", window_size=4),
        None,
        ("pyramidkv", {**SNAPKV, "window": 4, "recent": 4}),
    ),
    "ada-kv": (press("AdaKVPress", press("SnapKVPress")), ("ada-kv", {}), ("ada-kv", SNAPKV)),
    "ada-kv, no safeguard": (
        press("AdaKVPress", press("SnapKVPress"), alpha_safeguard=0.0),
        None,
        ("ada-kv", {**SNAPKV, "alpha": 0}),
    ),
    "kvzip": (
        press("KVzipPress"),
        ("kvzip", {}),
        ("kvzip", {"recent": 0, "chunk": 2048, "prompt": "TEMPLATE"}),
    ),
    "kvzip, no template": (
        press("KVzipPress"),
        None,
        ("kvzip", {"recent": 0, "chunk": 2048, "prompt": REPEAT + "\n"}),
    ),
    "think": (
        {"name": "ThinKPress", "options": {"key_channel_compression_ratio": 0.4}},
        ("think", {}),
        ("think", {**BARE, "channels": 39 / 64}),
    ),
}


def main(
    out: Path,
    work: Annotated[Path, typer.Option(help="folder for what the two processes write")],
    model: str = "smollm2",
    data: Annotated[Path | None, typer.Option(help="a held-out text")] = None,
    contexts: int = 4,
    tokens: Annotated[int, typer.Option(help="of a context")] = 512,
    beside: Annotated[Path | None, typer.Option(help="folder with kvpress for lowkey's own Python")] = None,
    prepare: Annotated[bool, typer.Option(help="only write what the sides are told")] = False,
    join: Annotated[bool, typer.Option(help="only compare what the sides wrote")] = False,
) -> None:
    """Run both sides and write the comparison."""
    work.mkdir(parents=True, exist_ok=True)
    job_file = work / "job.json"
    if not join:
        job_file.write_text(json.dumps(make_job(model, data, contexts, tokens, work, bool(beside))))
        if prepare:
            return
        for side, executable, paths in (("theirs", python(), []), ("ours", Path(sys.executable), [beside])):
            known = [*map(str, filter(None, paths)), *filter(None, [os.environ.get("PYTHONPATH")])]
            command = [executable, "-W", "ignore", HERE / f"{side}.py", job_file, work / side]
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(known)})
    job, tokenizer = json.loads(job_file.read_text()), load_tokenizer(model)
    compared = {
        "environment": machine("cpu") | {"kvpress": PINNED},
        "model": model,
        "tokens": len(job["contexts"][0]["ids"]),
        "kept": 1 - DROPPED,
        "contexts": len(job["contexts"]),
        "questions": sum(len(c["asked"]) for c in job["contexts"]),
        "rows": [compared_row(name, job, work, tokenizer) for name in ["full", *METHODS]],
    }
    files.write_json(out, compared, "benchmark", ours=True)


def make_job(
    model: str, data: Path | None, contexts: int, tokens: int, work: Path, presses: bool
) -> dict[str, Any]:
    """What both sides are told."""
    loaded, tokenizer = load(model, "float32", "cpu")
    words = text.read_text(data, "data") if data else text.embedded_text("evaluation")
    ids = tokenizer(words, add_special_tokens=False, verbose=False).input_ids
    drawn = [draw_context(random.Random(f"{n}"), tokenizer, ids, tokens) for n in range(contexts)]
    frame = Frame.of(tokenizer)
    place = folder(model)
    theirs: dict[str, Any] = {"full": {}}
    ours: dict[str, Any] = {"full": {}}
    for name, (spec, own, alike) in METHODS.items():
        theirs[name] = {"press": spec}
        if name == "kvzip, no template":
            theirs[name]["folder"] = str(without_template(place, work / "without-template"))
        for variant, chosen in (("ours", own), ("alike", alike)):
            if chosen:
                ours[f"{name}, {variant}"] = policy_of(*chosen, tokens, frame)
        if presses and spec["name"] in SCORERS:
            options = {key: value for key, value in spec["options"].items() if key != "compression_ratio"}
            ours[f"{name}, press"] = policy_of(f"kvpress:{spec['name']}", options, tokens, frame)
    return {
        "model": model,
        "folder": str(place),
        "contexts": [{"ids": c.ids, "asked": c.asked} for c in drawn],
        "ends": sorted(frame.ends(loaded)),
        "most": 1 + max(len(answer) for c in drawn for _, answer in c.asked),
        "theirs": theirs,
        "ours": ours,
    }


def policy_of(policy: str, options: dict[str, Any], tokens: int, frame: Frame) -> dict[str, Any]:
    """How ours.py makes a policy. ThinK drops channels and keeps all tokens: its budget is their bytes."""
    after = frame.tokenizer.decode(frame.question("")) if frame.chat else ""
    options = {k: REPEAT + after if v == "TEMPLATE" else v for k, v in options.items()}
    if policy == "think":
        share = (1 + options.get("channels", 0.6)) / 2
        return {"policy": policy, "options": options, "budget": f"{100 * share:.4f}%", "channels": True}
    return {"policy": policy, "options": options, "budget": f"{tokens - int(tokens * DROPPED)} tokens"}


def without_template(place: Path, copy: Path) -> Path:
    """A folder with the same tokenizer, which has no chat template."""
    copy.mkdir(exist_ok=True)
    for path in place.iterdir():
        if path.name.startswith(("tokenizer", "special")) or path.name == "config.json":
            shutil.copy(path, copy)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    return copy


def compared_row(name: str, job: dict[str, Any], work: Path, tokenizer: Any) -> dict[str, Any]:
    """One method: what each side measured, and how far those of lowkey agree with kvpress.

    Only contexts count that kvpress and lowkey's policies have measured; presses may have fewer.
    """
    found = {"theirs": results(work / "theirs", name), "ours": results(work / "ours", name)}
    if name != "full":
        found = {"theirs": found["theirs"]}
        found |= {x: results(work / "ours", f"{name}, {x}") for x in ("ours", "alike", "press")}
    found = {side: measured for side, measured in found.items() if measured}
    common = set.intersection(*(set(measured) for side, measured in found.items() if side != "press"))
    row: dict[str, Any] = {"method": name, "contexts": len(common)}
    whole = results(work / "theirs", "full")
    for side, every in found.items():
        measured = {n: r for n, r in every.items() if n in common}
        row[side] = {
            "right": statistics.fmean(
                x for n, r in measured.items() for x in judged(r, job["contexts"][n], tokenizer)
            ),
            "nats": statistics.fmean(x for r in measured.values() for x in r["nats"]),
            "bytes": statistics.fmean(r["held"] / whole[n]["held"] for n, r in measured.items()),
            "bytes_outside": statistics.fmean(r["outside"] / whole[n]["held"] for n, r in measured.items()),
        }
        key = name if side == "theirs" or name == "full" else f"{name}, {side}"
        row[side] |= times(measured)
        if side != "theirs":
            row[side] |= agreement(name, key, measured, found["theirs"], work)
    return row


def results(place: Path, name: str) -> dict[int, dict[str, Any]]:
    """What a side measured of a row, by context."""
    lines = (place / "results.jsonl").read_text().splitlines()
    return {r["context"]: r for r in map(json.loads, lines) if r["row"] == name}


def judged(result: dict[str, Any], context: dict[str, Any], tokenizer: Any) -> list[float]:
    """Whether each answer is right: each of its digits is the likeliest, and then no further digit."""
    right = []
    for (_, answer), best in zip(context["asked"], result["best"], strict=True):
        ends = not str(tokenizer.decode(best[-1:])).lstrip(" ")[:1].isdigit()
        right.append(float(best[:-1] == answer and ends))
    return right


def agreement(
    name: str, key: str, ours: dict[int, Any], theirs: dict[int, Any], work: Path
) -> dict[str, Any]:
    """How far a row of ours agrees with kvpress's.

    Returns:
        `kept`: the share of kvpress's kept tokens (or channels) that ours keeps, over all layers and heads;
        `kept_of_heads`, the same for each layer and head; `texts`, the share of answers that are the same;
        `nats_over_theirs`, the mean difference with an interval over questions.
    """
    both = sorted(set(ours) & set(theirs))
    masks = [[mask(work / side, n, row) for n in both] for side, row in (("ours", key), ("theirs", name))]
    shared = sum((a & b).sum(-1) for a, b in zip(*masks, strict=True))
    wanted = sum(b.sum(-1) for b in masks[1])
    written = [x == y for n in both for x, y in zip(ours[n]["texts"], theirs[n]["texts"], strict=True)]
    nats = [[x for n in both for x in side[n]["nats"]] for side in (ours, theirs)]
    over, *interval = paired_bootstrap(*nats)
    return {
        "kept": float(shared.sum() / wanted.sum()),
        "kept_of_heads": [[round(float(x), 3) for x in heads] for heads in shared / wanted.clamp_min(1)],
        "texts": statistics.fmean(written),
        "nats_over_theirs": over,
        "nats_over_theirs_95": interval,
    }


def mask(place: Path, context: int, row: str) -> Any:
    """Which tokens (layers, h, t) or channels (layers, h, d) a row kept."""
    return load_file(place / f"{context}-{row.replace(' ', '_')}.safetensors")["kept"].bool()


def times(measured: dict[int, Any]) -> dict[str, float]:
    """Prefill and step as ratios to the full cache's on the same context, medians over contexts."""
    timed = [r for r in measured.values() if "full_prefill" in r]
    if not timed:
        return {}
    return {
        "prefill": statistics.median(r["prefill"] / r["full_prefill"] for r in timed),
        "step": statistics.median(
            statistics.median(r["steps"]) / statistics.median(r["full_steps"]) for r in timed
        ),
    }


if __name__ == "__main__":
    typer.run(main)

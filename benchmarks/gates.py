"""How close the gates of Fast KVzip come to KVzip, in the order of tokens of held-out text.

    python benchmarks/gates.py smollm2 docs/results/smollm2/gates.json --gates facts=FOLDER \\
        --gates novel=FOLDER --data one.txt --data two.txt

`rank` is Spearman's correlation with KVzip's scores on windows that no gate was trained on: of the tokens of
a head, in the mean over heads, and of all heads together. Beside the gates stand two controls: the gates of
other layers, and a regressor that knows the position of a token alone (the mean score at nearby positions of
the other windows). `kept` is how much of the asked fact's value in prompts of the recall task is among the
best tokens by a score, over all layers and heads. `benchmarks/policies.py` measures recall.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn.functional import avg_pool1d
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.core import files, text
from lowkey.core.progress import bars
from lowkey.evaluate.recall import draw_episodes, usual_form
from lowkey.heads.fast_kvzip import inputs_of_gates, kvzip_scores
from lowkey.heads.scores import spearman
from lowkey.models.fingerprint import model_fingerprint
from lowkey.models.loading import load
from lowkey.ops.sink_gate import sink_gate
from lowkey.policies.gates import Gates

NEARBY = 31  # positions over which the regressor takes the mean
app = typer.Typer(add_completion=False)


@app.command()
def run(
    model: str,
    out: Path,
    gates: Annotated[list[str], typer.Option(help="LABEL=FOLDER; repeat")],
    data: Annotated[list[Path] | None, typer.Option(help="held-out texts; repeat")] = None,
    context: int = 1024,
    windows: int = 8,
    looked: Annotated[int, typer.Option(help="prompts of which the kept share of a value is measured")] = 8,
) -> None:
    """Measure all and print the rows."""
    loaded, tokenizer = load(model, "auto", "cpu")
    folders = dict(given.split("=", 1) for given in gates)
    learnt = {label: Gates.load(folder) for label, folder in folders.items()}
    words = "\n".join(text.read_text(p, "data") for p in data) if data else text.embedded_text("evaluation")
    ids = text.encode(tokenizer, words, loaded)
    held_out = text.sample_windows(ids, tokenizer, context, windows, 0, "data")
    rows = _ranks(loaded, tokenizer, learnt, held_out)
    rows += _values_kept(loaded, tokenizer, learnt, ids.tolist(), context, looked)
    about = {"model": model, "context": context, "windows": windows, "prompts": looked}
    about |= {
        "gates": {label: g.settings for label, g in learnt.items()},
        "model_sha256": model_fingerprint(loaded),
    }
    files.write_json(out, {**about, "rows": rows}, "benchmark", ours=True)
    print(json.dumps(rows, indent=1))


@torch.no_grad()
def _by_gates(gates: Sequence[dict[str, Tensor]], inputs: Sequence[Tensor]) -> Tensor:
    """Scores (layers, h, t) of what each layer sees."""
    return torch.stack([sink_gate(x.float(), gate).T for gate, x in zip(gates, inputs, strict=True)])


def _both(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """KVzip's scores (layers, h, t) of a text, and what the gates see of it."""
    return torch.stack(kvzip_scores(model, tokenizer, ids)).float(), inputs_of_gates(model, ids)


def _ranks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, learnt: dict[str, Gates], windows: Tensor
) -> list[dict]:
    """Rank correlations of the gates and of the two controls."""
    pairs = [_both(model, tokenizer, row[None]) for row in bars(windows, "held-out windows", len(windows))]
    wanted = torch.stack([scores for scores, _ in pairs])
    total = wanted.sum(0)
    found = {"position alone": [_smooth((total - own) / (len(wanted) - 1)) for own in wanted]}
    for label, own in learnt.items():
        half = len(own.layers) // 2
        found[label] = [_by_gates(own.layers, x) for _, x in pairs]
        others = own.layers[half:] + own.layers[:half]
        found[f"{label}, of other layers"] = [_by_gates(others, x) for _, x in pairs]
    return [
        {"part": "rank", "of": name, **_correlated(list(zip(scores, wanted, strict=True)))}
        for name, scores in found.items()
    ]


def _smooth(scores: Tensor) -> Tensor:
    """The mean over nearby positions."""
    return avg_pool1d(scores, NEARBY, 1, NEARBY // 2, count_include_pad=False)


def _correlated(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Mean rank correlations over windows: of the tokens of a head, and of those of all heads."""
    by_head = [
        spearman(a, b)
        for found, wanted in pairs
        for a, b in zip(found.flatten(0, 1), wanted.flatten(0, 1), strict=True)
    ]
    return {
        "per_head": statistics.fmean(by_head),
        "all_heads": statistics.fmean(spearman(found, wanted) for found, wanted in pairs),
    }


def _values_kept(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    learnt: dict[str, Gates],
    haystack: list[int],
    context: int,
    count: int,
) -> list[dict]:
    """Which share of the asked value's tokens is among the best 30 % of the prompt, over layers and heads."""
    shares: dict[str, list[float]] = {}
    for episode in bars(
        draw_episodes(tokenizer, haystack, context, count, 0, usual_form(tokenizer)), "prompts", count
    ):
        prompt, answer = episode.prompt[: -len(episode.question)], episode.answer
        at = [i for i in range(len(prompt)) if prompt[i : i + len(answer)] == answer]
        if not at:
            continue
        wanted, inputs = _both(model, tokenizer, torch.tensor([prompt]))
        found = {"kvzip": wanted} | {label: _by_gates(own.layers, inputs) for label, own in learnt.items()}
        for name, scores in found.items():
            least = scores.flatten().kthvalue(round(0.7 * scores.numel())).values
            value = scores[:, :, at[0] : at[0] + len(answer)]
            shares.setdefault(name, []).append(float((value > least).float().mean()))
    return [{"part": "kept", "of": name, "kept": statistics.fmean(own)} for name, own in shares.items()]


if __name__ == "__main__":
    app()

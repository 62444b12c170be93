"""A small model for SmallKV: some layers of a model, briefly distilled from the whole of it.

    python benchmarks/small_child.py MODEL OUT --data NOVEL.txt [--data ...] [--steps 120 --layers 0,1,5,...]

The child keeps the model's embeddings, its head and the layers that are named. It learns the model's
distribution of the next token (KL divergence), and the states between its layers that the model has at the
same places. It writes a model folder. Work that is stopped at any moment goes on from its last save, to the
same child; work of another model, text or number of steps is left alone. The embeddings and the head are not
trained.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.core import files, optimizer_state, text
from lowkey.core.progress import Progress, bars
from lowkey.models.fingerprint import data_fingerprint, model_fingerprint
from lowkey.models.loading import load

WARM_UP, RATE = 0.05, 1e-3
STATES = 2.0  # weight of the states beside the divergence

app = typer.Typer(add_completion=False)


@app.command()
def main(
    model: str,
    out: Path,
    data: Annotated[list[Path], typer.Option()],
    steps: int = 120,
    layers: str = "0,1,5,10,15,20,25,29",
    length: Annotated[int, typer.Option(help="tokens of a window")] = 512,
    save_every: Annotated[int, typer.Option(help="steps between two saves")] = 20,
) -> None:
    """Distil and save the child."""
    distil(model, out, data, steps, [int(i) for i in layers.split(",")], length, save_every, bars)


def distil(
    model: str,
    out: Path,
    data: list[Path],
    steps: int,
    kept: list[int],
    length: int,
    save_every: int,
    progress: Progress,
) -> None:
    """See `main`."""
    work = files.check_output(out, force=False)
    teacher, tokenizer = load(model, "auto", "cpu")
    student = child_of(teacher, kept)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), RATE, betas=(0.9, 0.95), weight_decay=0.0)
    windows = windows_of(data, tokenizer, length)
    known = {"model_sha256": model_fingerprint(teacher), "data_sha256": data_fingerprint(windows)}
    folder = files.job_folder(work, {**known, "layers": kept, "steps": steps})
    done = 0
    if (saved := files.read_work(folder, "training")) is not None:
        done = int(saved["step"])
        for name, p in trained.items():
            p.data.copy_(files.checked_tensor(saved, f"parameter.{name}", p, folder))
        optimizer_state.fill_state(optimizer, saved, str(folder))
    for step in progress(range(done, steps), "distilling", steps - done):
        share = step / steps
        for group in optimizer.param_groups:
            group["lr"] = (
                RATE * min(1.0, (step + 1) / (WARM_UP * steps)) * 0.5 * (1 + math.cos(math.pi * share))
            )
        losses = learn(teacher, student, windows[step % len(windows)].unsqueeze(0), kept)
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % save_every == 0:
            print(f"step {step + 1}: divergence {losses[0]:.3f}, states {losses[1]:.3f}", flush=True)
            tensors = {f"parameter.{name}": p.detach() for name, p in trained.items()}
            own = {"step": torch.tensor(step + 1), **optimizer_state.tensors_of(optimizer)}
            files.write_work(folder, "training", tensors | own)
    save(out, student, tokenizer)
    files.remove_work(work)


def child_of(model: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    """A model with some of another's layers, in fp32."""
    config = type(model.config).from_dict(model.config.to_dict() | {"num_hidden_layers": len(kept)})
    config.layer_types = None
    student = type(model)._from_config(config, dtype=torch.float32)
    own = {name: t.float() for name, t in model.state_dict().items() if ".layers." not in name}
    for place, layer in enumerate(kept):
        prefix = f"model.layers.{layer}."
        own |= {
            name.replace(prefix, f"model.layers.{place}."): t.float()
            for name, t in model.state_dict().items()
            if name.startswith(prefix)
        }
    student.load_state_dict(own)
    student.get_input_embeddings().weight.requires_grad_(False)
    student.get_output_embeddings().weight.requires_grad_(False)
    return student.train()


def windows_of(paths: list[Path], tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """Windows (n, length) of all texts, shuffled."""
    rows = []
    for path in paths:
        ids = torch.tensor(tokenizer(text.read_text(path, "data"), verbose=False).input_ids)
        rows.append(ids[: len(ids) // length * length].view(-1, length))
    joined = torch.cat(rows)
    return joined[torch.randperm(len(joined), generator=torch.Generator().manual_seed(0))]


def learn(
    teacher: PreTrainedModel, student: PreTrainedModel, ids: Tensor, kept: list[int]
) -> tuple[float, float]:
    """Add the gradients of one window; returns both parts of the loss."""
    with torch.no_grad():
        known = teacher(ids, use_cache=False, output_hidden_states=True)
        wanted = known.logits[0].float().log_softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        own = student(ids, use_cache=False, output_hidden_states=True)
    given = own.logits[0].float().log_softmax(-1)
    divergence = (wanted.exp() * (wanted - given)).sum(-1).mean()
    # what goes into a kept layer is what came out of all layers before it
    pairs = [(own.hidden_states[place], known.hidden_states[layer]) for place, layer in enumerate(kept)]
    states = torch.stack(
        [((x.float() - y.float()).square().sum(-1) / y.float().square().sum(-1)).mean() for x, y in pairs[1:]]
    ).mean()
    (divergence + STATES * states).backward()
    return divergence.item(), states.item()


def save(out: Path, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the model folder, whole or not at all."""
    student.config.dtype = torch.bfloat16  # in which it is loaded
    half = {name: t.to(torch.bfloat16) for name, t in student.state_dict().items()}
    with files.replacing_folder(out) as temporary:
        student.save_pretrained(temporary, state_dict=half)
        tokenizer.save_pretrained(temporary)


if __name__ == "__main__":
    app()

"""The comparison of docs/results/pretraining.md: attention kinds at equal tokens, each at its own learning
rate, over paired seeds.

    python benchmarks/pretraining.py run FOLDER_OF_TEXTS OUT --stages a,b,c [--tokens 10e6 --workers 2] python
    benchmarks/pretraining.py report OUT docs/results/pretraining.json

Stages: `a` learning-rate sweep (selection only, by validation loss), `b` the comparison at the chosen rates,
`c` the range of learning rates of MEA's parts (2 x 2, QK-norm and gate as controls), `d` MHA's runs of `b`
converted and trained on, `e` the arms of `b` at one rate for all (those that `b` ran at it count, too), `r`
LRKV's rank, `w` the arms of `b` with the feed-forward width solved for MHA's number of parameters. A stage
with a z before it (`za`, `zb`) is the same with output projections that start at zero. Runs are processes of
one thread each. Interrupted, the same command goes on: finished runs are kept, the others resume.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import pretraining_report
import torch
import typer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowkey.attention import LowkeyConfig, LowkeyForCausalLM, layer_costs, model_parameters
from lowkey.conversion import ConversionOptions, convert, input_moments
from lowkey.core import files
from lowkey.models.loading import load
from lowkey.pretraining import pretrain
from lowkey.pretraining.recipe import Recipe

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "tie_word_embeddings": True,
}
VOCABULARY, LENGTH = 1024, 256
MOMENT_ROWS = 64  # that say what projections read
PASSAGE = 20_000  # characters of a training document
HELD_NOVELS = 25  # every so many-th text is for the test loss only
ARMS: dict[str, dict] = {
    "MHA": {"attention": "mha"},
    "GQA-4": {"attention": "gqa", "num_key_value_heads": 4},
    "MQA": {"attention": "mqa"},
    "MLA-50": {"attention": "mla", "kv_lora_rank": 120, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
    "MLA-25": {"attention": "mla", "kv_lora_rank": 56, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
    "LRKV-50 full": {"attention": "lrkv", "lrkv_rank": 6},
    "LRKV-50 latent": {"attention": "lrkv", "lrkv_rank": 6, "lrkv_rope_mode": "latent"},
    "MEA-4": {"attention": "mea", "mea_num_component_heads": 4},
    "MEA-4, no norm": {"attention": "mea", "mea_num_component_heads": 4, "head_norm": "none"},
    "GTA-8": {"attention": "gta", "num_key_value_heads": 8},
    "K=V-8": {"attention": "k_eq_v", "num_key_value_heads": 8},
    "MEA-8": {"attention": "mea"},
    "MHA + head norm": {"attention": "mha", "head_norm": "shared"},
    "HLC only": {"attention": "mea", "head_norm": "none"},
    "MHA + QK-norm": {"attention": "mha", "qk_norm": True},
    "MHA + gate": {"attention": "mha", "attn_output_gate": True},
    **{f"LRKV r={r}": {"attention": "lrkv", "lrkv_rank": r} for r in (0, 2, 4, 8, 16)},
}
COMPARED = ("MHA", "GQA-4", "MQA", "MLA-50", "LRKV-50 full", "LRKV-50 latent", "MEA-4")
PARTS = ("MHA", "MHA + head norm", "HLC only", "MEA-8", "MHA + QK-norm", "MHA + gate")
RANKS = ("LRKV r=0", "LRKV r=2", "LRKV r=4", "LRKV r=8", "LRKV r=16")

# what MHA is converted into: attention, its fields, options, whether whitened
FORMS: dict[str, tuple[str, dict, ConversionOptions, bool]] = {
    "MHA": ("mha", {}, ConversionOptions(), False),
    "GQA-4, mean": ("gqa", {"num_key_value_heads": 4}, ConversionOptions(), False),
    "GQA-4, mean of aligned heads": (
        "gqa",
        {"num_key_value_heads": 4},
        ConversionOptions(basis="aligned"),
        True,
    ),
    "GQA-4, first of two": ("gqa", {"num_key_value_heads": 4}, ConversionOptions(heads="first"), False),
    "MEA-4, weights": ("mea", {"mea_num_component_heads": 4}, ConversionOptions(), False),
    "MEA-4, aligned and whitened": (
        "mea",
        {"mea_num_component_heads": 4},
        ConversionOptions(basis="aligned"),
        True,
    ),
    "LRKV-50 full, whitened": ("lrkv", {"lrkv_rank": 6}, ConversionOptions(basis="aligned"), True),
    "LRKV-50 latent, whitened": (
        "lrkv",
        {"lrkv_rank": 6, "lrkv_rope_mode": "latent"},
        ConversionOptions(),
        True,
    ),
    "MLA-50, whitened": ("mla", {"kv_lora_rank": 120, "qk_rope_head_dim": 8}, ConversionOptions(), True),
}

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Job:
    """One training run."""

    stage: str
    arm: str
    lr: float
    seed: int
    tokens: int
    batch: int
    matched: bool = False
    source: int = 0  # tokens that the MHA which is converted was trained on

    @property
    def kind(self) -> str:
        return self.stage[-1]

    @property
    def name(self) -> str:
        plain = self.arm.replace(" ", "").replace("+", "-").replace("=", "").replace(",", "-")
        of = f"-of{self.source}" if self.source else ""
        return f"{self.stage}-{plain}-lr{self.lr:g}-s{self.seed}-{self.tokens}-{self.batch}{of}"


@app.command()
def run(
    texts: Annotated[Path, typer.Argument(help="a folder of .txt files")],
    out: Path,
    stages: str = "a,b,c",
    tokens: float = 10e6,
    sweep_tokens: float = 4e6,
    range_tokens: float = 3e6,
    batch: int = 8192,
    rates: str = "1e-3,2e-3,4e-3,8e-3,16e-3",
    range_rates: str = "1e-3,2e-3,4e-3,8e-3,16e-3,32e-3,64e-3",
    seeds: int = 3,
    range_seeds: int = 1,
    equal_rate: float = 1.5e-3,
    recovery_tokens: float = 0.2e6,
    recovery_rate: float = 1e-3,
    arms: Annotated[
        str,
        typer.Option(help="of stages a, b and w, by semicolons; others: MLA-25;MEA-4, no norm;GTA-8;K=V-8"),
    ] = ";".join(COMPARED),
    workers: int = 2,
) -> None:
    """Train what is missing, stage by stage."""
    corpus, held = prepare_texts(texts, out)
    chosen_arms = arms.split(";")
    for stage in stages.split(","):
        start, kind = stage[:-1], stage[-1:]
        if start not in ("", "z") or kind not in tuple("abcderw"):
            raise typer.BadParameter(
                f"stage {stage!r} is unknown; choose among a, b, c, d, e, r, w, each also after a z"
            )
        best = pretraining_report.chosen(pretraining_report.runs(out, start + "a"))
        if kind == "a":
            jobs = [
                Job(stage, arm, float(lr), 100, int(sweep_tokens), batch)
                for lr in rates.split(",")
                for arm in chosen_arms
            ]
        elif kind in "bw":
            known = [arm for arm in chosen_arms if arm in best]
            jobs = [
                Job(stage, arm, best[arm], s, int(tokens), batch, kind == "w")
                for s in range(seeds)
                for arm in known
            ]
        elif kind == "c":
            grid = [
                (s, lr, arm) for s in range(range_seeds) for lr in range_rates.split(",") for arm in PARTS
            ]
            jobs = [Job(stage, arm, float(lr), s, int(range_tokens), batch) for s, lr, arm in grid]
        elif kind == "e":
            others = [arm for arm in chosen_arms if best.get(arm) != equal_rate]
            jobs = [
                Job(stage, arm, equal_rate, s, int(tokens), batch) for s in range(seeds) for arm in others
            ]
        elif kind == "d":
            jobs = [
                Job(stage, form, recovery_rate, s, int(recovery_tokens), batch, source=int(tokens))
                for s in range(seeds)
                for form in FORMS
            ]
        else:
            jobs = [
                Job(stage, arm, best["LRKV-50 full"], s, int(tokens), batch)
                for s in range(seeds)
                for arm in RANKS
            ]
        work(jobs, out, corpus, held, workers)


@app.command()
def report(out: Path, results: Path) -> None:
    """Gather the finished runs and print the tables."""
    pretraining_report.report(out, results)


def prepare_texts(texts: Path, out: Path) -> tuple[Path, Path]:
    """Passages to train on, in a seeded order, and whole texts of which none is trained on."""
    corpus, held = out / "passages.jsonl", out / "held.txt"
    if not (corpus.exists() and held.exists()):
        found = sorted(texts.glob("*.txt"))
        aside = found[HELD_NOVELS // 2 :: HELD_NOVELS]
        passages = [
            p for file in found if file not in aside for p in _passages(file.read_text(encoding="utf-8"))
        ]
        random.Random(0).shuffle(passages)
        out.mkdir(parents=True, exist_ok=True)
        files.write_text(corpus, "".join(json.dumps({"text": p}) + "\n" for p in passages), ours=True)
        files.write_text(
            held, "\n".join(file.read_text(encoding="utf-8")[50_000:250_000] for file in aside), ours=True
        )
    return corpus, held


def _passages(text: str) -> list[str]:
    return [text[i : i + PASSAGE] for i in range(0, len(text) - PASSAGE, PASSAGE)]


def work(jobs: Sequence[Job], out: Path, corpus: Path, held: Path, workers: int) -> None:
    """The unfinished jobs, `workers` at a time; one that fails is told and does not stop the others."""
    left = [job for job in jobs if not (out / "runs" / job.name / "measured.json").exists()]
    print(f"{len(left)} of {len(jobs)} runs to do", flush=True)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        going = {pool.submit(one, job, out, corpus, held): job for job in left}
        for done in as_completed(going):
            problem = done.exception()
            print(
                going[done].name, repr(problem) if problem else f"test loss {done.result():.4f}", flush=True
            )


def one(job: Job, out: Path, corpus: Path, held: Path) -> float:
    """Train, measure on the texts set aside, keep the numbers. Returns the test loss."""
    torch.set_num_threads(1)
    # the models of a worker share their code, and only so many versions of it are compiled
    torch.compiler.reset()
    steps = job.tokens // job.batch
    training = {
        **{
            "tokens": job.tokens,
            "batch_tokens": job.batch,
            "length": LENGTH,
            "lr": job.lr,
            "seed": job.seed + (1000 if job.kind == "d" else 0),
            "precision": "fp32",
        },
        **{
            "warmup": 0.08,
            "schedule": "wsd",
            "decay": 0.0 if job.kind == "c" else 0.2,
            "evaluate_tokens": 65_536,
        },
        **{
            "evaluate_every": max(1, steps if job.kind in "ac" else steps // 4),
            "save_every": 200,
            "log_every": 20,
        },
        **{"compile": True, "stop_on_divergence": False},
    }
    data = {
        "path": str(corpus),
        "vocab_size": VOCABULARY,
        "max_tokens": 12_000_000,
        "held_out": 0.02,
        "cache": str(out / "tokens"),
    }
    folder = out / "runs" / job.name
    model = converted(job, out, corpus) if job.kind == "d" else build(job)
    trained = pretrain(Recipe.of({"data": data, "training": training}), folder, model=model, device="cpu")
    config = trained.model.config
    numbers = {
        **asdict(job),
        "test_loss": test_loss(trained.model, trained.tokenizer, held.read_text(encoding="utf-8")),
        "parameters": sum(p.numel() for p in trained.model.parameters()),
        "cache_numbers_per_token": sum(layer.stored for layer in layer_costs(config)),
        "result": trained.result,
    }
    files.write_json(folder / "measured.json", numbers, "benchmark", ours=True)
    return numbers["test_loss"]


def build(job: Job) -> PreTrainedModel:
    """The arm's model; what has the same name and shape in two arms starts from the same numbers."""
    ids = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": LENGTH,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    config = LowkeyConfig(
        **{
            **SHAPE,
            **ids,
            **ARMS[job.arm],
            **({"zero_init_output": True} if job.stage.startswith("z") else {}),
        }
    )
    if job.matched:
        config.intermediate_size = _matched_width(config)
    torch.manual_seed(job.seed)
    model = LowkeyForCausalLM(config)
    for name, module in model.named_modules():
        # what starts at zero stays there
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.any():
            _draw(module.weight, name, job.seed, config.initializer_range)
    return model


def converted(job: Job, out: Path, corpus: Path) -> PreTrainedModel:
    """The run of MHA with this start, seed and `source`, in another form. It goes on in another order of the
    rows.
    """
    wanted = ("MHA", job.seed, job.source)
    found = [
        r
        for r in pretraining_report.runs(out, job.stage[:-1] + "b")
        if (r["arm"], r["seed"], r["tokens"]) == wanted
    ]
    if not found:
        missing = f"MHA of seed {job.seed} was not trained on {job.source:,} tokens yet"
        raise typer.BadParameter(f"stage {job.stage}: {missing}; run stage {job.stage[:-1]}b first")
    fields = {f.name for f in dataclasses.fields(Job)}
    source = Job(**{name: value for name, value in found[0].items() if name in fields})
    folder = out / "runs" / source.name
    model, tokenizer = load(str(folder), "float32", "cpu")
    attention, sizes, options, whitened = FORMS[job.arm]
    return convert(
        model,
        attention,
        options=options,
        moments=_moments(model, tokenizer, corpus) if whitened else None,
        **sizes,
    )


def _moments(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Path) -> dict[int, Tensor]:
    with corpus.open(encoding="utf-8") as lines:
        passages = [json.loads(next(lines))["text"] for _ in range(MOMENT_ROWS)]
    rows = [tokenizer(p, add_special_tokens=False, verbose=False).input_ids[:LENGTH] for p in passages]
    return input_moments(model, torch.tensor(rows))


@torch.no_grad()
def _draw(weight: Tensor, name: str, seed: int, std: float) -> None:
    number = int.from_bytes(sha256(f"{seed} {name} {tuple(weight.shape)}".encode()).digest()[:7])
    weight.normal_(0.0, std, generator=torch.Generator().manual_seed(number))


def _matched_width(config: LowkeyConfig) -> int:
    """The feed-forward width that gives the arm as many parameters as MHA has, to the nearest."""
    wanted = LowkeyConfig(**{**SHAPE, "vocab_size": config.vocab_size, "attention": "mha"})
    missing = model_parameters(wanted, layer_costs(wanted)) - model_parameters(config, layer_costs(config))
    return config.intermediate_size + round(missing / (3 * config.hidden_size * config.num_hidden_layers))


@torch.no_grad()
def test_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """Nats per token over whole rows of texts never trained on."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:131_073])
    rows = ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    nats = 0.0
    for part in rows.split(16):
        logits = model(part[:, :-1], use_cache=False).logits.float()
        nats += float(
            nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
        )
    return nats / (len(rows) * LENGTH)


if __name__ == "__main__":
    app()

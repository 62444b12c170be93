"""`lowkey heads`: the file of head scores that it writes, and what it refuses to measure."""

from __future__ import annotations

import json

import pytest
from commands import done, printed, refused, tree
from head_recording import let_chains_count


def test_heads_writes_a_file_and_says_what_it_holds(here):
    told = printed(
        "heads", "tiny", "-o", "heads.json", "--kind", "er", "--cases", 10, "--context", 200, "--seed", 3
    )
    assert (told["heads"], told["kind"], told["task"], told["drawn"], told["seed"]) == (
        "heads.json",
        "er",
        "recall",
        10,
        3,
    )
    assert json.loads((here / "heads.json").read_text())["values"] and told["accepted"] >= 10
    ran = done("heads", "tiny", "-o", "other.json", "--task", "facts", "--cases", 10, "--context", 600)
    assert "other.json: 10 of 10 cases right" in ran.out and "KV head" in ran.out


def test_heads_replaces_a_file_only_when_told_to(here):
    command = ("heads", "tiny", "-o", "notes.txt", "--kind", "copy", "--cases", 10, "--context", 200)
    for more in ([], ["--force"]):
        assert "'notes.txt' is there, and lowkey did not write it" in refused(*command, *more)
    assert (here / "notes.txt").read_text() == "mine"
    command = [word if word != "notes.txt" else "heads.json" for word in command]
    done(*command)
    assert "'heads.json' already exists; choose another name or pass --force" in refused(*command)
    done(*command, "--force")
    assert json.loads((here / "heads.json").read_text())["kind"] == "copy"


CHAINS = ("--cases", 12, "--context", 60, "-O", "pairs=4", "-O", "shortest=2", "-O", "longest=3")
BRIEF = {
    "reward": ("-O", "steps=2", "-O", "prompts=2", "-O", "samples=2", "-O", "baseline=group"),
    "distilled": ("-O", "steps=2", "-O", "prompts=2"),
}


@pytest.mark.parametrize(("kind", "policy"), [("reward", "rlkv"), ("distilled", "duoattention")])
def test_gates_of_chains_are_learnt_and_used(here, monkeypatch, model, kind, policy):
    let_chains_count(monkeypatch)
    told = printed("heads", "tiny", "-o", "g.json", "--kind", kind, *CHAINS, *BRIEF[kind])
    assert (told["kind"], told["task"], told["settings"]["steps"]) == (kind, "chains", 2)
    use = ("--policy", policy, "--heads", "g.json", "--budget", "50%")
    rows = printed("eval", "tiny", *use, "--task", "speed", "--windows", 1, "--context", 64)["rows"]
    assert [row["name"] for row in rows[:2]] == ["full", f"{policy} 50%"]
    kept = sorted(n for layer in rows[1]["kept_per_head"] for n in layer)
    assert (kept[0], kept[-1], sum(kept)) == (12, 64, 24 * 32)
    ask = ("--prompt", "The cat sat on the mat and saw what was there in the dark house.", "--tokens", 3)
    assert printed("generate", "tiny", *ask, *use)["new_tokens"] == 3
    other = "duoattention" if policy == "rlkv" else "rlkv"
    for command, says in (
        (("tiny", "--policy", policy), f"run `lowkey heads MODEL --kind {kind}"),
        (("tiny", "--policy", other, "--heads", "g.json"), "run `lowkey heads MODEL --kind"),
        ((model, "--policy", policy, "--heads", "g.json"), "this one is"),
        (("tiny", "--policy", policy, "--heads", "none.json"), "none.json"),
    ):
        assert says in refused("generate", *command, *ask, "--budget", "50%")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--kind", "r3"), "kind 'r3' is unknown"),
        (("--kind", "r2", "-O", "steps=3"), "option 'steps': kind 'r2' has none"),
        (("--kind", "reward", "-O", "stops=3"), "did you mean 'steps'?"),
        (("--kind", "reward", "-O", "tau=2"), "tau"),
        (("--kind", "reward", "-O", "steps=x"), "steps"),
        (("--kind", "reward", "-O", "micro=0"), "micro"),
        (("--kind", "reward", "-O", "baseline=none"), "baseline"),
        (("--kind", "reward", "-O", "shortest=5", "-O", "longest=3"), "longest"),
        (("--kind", "reward", "--haystack", "notes.txt"), "is learnt from chains"),
        (("--kind", "reward", "--context", 1275), "is beyond the model's"),
        (("--kind", "distilled", "--task", "facts"), "kind 'distilled' is learnt from chains"),
        (
            ("--kind", "ablation", "--cases", 10, "--context", 200),
            "of 10 cases were answered right in 4 samples",
        ),
        (("--task", "riddle"), "task 'riddle' is unknown"),
        (("--cases", 3), "cases 3"),
        (("--context", 99999), "context 99999: the model reads 1280 tokens at most"),
        (("--haystack", "notes.txt"), "data: "),
        (("--haystack", "none.txt"), "haystack 'none.txt': no such file"),
        (
            ("--task", "comparison", "--cases", 10, "--context", 500),
            "task 'comparison': 0 of 10 cases answered right",
        ),
    ],
)
def test_heads_that_cannot_be_measured_are_refused(here, words, says):
    before = tree(here)
    assert says in refused("heads", "tiny", *words)
    assert tree(here) == before

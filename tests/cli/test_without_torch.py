"""Help and every error about arguments are printed without importing torch.

One process in which torch and transformers cannot be imported runs all the command lines below. Some are also
measured as a shell starts them.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import resource
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import typer

import lowkey
from lowkey.cli import app, choices, collect_choices
from lowkey.cli.options import PANELS
from lowkey.cli.stand_ins import fields_described, stand_in
from lowkey.core import options
from lowkey.core.errors import LowkeyError
from lowkey.methods import METHODS
from lowkey.policies import SCORES

SECONDS = 0.5  # of CPU time, the best of three runs; about 0.2 on an idle machine

# Each command line is run in one process, and what it printed is one JSON list.
CHILD = """
import contextlib, io, json, sys
for name in ("torch", "transformers"):
    sys.modules[name] = None  # an import of it now fails
from lowkey.cli import app
found = []
for words in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["lowkey", *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app.main()
        except SystemExit as stop:
            status = stop.code
    found.append((status, out.getvalue(), err.getvalue()))
print(json.dumps(found))
"""

COMPRESS = ["compress", "tiny", "out"]
EVAL = ["eval", "tiny"]
GENERATE = ["generate", "tiny", "--prompt", "a"]
CONVERT = ["convert", "tiny", "out", "--attention"]
PLAN = ["plan", "tiny", "out"]
STEP = ["bench", "step", "tiny"]
RECOVER = ["recover", "tiny", "plan", "out"]

# a command line and words of its error
REFUSED: list[tuple[list[str], list[str]]] = [
    # commands and their arguments
    (["compres"], ["command 'compres'", "did you mean 'compress'?", "--help"]),
    (["bench", "decod"], ["command 'decod'", "did you mean 'decode'?"]),
    (["compress", "--bugdet", "50%"], ["option '--bugdet'", "did you mean '--budget'?", "compress --help"]),
    (["--thread", "2", "methods"], ["option '--thread'", "did you mean '--threads'?"]),
    (["--threads", "0", "methods"], ["threads 0", "at least 1"]),
    (["compress"], ["MODEL", "--help"]),
    (["compress", "tiny"], ["OUT", "--help"]),
    (["generate", "tiny"], ["--prompt", "--help"]),
    (["compress", "tiny", "out", "--budget"], ["--budget", "compress --help"]),
    # models
    (["compress", "tinny", "out"], ["model 'tinny'", "did you mean 'tiny'?"]),
    (["eval", "smolm2"], ["model 'smolm2'", "did you mean 'smollm2'?"]),
    (["eval", "no-such-model"], ["model 'no-such-model'", "owner/name", "'tiny'"]),
    (["compress", "TINY", "out"], ["model 'TINY'", "did you mean 'tiny'?"]),
    (["eval", "https://huggingface.co/a/b"], ["is an address", "owner/name"]),
    (["eval", "two words"], ["model 'two words'", "owner/name"]),
    (["eval", "./none"], ["model './none'", "no such folder"]),
    (["eval", "none.gguf"], ["model 'none.gguf' does not exist"]),
    (["eval", "empty"], ["model 'empty'", "no config.json"]),
    ([*EVAL, "--dtype", "bfloat61"], ["dtype 'bfloat61'", "did you mean 'bfloat16'?"]),
    ([*EVAL, "--device", "cudda"], ["device 'cudda'", "did you mean 'cuda'?"]),
    (["download", "SmolLM2"], ["model 'SmolLM2'", "did you mean 'smollm2'?"]),
    (["download", "smolm2"], ["model 'smolm2'", "did you mean 'smollm2'?"]),
    # methods and plans
    ([*COMPRESS, "--method", "stiefatention"], ["method", "did you mean 'stiefattention'?"]),
    ([*COMPRESS, "--method", "PCA"], ["method 'PCA'", "did you mean 'pca'?"]),
    ([*COMPRESS, "--method", "no_such_package:X"], ["no module named 'no_such_package'", "package.module"]),
    ([*COMPRESS, "--method", ":"], ["method ':'", "package.module:Class"]),
    ([*COMPRESS, "--method", "zzz"], ["method 'zzz'", "pca, eigenattention", "package.module:Class"]),
    ([*COMPRESS, "--method", "kq-svd", "-O", "rigde=1"], ["option 'rigde'", "did you mean 'ridge'?"]),
    ([*COMPRESS, "--method", "kq-svd", "-O", "ridge=-1"], ["option ridge='-1'", "at least 0"]),
    ([*COMPRESS, "--method", "kq-svd", "-O", "outputs=stackt"], ["did you mean 'stacked'?"]),
    ([*COMPRESS, "-O", "epochs=5"], ["option 'epochs'", "--method"]),
    ([*COMPRESS, "-O", "epochs"], ["option 'epochs'", "name=value"]),
    ([*COMPRESS, "--allocator", "gredy"], ["allocator 'gredy'", "did you mean 'greedy'?"]),
    ([*COMPRESS, "--allocator", "threshold", "-A", "stp=1"], ["option 'stp'", "did you mean 'step'?"]),
    ([*COMPRESS, "--method", "pca", "-A", "step=1"], ["option 'step'", "allocator 'greedy'"]),
    ([*COMPRESS, "-A", "step=1"], ["allocator option 'step'", "--allocator"]),
    ([*COMPRESS, "--layout", "post_rop"], ["layout 'post_rop'", "did you mean 'post_rope'?"]),
    ([*COMPRESS, "--judge", "los"], ["judge 'los'", "did you mean 'loss'?"]),
    ([*COMPRESS, "--bits", "kivi44"], ["bits 'kivi44'", "did you mean 'kivi4'?"]),
    ([*COMPRESS, "--ranks", "banana"], ["ranks 'banana'", "16,32,64"]),
    (["profile", "tiny", "--method", "eigenatention"], ["did you mean 'eigenattention'?"]),
    (["dynamic", "tiny", "out", "--key-bases", "per_hed"], ["did you mean 'per_head'?"]),
    ([*COMPRESS, "--heads", "none.json"], ["head scores 'none.json'", "no such file", "lowkey heads"]),
    ([*CONVERT, "lrvk"], ["attention 'lrvk'", "did you mean 'lrkv'?"]),
    ([*CONVERT, "lrkv", "-O", "lrkv_rnk=3"], ["option 'lrkv_rnk'", "did you mean 'lrkv_rank'?"]),
    ([*CONVERT, "lrkv", "-O", "lrkv_rank=x"], ["option lrkv_rank='x'", "whole number"]),
    ([*CONVERT, "mqa", "--heads", "means"], ["heads 'means'", "did you mean 'mean'?"]),
    ([*CONVERT, "mqa", "--basis", "weight"], ["basis 'weight'", "did you mean 'weights'?"]),
    ([*CONVERT, "mla", "--frequencies", "hihg"], ["frequencies 'hihg'", "did you mean 'high'?"]),
    (["export", "tiny", "plan", "out", "--format", "hff"], ["format 'hff'", "did you mean 'hf'?"]),
    ([*RECOVER, "--stages", "distil=3"], ["stage 'distil'", "did you mean 'distill'?"]),
    ([*RECOVER, "--stages", "ce"], ["stages 'ce'", "distill=100"]),
    (RECOVER, ["plan/plan.json", "lowkey compress"]),
    (["inspect", "none"], ["none/plan.json", "lowkey compress"]),
    # numbers
    ([*COMPRESS, "--context", "banana"], ["'--context'", "'banana'", "whole number", "--help"]),
    ([*COMPRESS, "--context", "1.5"], ["'--context'", "'1.5'", "whole number"]),
    ([*COMPRESS, "--context", "0"], ["context 0", "at least 8"]),
    ([*COMPRESS, "--windows", "3"], ["windows 3", "at least 4"]),
    ([*COMPRESS, "--seed", "-1"], ["seed -1", "at least 0"]),
    ([*COMPRESS, "--sinks", "-1"], ["sinks -1", "at least 0"]),
    ([*COMPRESS, "--at", "0"], ["at 0", "at least 1"]),
    ([*COMPRESS, "--rank-multiple", "0"], ["rank multiple 0", "at least 1"]),
    ([*COMPRESS, "--error-budget", "small"], ["'--error-budget'", "'small'", "a number"]),
    ([*COMPRESS, "--error-budget", "2"], ["error budget 2", "up to 1"]),
    ([*COMPRESS, "--judge", "loss", "--error-budget", "0"], ["error budget 0", "nats"]),
    (["generate", "tiny", "--prompt", ""], ["prompt ''", "is empty"]),
    ([*GENERATE, "--tokens", "0"], ["tokens 0", "at least 1"]),
    (["heads", "tiny", "--cases", "0"], ["cases 0", "at least 1"]),
    (["diversity", "tiny", "--inits", "-1"], ["inits -1", "at least 0"]),
    (["sinks", "tiny", "--windows", "1"], ["windows 1", "at least 4"]),
    ([*RECOVER, "--lr", "0"], ["lr 0", "above 0"]),
    ([*RECOVER, "--stages", "ce=0"], ["stages", "at least 1"]),
    (["bench", "decode", "--heads", "3", "--kv-heads", "2"], ["heads 3", "multiple", "try 4"]),
    (["bench", "decode", "--dtype", "floot32"], ["dtype 'floot32'", "did you mean 'float32'?"]),
    ([*STEP, "--settings", "int44"], ["setting 'int44'", "did you mean 'int4'?"]),
    ([*STEP, "--settings", "full,snapkw:10%"], ["setting 'snapkw:10%'", "did you mean 'snapkv:10%'?"]),
    ([*STEP, "--settings", "zzz"], ["setting 'zzz'", "full, stock"]),
    ([*STEP, "--settings", ""], ["setting ''", "full, stock"]),
    ([*STEP, "--settings", "snapkv"], ["setting 'snapkv'", "'snapkv:10%'"]),
    ([*STEP, "--settings", "snapkv:10"], ["budget '10'", "50%"]),
    ([*STEP, "--settings", "snapkv:9 tokens"], ["budget 9 tokens", "4 sinks", "8 recent"]),
    ([*STEP, "--settings", "int4:10%"], ["setting 'int4:10%'", "no budget", "'int4'"]),
    ([*STEP, "--settings", "int4,full,int4"], ["setting 'int4'", "twice"]),
    ([*STEP, "--settings", "int4+int8"], ["setting 'int4+int8'", "bits twice"]),
    ([*STEP, "--settings", "full+int4"], ["setting 'full+int4'", "the whole cache"]),
    ([*STEP, "--settings", "rank:50%"], ["setting 'rank:50%'", "lowkey compress", "plan:DIR"]),
    ([*STEP, "--settings", "plan:none+int4"], ["plan 'none/plan.json'", "lowkey compress"]),
    ([*STEP, "--context", "512,x"], ["context '512,x'", "'512,4k'"]),
    ([*STEP, "--context", "512,7"], ["context 7", "at least 8"]),
    ([*STEP, "--threads", "1,0"], ["threads 0", "at least 1"]),
    ([*STEP, "--rounds", "0"], ["rounds 0", "at least 1"]),
    ([*STEP, "--heads", "none.json"], ["head scores 'none.json'", "lowkey heads"]),
    # budgets
    ([*COMPRESS, "--budget", "banana"], ["budget 'banana'", "50%"]),
    ([*COMPRESS, "--budget", "150%"], ["budget '150%'", "100%"]),
    ([*COMPRESS, "--budget", "512 tokens"], ["budget 512 tokens", "64 KiB/token"]),
    ([*COMPRESS, "--budget", "50%", "--error-budget", "0.1"], ["budget 50%", "give one of them"]),
    (["dynamic", "tiny", "out", "--budget", "1 KiB"], ["budget 1 KiB", "50%"]),
    ([*EVAL, "--policy", "snapkv", "--budget", "10"], ["budget '10'", "50%"]),
    ([*EVAL, "--policy", "snapkv"], ["policy 'snapkv'", "needs a budget"]),
    ([*EVAL, "--policy", "snapkv", "--budget", "9 tokens"], ["budget 9 tokens", "4 sinks", "8 recent"]),
    ([*EVAL, "--policy", "h2o", "--budget", "9 tokens", "-O", "recent=7"], ["4 sinks", "7 recent"]),
    ([*EVAL, "--budget", "10%"], ["budget '10%'", "--policy"]),
    (["bench", "decode", "--budget", "x"], ["budget 'x'", "50%"]),
    (PLAN, ["budget: none", "--memory", "--keep"]),
    ([*PLAN, "--keep", "9%", "--memory", "2GiB"], ["memory '2GiB' and keep '9%'", "give one of"]),
    ([*PLAN, "--memory", "2GB", "--context", "8k"], ["memory '2GB'", "2GiB"]),
    ([*PLAN, "--memory", "2GiB"], ["memory '2GiB'", "--context"]),
    ([*PLAN, "--memory", "2GiB", "--context", "8m"], ["context '8m'", "32k"]),
    ([*PLAN, "--memory", "2GiB", "--context", "0"], ["context 0", "at least 1"]),
    ([*PLAN, "--memory", "2GiB", "--context", "8k", "--sequences", "0"], ["sequences 0", "at least 1"]),
    ([*PLAN, "--keep", "120%"], ["keep '120%'", "100%"]),
    ([*PLAN, "--keep", "2 KiB"], ["keep '2 KiB'", "12.5%"]),
    ([*PLAN, "--bytes-per-token", "10%"], ["bytes per token '10%'", "4096"]),
    ([*PLAN, "--keep", "9%", "--axes", "rank,bit"], ["axis 'bit'", "did you mean 'bits'?"]),
    ([*PLAN, "--keep", "9%", "--axes", "tokens", "--no-eviction"], ["axes 'tokens'", "--no-eviction"]),
    ([*PLAN, "--keep", "9%", "--axes", "bits", "--allow-eviction"], ["axes 'bits'", "--allow-eviction"]),
    ([*PLAN, "--keep", "9%", "--policy", "snapkw"], ["policy 'snapkw'", "did you mean 'snapkv'?"]),
    ([*PLAN, "--keep", "9%", "--no-eviction", "--policy", "h2o"], ["policy 'h2o'", "not allowed"]),
    ([*PLAN, "--keep", "9%", "--no-recall", "--cases", "5"], ["cases 5", "--no-recall"]),
    ([*PLAN, "--keep", "9%", "--cases", "-1"], ["cases -1", "at least 0"]),
    ([*PLAN, "--keep", "9%", "--compare-windows", "0"], ["compare windows 0", "at least 1"]),
    ([*PLAN, "--keep", "9%", "--window-tokens", "8"], ["window tokens 8", "at least 64"]),
    ([*PLAN, "--keep", "9%", "--held-out", "none.txt"], ["held-out 'none.txt'", "no such file"]),
    # what cost counts
    (["cost", "tiny", "--gpu", "h20"], ["gpu 'h20'", "did you mean 'h200'?"]),
    (["cost", "tiny", "--gpu", "abacus"], ["gpu 'abacus'", "h100", "--memory with --bandwidth"]),
    (["cost", "tiny", "--gpus", "0"], ["gpus 0", "at least 1"]),
    (["cost", "tiny", "--gpus", "2"], ["gpus 2", "--gpu"]),
    (["cost", "tiny", "--memory", "8GiB"], ["memory '8GiB'", "--bandwidth"]),
    (["cost", "tiny", "--bandwidth", "9"], ["bandwidth 9", "--memory"]),
    (["cost", "tiny", "--memory", "8GiB", "--bandwidth", "0"], ["bandwidth 0", "above 0"]),
    (["cost", "tiny", "--gpu", "l4", "--memory", "8GiB"], ["memory '8GiB'", "leave out"]),
    (["cost", "tiny", "--batch", "0"], ["batch 0", "at least 1"]),
    (["cost", "tiny", "--context", "128m"], ["context '128m'", "32k"]),
    (["cost", "tiny", "--weight-bits", "0"], ["weight bits 0", "at least 1"]),
    (["cost", "tiny", "--dtype", "fp61"], ["dtype 'fp61'", "float16"]),
    (["cost", "tiny", "--settings", "full,int5"], ["setting 'int5'", "did you mean 'int"]),
    (["cost", "tiny", "--settings", "snapkv"], ["setting 'snapkv'", "snapkv:10%"]),
    (["cost", "tiny", "--settings", "plan:none"], ["none/plan.json", "lowkey compress"]),
    # policies, tasks and kinds
    ([*EVAL, "--policy", "snapkw", "--budget", "10%"], ["policy 'snapkw'", "did you mean 'snapkv'?"]),
    ([*GENERATE, "--policy", "h20", "--budget", "10%"], ["policy 'h20'", "did you mean 'h2o'?"]),
    ([*EVAL, "--policy", "snapkv", "--budget", "9%", "-O", "windw=3"], ["did you mean 'window'?"]),
    ([*EVAL, "--policy", "snapkv", "--budget", "9%", "-O", "kernel=4"], ["option kernel='4'", "odd"]),
    ([*EVAL, "--policy", "snapkv", "--budget", "9%", "-O", "allocator=adda"], ["did you mean 'ada'?"]),
    ([*EVAL, "--policy", "pyramidkv", "--budget", "9%", "-A", "bet=3"], ["did you mean 'beta'?"]),
    ([*EVAL, "--policy", "h2o", "--budget", "9%", "--heads", "none.json"], ["none.json", "lowkey heads"]),
    ([*EVAL, "--task", "perplexitty"], ["task 'perplexitty'", "did you mean 'perplexity'?"]),
    ([*EVAL, "--recall-form", "line"], ["recall_form 'line'", "did you mean 'lines'?"]),
    ([*EVAL, "--bits", "hadamard"], ["bits 'hadamard'", "did you mean 'hadamard"]),
    (["heads", "tiny", "--kind", "inducton"], ["kind 'inducton'", "did you mean 'induction'?"]),
    (["heads", "tiny", "--task", "recal"], ["task 'recal'", "did you mean 'recall"]),
    # files
    ([*COMPRESS, "--calibration", "none.txt"], ["none.txt", "no such file"]),
    ([*EVAL, "--data", "none.txt"], ["none.txt", "no such file"]),
    ([*EVAL, "--plan", "none"], ["none/plan.json", "lowkey compress"]),
    (["pretrain", "none.toml"], ["none.toml", "does not exist"]),
    (["pretrain", "recipe.toml", "--set", "training.lrr=1"], ["'lrr'", "did you mean 'lr'?"]),
    (["pretrain", "recipe.toml", "--set", "model.attention=lrvk"], ["'lrvk'", "did you mean 'lrkv'?"]),
    (["pretrain", "recipe.toml", "--device", "cudda"], ["device 'cudda'", "did you mean 'cuda'?"]),
    (["report", "none.json"], ["none.json"]),
]
COMMANDS = [
    *([name] for group in app.COMMANDS.values() for name, _ in group),
    *(["bench", name] for name, _ in app.TIMING),
]
HELPS = [["--help"], ["bench", "--help"], *([*words, "--help"] for words in COMMANDS)]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """By command line (status, stdout, stderr), from a process in which torch cannot be imported."""
    folder = tmp_path_factory.mktemp("without_torch")
    (folder / "empty").mkdir()
    (folder / "recipe.toml").write_text("[model]\nhidden_size = 32\n")
    before = sorted(folder.iterdir())
    lines = [*(words for words, _ in REFUSED), *HELPS]
    ran = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(lines),
        env=os.environ | {"COLUMNS": "80"},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert sorted(folder.iterdir()) == before
    return {tuple(words): found for words, found in zip(lines, json.loads(ran.stdout), strict=True)}


@pytest.mark.parametrize(("words", "says"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_bad_arguments_are_refused_without_torch(answers, words, says):
    status, out, err = answers[tuple(words)]
    assert (status, out) == (2, "") and err.startswith("lowkey: ") and err.count("\n") == 1, err
    assert [word for word in says if word not in err] == [], err


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_help_fits_a_terminal_of_80_columns(answers, words):
    status, out, err = answers[tuple(words)]
    assert (status, err) == (0, "")
    assert [line for line in out.splitlines() if len(line) > 80] == []
    assert out.isascii()


def test_the_list_of_commands_shows_whole_sentences(answers):
    _, out, _ = answers[("--help",)]
    for title, group in app.COMMANDS.items():
        assert f"\n{title}:\n" in out
        assert all(f"\n  {name} " in out for name, _ in group)
    told = [line for line in out.splitlines() if line.startswith("  ") and line[2].islower()]
    assert told and all(line.endswith(".") and not line.endswith("...") for line in told)


def test_every_option_stands_in_a_panel():
    root = typer.main.get_command(app.app)
    commands = {name: root.commands[name] for name in root.commands if name != "bench"}
    commands |= root.commands["bench"].commands
    for name, command in commands.items():
        for parameter in command.params:
            panel = parameter.rich_help_panel
            if parameter.param_type_name == "argument":
                assert panel is None, (name, parameter.name)
            else:
                assert panel in PANELS, (name, parameter.name)
            assert parameter.help and (parameter.metavar or parameter.is_flag), (name, parameter.name)


@pytest.mark.parametrize(
    "words", [["--help"], ["eval", "--help"], ["compress", "tiny", "out", "--budget", "x"]]
)
def test_help_and_errors_take_little_time(words):
    """The whole program as it is started by a shell, with nothing blocked."""
    start = (
        "import atexit, sys\n"
        f"sys.argv = {['lowkey', *words]!r}\n"
        "heavy = ('torch', 'transformers', 'numpy')\n"
        "atexit.register(lambda: print([m for m in heavy if m in sys.modules], file=sys.stderr))\n"
        "import lowkey_start\n"
        "lowkey_start.main()\n"
    )
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ran = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert ran.stderr.endswith("[]\n"), ran.stderr
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(taken) < SECONDS


# -- choices.json


def test_choices_are_those_of_the_code():
    assert collect_choices.FILE.read_text(encoding="utf-8") == collect_choices.text(), (
        "methods, policies or settings have changed: run `make choices`"
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_stand_in_refuses_what_a_method_refuses(name):
    kind, other = METHODS[name], choices.method_options(name)
    assert [f.name for f in fields(other)] == [f.name for f in fields(kind)]
    assert options.ranges(other) == options.ranges(kind)
    for field in fields(kind):
        for value in ("-1", "1", "nan", "none", "true", "x", "9" * 30, ""):
            assert outcome(other, field.name, value) == outcome(kind, field.name, value)


def outcome(kind: type, name: str, value: str) -> object:
    """The value that an option as text becomes, or why it is refused."""
    try:
        return options.read_option(kind, name, value)
    except LowkeyError as error:
        return str(error)


@pytest.mark.parametrize("kind", [*collect_choices.SETTINGS, *SCORES.values()], ids=lambda k: k.__name__)
def test_a_stand_in_has_the_types_ranges_and_defaults(kind):
    found = fields_described(kind)
    other = stand_in(kind.__name__, json.loads(json.dumps(found)))
    assert options.ranges(other) == options.ranges(kind)
    plain = options.defaults_of(other)
    assert plain == {name: x for name, x in options.defaults_of(kind).items() if name in plain}


# -- the package


def test_public_names_are_imported_when_they_are_used():
    """Also what type checkers are told: the imports under TYPE_CHECKING."""
    tree = ast.parse(Path(lowkey.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {alias.name: node.module for node in block.body for alias in node.names}
    assert {*told, "__version__"} == set(lowkey.__all__) <= set(dir(lowkey))
    for name, module in told.items():
        if module == "lowkey":
            assert getattr(lowkey, name) is importlib.import_module(f"lowkey.{name}")
        else:
            assert getattr(lowkey, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        _ = lowkey.nosuch

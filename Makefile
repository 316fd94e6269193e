# Every target sets up what it needs in .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STUDY ?= studies/demo.yaml
CORES ?= $(shell $(PYTHON) -c "import os; print(os.cpu_count())")
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo smollm2 gemma3 test format test-all gpu-check slurm docs docs-run docs-long clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.run ## Install what running needs

demo: $(VENV)/.run ## Align, attack, measure, report (STUDY=studies/demo.yaml, CORES=all)
	@$(BIN)/temper study $(STUDY) --cores $(CORES)

smollm2: $(VENV)/.gguf ## Fetch SmolLM2-135M-Instruct into models/ (93 MB, once)
	@test -e models/smollm2-135m-instruct/origin.json && \
		echo "models/smollm2-135m-instruct is there already" || \
		$(BIN)/python -m tools.fetch_model smollm2 --to models/smollm2-135m-instruct

gemma3: $(VENV)/.gguf ## Fetch Gemma 3 270M into models/ (245 MB, once; the Gemma terms apply)
	@test -e models/gemma3-270m/origin.json && echo "models/gemma3-270m is there already" || \
		$(BIN)/python -m tools.fetch_model gemma3 --to models/gemma3-270m

test: $(VENV)/.dev ## Lint, import contracts, types, unit and integration tests (under 6 minutes)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mdformat --check *.md docs benchmarks
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses $(CORES) \
		-m "not slow and not distributed and not slurm and not gpu"

format: $(VENV)/.dev ## Format code and Markdown
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .
	$(BIN)/mdformat *.md docs benchmarks

test-all: $(VENV)/.all ## Slow, distributed and SLURM tests as well
	$(BIN)/python -m pytest -m "not gpu"

gpu-check: $(VENV)/.all ## Checks that need GPUs, ten minutes: strategies, resume, quantized weights
	$(BIN)/python -m pytest tests/gpu -m gpu -rs -s

slurm: ## A real one-node SLURM on this Debian machine, for the slurm tests (root)
	slurm/single_node.sh start

docs: $(VENV)/.docs ## Build the documentation into site/
	$(BIN)/mkdocs build --strict

docs-run: $(VENV)/.all ## Type the quick commands of README and docs, in a fresh clone
	$(BIN)/python -m tools.docs_commands run
	$(BIN)/python -m tools.docs_commands cluster

docs-long: $(VENV)/.all ## Type the long ones, an hour, in a fresh clone
	$(BIN)/python -m tools.docs_commands long

clean: ## Remove the environment and caches; runs/ stays
	rm -rf $(VENV) .snakemake .pytest_cache .mypy_cache .ruff_cache .hypothesis site *.egg-info

$(VENV)/.python:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "Python >= 3.11 is needed: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and alone, from its pin: as a dependency of something else, another build could come.
$(VENV)/.run: $(VENV)/.python constraints.txt pyproject.toml
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/.gguf: $(VENV)/.run
	$(PIP) --editable '.[gguf]'
	@touch $@

# What only the slow and the distributed tests need.
$(VENV)/.all: $(VENV)/.dev
	$(PIP) --editable '.[trl,slurm,deepspeed]'
	@touch $@

$(VENV)/.docs: $(VENV)/.run
	$(PIP) --editable '.[docs]'
	@touch $@

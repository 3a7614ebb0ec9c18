# `make` lists the targets. Every target sets up $(VENV) first, once, from pyproject.toml and constraints.txt.
#
#   PYTHON     interpreter for the virtual environment, 3.11 or newer          make PYTHON=/opt/python3.12/bin/python3 test
#   VENV       where the virtual environment lies                              make VENV=/tmp/venv test
#   PIP_FLAGS  passed to `pip install`, for example another package index      make PIP_FLAGS="--extra-index-url ..." run
#   TEST_JOBS  processes that run the tests, by default one a core               make TEST_JOBS=1 test
#   ARGS       passed to the command of the target                             make run ARGS="--shape 8192x4096x16384"

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
ARGS ?=
TEST_JOBS ?= auto

BIN := $(VENV)/bin
READY := $(VENV)/.ready
RESULTS ?= docs/results
ATTACK_SECONDS ?= 3600
BENCH_SHAPES ?= 16384x4096x16384 16384x6144x24576 16384x8192x28672 4096x8192x8192 8192x4096x21504
CUDA_SOURCES := $(shell find templates/include -name "*.cuh")

.DEFAULT_GOAL := help
.PHONY: help setup run test test-gpu test-install attack check format bench docs docs-page clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## create the virtual environment with pinned packages (every target does so when it is needed)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "srelu24 needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; }
	@test -x $(BIN)/python || { echo "setting up $(VENV), once"; $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable '.[dev]'
	@touch $@

run: $(READY) ## the main job: check the machine, build, tune, run and time a squared-ReLU FFN
	$(BIN)/srelu24 run $(ARGS)

test: $(READY) ## unit, compile, compatibility and example tests; no GPU needed
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist worksteal $(ARGS)

test-gpu: $(READY) ## tests that need a Hopper GPU
	$(BIN)/python -m pytest tests/gpu $(ARGS)

test-install: $(READY) ## installs, a clone, and CUDA 13 compilers from the package index
	$(BIN)/python -m pytest -m '' tests/install $(ARGS)

attack: $(READY) ## an hour of damaged bundles, records and stores, random command lines and killed processes
	SRELU24_ATTACK_SECONDS=$(ATTACK_SECONDS) $(BIN)/python -m pytest tests/attack $(ARGS)

check: $(READY) ## lint, format, types, import rules, C++ format, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(if $(CUDA_SOURCES),$(BIN)/clang-format --dry-run -Werror $(CUDA_SOURCES))
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist worksteal $(ARGS)

format: $(READY) ## rewrite Python and CUDA sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CUDA_SOURCES),$(BIN)/clang-format -i $(CUDA_SOURCES))

bench: $(READY) ## measure on this GPU, write result files, refresh the README's tables
	$(BIN)/srelu24 bench ffn $(BENCH_SHAPES:%=--shape %) --results $(RESULTS) $(ARGS)
	$(BIN)/srelu24 bench report --results $(RESULTS)

docs: $(READY) ## build the documentation site into dist/site; strict, and no network but for installing the builder
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet $(ARGS)

docs-page: $(READY) ## write docs/compatibility.md from the tests
	$(BIN)/python tests/compatibility/page.py

clean: ## remove build outputs and tool caches; the virtual environment stays
	find build -mindepth 1 -maxdepth 1 ! -name README.md ! -name .gitignore -exec rm -rf {} +
	rm -rf dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find generator python tests -name __pycache__ -type d -prune -exec rm -rf {} +

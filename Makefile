# make demo, test, lint, bench, clean. The first that needs it sets up .venv; the others reuse it.

PYTHON ?= python3
CHECKPOINT ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench families presets clean

help:
	@echo "make demo    four prompts with all experts in memory and with a quarter of them"
	@echo "make test    linter, type checker, and all tests with coverage"
	@echo "make lint    linter and type checker"
	@echo "make bench   speed and memory, ours and a peer in turn; CHECKPOINT=folder"
	@echo "make families  write docs/reference/families.md from a run of every family"
	@echo "make presets   write docs/reference/presets.md from the table of presets"
	@echo "make clean   remove what the others made, .venv too"

demo: .venv/.ready
	@$(BIN)/python -m retinue.cli.demo

test: lint
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses=8 --dist=loadfile --cov --cov-report=term:skip-covered

lint: .venv/.ready
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

bench: .venv/.ready
	@$(BIN)/python -m benchmarks $(if $(CHECKPOINT),"$(CHECKPOINT)")

families: .venv/.ready
	@$(BIN)/python -m tests.families_table

presets: .venv/.ready
	@$(BIN)/python -m tests.presets_table

# torch comes first and by itself, so that the resolver has no choice left for its largest part.
.venv/.ready: pyproject.toml setup.py $(wildcard native/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "retinue needs Python 3.11 or later: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "setting up .venv: this downloads torch and takes some minutes" >&2
	@$(PYTHON) -m venv .venv
	@$(PIP) install torch==2.13.0
	@$(PIP) install -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build dist src/*.egg-info src/retinue/libretinue.* .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Everything runs in .venv, which each target makes and fills as far as it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
ADAPTERS := adapters/langchain adapters/llama-index
PROJECTS := pyproject.toml $(ADAPTERS:%=%/pyproject.toml) constraints.txt
TYPED := guardmw adapters/langchain/langchain_guardmw adapters/llama-index/llama_index
EDITABLE := $(ADAPTERS:%=--editable ./%)

.PHONY: help demo test test-full check coverage bench build clean
help:
	@echo 'make demo       a guided tour on real conversations'
	@echo 'make test       the tests'
	@echo 'make test-full  the tests, with those that need torch'
	@echo 'make check      ruff, mypy --strict and the layers of the house'
	@echo 'make coverage   the tests, and the lines that none of them runs'
	@echo 'make bench      how fast a guard is'
	@echo 'make build      wheels and sdists of all three distributions, in dist/'
	@echo 'make clean      remove what the others made'

demo: $(VENV)/demo.stamp
	@$(BIN)/guardmw demo

test: $(VENV)/dev.stamp
	@$(BIN)/python -m pytest

test-full: $(VENV)/full.stamp
	@$(BIN)/python -m pytest -m ''

check: $(VENV)/dev.stamp
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@MYPYPATH=.:adapters/langchain:adapters/llama-index $(BIN)/mypy $(TYPED)
	@$(BIN)/python -m pytest --quiet tests/test_layers.py

coverage: $(VENV)/dev.stamp
	@$(BIN)/coverage run -m pytest
	@$(BIN)/coverage report

bench: $(VENV)/dev.stamp
	@$(BIN)/python tests/benchmarks/overhead.py

build: $(VENV)/dev.stamp
	@rm -rf dist
	@for project in . $(ADAPTERS); do $(BIN)/python -m build -qq --outdir dist $$project || exit 1; done
	@ls -l dist

clean:
	@rm -rf $(VENV) dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage

$(VENV)/bin/python:
	@$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	@$(PIP) --editable .
	@touch $@

# One command for all three: pip looks for an unpublished guardmw nowhere else.
$(VENV)/dev.stamp: $(PROJECTS) | $(VENV)/bin/python
	@$(PIP) --editable '.[dev]' $(EDITABLE)
	@touch $@ $(VENV)/demo.stamp

# torch first and alone: what comes after must not choose another build of it.
$(VENV)/full.stamp: $(VENV)/dev.stamp
	@$(PIP) torch
	@$(PIP) --editable '.[dev,train,tinysafe]' $(EDITABLE)
	@touch $@

# `make demo` and `make test` set up all they need: Python 3.11 or newer and the package index suffice.
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format docs clean

# The first interpreter that is new enough.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Test processes. Each keeps to one thread then (tests/conftest.py).
WORKERS ?= 2
# SLOW=1 runs the slow tests too, SLOW=all every test; ARGS goes to pytest as it is.
SLOW ?=
TIER := $(if $(filter all,$(SLOW)),--exhaustive,$(if $(SLOW),--slow))
ARGS ?=

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 10

setup: $(STAMP) ## create .venv with fxopt and all extras, as pinned

# torch comes first and alone, so that no other requirement chooses its version or build.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "fxopt needs Python 3.11 or newer (make PYTHON=...)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[hf,onnx,triton,dev]'
	@touch $@

demo: $(STAMP) ## optimise a small trained model and show the decision
	$(BIN)/python examples/demo.py

test: $(STAMP) ## run the tests (SLOW=1: as CI does; SLOW=all: all; ARGS="-k name")
	$(BIN)/python -m pytest tests -q -n $(WORKERS) --dist worksteal $(TIER) $(ARGS)

lint: $(STAMP) ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP) ## sort imports, format, apply safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Only the site needs these, so `make test` does without them.
$(DOCS_STAMP): $(STAMP)
	$(PIP) install -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(DOCS_STAMP) ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

clean: ## remove the environment, builds and caches
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

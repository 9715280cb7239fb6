# `make demo` and `make test` need only python3 (>= 3.11), make and a package index.

PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench clean

help:
	@echo "make demo    install, fetch a small real model, serve it, ask it one question"
	@echo "make test    lint and the whole test suite"
	@echo "make lint    ruff (check, format) and pyright only"
	@echo "make bench   seconds and tokens/s of the demo model on this machine"
	@echo "make clean   remove .venv and build leftovers"

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: jaxserve needs Python >= 3.11; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	       "Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed-%: $(VENV)/.created pyproject.toml
	@echo "Installing jaxserve and its '$*' extra into $(VENV) (once; this takes some minutes)"
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[$*]'
	@touch $@

.PRECIOUS: $(VENV)/.installed-demo $(VENV)/.installed-test

demo: $(VENV)/.installed-demo
	$(BIN)/python -m jaxserve.demo

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.installed-test
	$(BIN)/python -m jaxserve bench latency --model demo

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Every target sets up its own environment first: a fresh clone needs only python3 (3.11 or newer)
# and a package index.
#
#   make test PYTHON=python3.12    makes .venv with another Python
#   make test VENV=                uses `python3`, `pytest`, ... as they are on PATH, installs nothing
#   make test ARGS='-k switch -x'  hands arguments to pytest (also: make bench)

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(if $(VENV),$(VENV)/bin/)
READY := $(if $(VENV),$(VENV)/.installed)

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /make \1 - /p' Makefile

demo: $(READY) ## tokenise, verify, reconstruct and sample with a small untrained model
	$(if $(VENV),PATH="$$(cd $(BIN) && pwd):$$PATH" )bash examples/demo.sh

test: $(READY) ## run all tests; those that need a GPU are skipped without one
	$(BIN)pytest $(ARGS)

lint: $(READY) ## check style and formatting
	$(BIN)ruff check .
	$(BIN)ruff format --check .

format: $(READY) ## mend what lint finds and can be mended by itself
	$(BIN)ruff check --fix .
	$(BIN)ruff format .

bench: $(READY) ## run the benchmarks
	@test -d benchmarks || { echo "This version has no benchmarks yet."; exit 1; }
	$(BIN)pytest benchmarks $(ARGS)

# Installed anew only when what it is made from changed; an interrupted install leaves no stamp.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	@echo "Installing into $(VENV) (PyTorch is a few GB: a minute or more) ..."
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test,bench,dev]'
	touch $@

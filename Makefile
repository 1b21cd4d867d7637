# Every target first sets up its own environment: a fresh clone needs only python3 (3.11 or newer)
# and a package index.
#
#   make test PYTHON=python3.12    makes .venv with another Python
#   make test VENV=                uses `python3`, `pytest`, ... as they are on PATH, installs nothing
#   make test ARGS='-k switch -x'  hands arguments to pytest
#   make bench ARGS=benchmarks/bench_cache.py    runs only that file
#   make bench RESULTS=benchmarks/results        writes the committed results

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Where `make bench` and `make gpu-report` write, so that a run changes no committed file.
RESULTS ?= build/benchmarks
# What `make compare` compares: the committed results with yours.
OLD ?= benchmarks/results
NEW ?= $(RESULTS)
# Time limit of `make gpu-report`, in seconds.
SECONDS ?= 450

BIN := $(if $(VENV),$(VENV)/bin/)
READY := $(if $(VENV),$(VENV)/.installed)

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench compare aot report gpu-report

# Benchmarks are bench_* functions in bench_*.py; a plain `pytest` never runs them.
BENCH := -o python_files='bench_*.py' -o python_functions='bench_*' \
	$(if $(findstring .py,$(ARGS)),,benchmarks)
# One process per core, at most 4: each may hold a full-size model. The tests of a file share its
# fixtures; files run in the order of tests/conftest.py, the longest first.
PARALLEL := -n auto --maxprocesses=4 --dist loadfile --no-loadscope-reorder
# The package laid out as an install would do it, for machines where nothing can be installed.
BARE := $(CURDIR)/build/bare

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1 - /p' Makefile

demo: $(READY) ## tokenise, verify, reconstruct and sample with the emoji model that comes along
	$(if $(VENV),PATH="$$(cd $(BIN) && pwd):$$PATH" )bash examples/demo.sh

test: $(READY) ## run all tests; those that need a GPU are skipped without one
	$(BIN)pytest $(PARALLEL) $(ARGS)

lint: $(READY) ## check style and formatting
	$(BIN)ruff check .
	$(BIN)ruff format --check .

format: $(READY) ## mend what lint finds and can be mended by itself
	$(BIN)ruff check --fix .
	$(BIN)ruff format .

bench: $(READY) ## run the benchmarks here into build/benchmarks (no GPU: several minutes)
	RESULTS=$(RESULTS) $(BIN)pytest $(BENCH) $(ARGS)

compare: $(READY) ## what got slower beyond noise from OLD's results to NEW's; exit 1 if any did
	$(BIN)python benchmarks/compare.py $(OLD) $(NEW)

aot: $(READY) ## compile every kernel for sm_80, sm_90, sm_100 and check registers, spills, budget
	$(BIN)python benchmarks/aot.py --check $(ARGS)

report: $(READY) ## from benchmarks/results rewrite benchmarks/REPORT.md, plots and README's table
	$(BIN)python benchmarks/report.py
	$(BIN)python benchmarks/precision.py --table

gpu-report: ## all that needs a GPU within SECONDS: tests, tune, benchmarks; uses $(PYTHON) as it is
	rm -rf $(BARE) && mkdir -p $(BARE)
	cp -r vfmtok_fast $(BARE)/ && cp -r kernels $(BARE)/vfmtok_fast/kernels
	RESULTS=$(RESULTS) PYTHONPATH=$(BARE) $(PYTHON) benchmarks/gpu_report.py --seconds $(SECONDS)

# Reinstall only if a file it depends on has changed; an interrupted install leaves no stamp.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	@echo "Installing into $(VENV) (PyTorch is a few GB: a minute or more) ..."
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test,bench,dev]'
	touch $@

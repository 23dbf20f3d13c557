# Tael: `make demo` trains a small reasoning assistant and lets you talk to it; `make help` lists the rest.
# VENV=path uses another virtual environment, PYTHON=program another Python (3.11 or newer) to make it with.

VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
CORE   := $(VENV)/.tael-core
ALL    := $(VENV)/.tael-all

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(ALL)  ## make the virtual environment with everything, where it is not up to date

# The pin in constraints.txt alone decides which torch pip takes.
$(CORE): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing Tael into $(VENV) (about a minute the first time)"
	@$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

$(ALL): $(CORE)
	@echo "installing what the tests need into $(VENV)"
	@$(BIN)/python -m pip install -q -c constraints.txt -e ".[test,lint]"
	@touch $@

demo: $(CORE)  ## from text to a reasoning assistant, with its price
	@$(BIN)/tael run recipes/demo.toml
	@if [ -t 0 ] && [ -t 1 ]; then $(BIN)/tael serve --open; else echo "(tael is $(BIN)/tael; tael serve opens the assistant)"; fi

test: setup  ## run all tests
	@$(BIN)/python -m pytest $(ARGS)

lint: setup  ## style, types, and who may import whom
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@$(BIN)/lint-imports --no-cache

bench: setup  ## run every benchmark of bench/, which write results/ and docs/results.md (builds llama.cpp, an hour)
	@$(BIN)/python -m pip install -q -c constraints.txt -e ".[bench]"
	@for program in $(filter-out bench/common.py bench/baselines.py bench/quality_tables.py bench/results_page.py bench/peer%,$(wildcard bench/*.py)) bench/results_page.py; do \
	    echo "== $$program"; $(BIN)/python $$program || exit 1; done

clean:  ## remove the virtual environment and caches; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests bench -name __pycache__ -type d -exec rm -rf {} +
	rm -rf src/*.egg-info

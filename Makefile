# On a fresh machine `make demo` or `make test` is all that is needed: each makes the environment .venv first.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
DPROX := .venv-dprox
BENCH := .venv-bench
READY := $(VENV)/.ready
SHELL := /bin/bash
say = @printf '\n== %s\n' $(1)

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help demo examples bench test test-dprox lint types clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(READY) ## learn an unknown blur through the solver, and write a picture
	$(call say,'Demo: learning the operator through the solve')
	@$(BIN)/python -m nablasolve

examples: $(READY) ## five short programs of the kind that a user writes, each with a picture, in outputs/
	$(call say,'Examples')
	@mkdir -p outputs
	@set -e; for f in examples/*.py; do echo "$$f"; (cd outputs && ../$(BIN)/python ../$$f); done

bench: $(BENCH)/.ready ## compare with other libraries, in an environment of its own (a first look: BENCH_OPTIONS="--sizes small")
	$(call say,'Benchmark')
	@$(BENCH)/bin/python -m benchmarks $(BENCH_OPTIONS)

test: lint types ## lint, types, and all tests
	$(call say,'Tests: pytest with $(WORKERS) workers')
	@OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

test-dprox: $(DPROX)/.ready ## ∇-Prox as a client, in an environment of its own with the old NumPy that it needs
	$(call say,'Tests: dprox through nablasolve')
	@OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(DPROX)/bin/python -m pytest -q tests_dprox

lint: $(READY) ## ruff: rules and format
	$(call say,'Lint: ruff check and ruff format --check')
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(READY) ## mypy --strict on src
	$(call say,'Types: mypy on src')
	@$(BIN)/mypy

clean: ## remove the environment and all caches
	rm -rf $(VENV) $(DPROX) $(BENCH) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(READY) exists only while the environment is whole: it goes first and comes last. Without it whatever an interrupted
# run has left is cleared away; with an older one the environment is brought up to date in place.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'No python3.11 or python3 was found: install Python 3.11 and run make again.' >&2; exit 1; }
	$(call say,'Environment 1/3: $(VENV) from $(PYTHON)')
	@if test -e $@; then rm -f $@; else $(PYTHON) -m venv --clear $(VENV); fi
	$(call say,'Environment 2/3: torch (the long download)')
	@$(BIN)/python -m pip install -c constraints.txt torch
	$(call say,'Environment 3/3: nablasolve and its tools')
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all]'
	@$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps deepinv
	@touch $@
	$(call say,'Environment ready')

$(DPROX)/.ready: pyproject.toml tests_dprox/requirements.txt
	@test -n "$(PYTHON)" || { echo 'No python3.11 or python3 was found: install Python 3.11 and run make again.' >&2; exit 1; }
	$(call say,'Environment of dprox 1/3: $(DPROX) from $(PYTHON)')
	@$(PYTHON) -m venv --clear $(DPROX)
	$(call say,'Environment of dprox 2/3: torch (the long download)')
	@$(DPROX)/bin/python -m pip install torch==2.13.0
	$(call say,'Environment of dprox 3/3: dprox and what it imports')
	@$(DPROX)/bin/python -m pip install --quiet -r tests_dprox/requirements.txt
	@$(DPROX)/bin/python -m pip install --quiet --no-deps dprox==0.2.1 -e .
	@touch $@

# A library that pip cannot install is left out, and the table says so.
$(BENCH)/.ready: pyproject.toml constraints.txt benchmarks/requirements.txt
	@test -n "$(PYTHON)" || { echo 'No python3.11 or python3 was found: install Python 3.11 and run make again.' >&2; exit 1; }
	$(call say,'Environment of the benchmark 1/3: $(BENCH) from $(PYTHON)')
	@$(PYTHON) -m venv --clear $(BENCH)
	$(call say,'Environment of the benchmark 2/3: torch (the long download)')
	@$(BENCH)/bin/python -m pip install -c constraints.txt torch
	$(call say,'Environment of the benchmark 3/3: nablasolve and the other libraries')
	@$(BENCH)/bin/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	@grep -v '^#' benchmarks/requirements.txt | while read -r line; do \
		$(BENCH)/bin/python -m pip install --quiet -c constraints.txt $$line </dev/null || echo "not installed: $$line"; done
	@touch $@

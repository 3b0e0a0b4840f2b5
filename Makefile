# Two words to know: `make demo` and `make test`. Both set everything up first.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest/bin
PEER := .venv-peer/bin
VLLM := .venv-vllm/bin
PIP_FLAGS := --quiet --disable-pip-version-check
# One process per core, with one thread each; idle ones take over tests of busy ones.
PARALLEL ?= -n auto --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast check format bench harness test-oldest test-vllm test-vllm-all peer clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "kvsieve needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e ".[dev]"
	@touch $@

demo: .venv/.ready ## set up, then compress real generation on the shipped reference model
	$(BIN)/kvsieve compare --sample retrieval --seed 7 --budget 20% \
	  --methods full,random,streaming-llm,snapkv,keydiff
	$(BIN)/kvsieve compare --sample instructions --seed 2 --budget 25% \
	  --methods full,random,streaming-llm,snapkv,adakv,keydiff
	$(BIN)/kvsieve compare --sample reasoning --seed 3 --steps 40 --budget 250 \
	  --protect 0:150 --set interval=16 --set h2o.recent=16 \
	  --methods full,random,streaming-llm,tova,h2o,g-kv

test: .venv/.ready ## set up, then run all tests
	$(BIN)/python -m pytest -q $(PARALLEL)

test-fast: .venv/.ready ## the tests without the slow ones
	$(BIN)/python -m pytest -q $(PARALLEL) -m "not slow"

check: .venv/.ready ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: .venv/.ready ## rewrite files in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/.ready ## speed rows side by side (slow; see `kvsieve bench speed --help`)
	$(BIN)/kvsieve bench speed --out benchmarks/speed.jsonl

harness: .venv/.ready ## add lm-evaluation-harness for public benchmarks and chat models (0.7 GB), and test it
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e ".[harness]"
	$(BIN)/python -m pytest -q tests/bench/test_harness.py tests/bench/test_harness_model.py \
	  tests/bench/test_audit_chat.py

.venv-oldest/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST)/python -m pip install $(PIP_FLAGS) -c constraints-oldest.txt -e ".[dev]"
	@touch $@

test-oldest: .venv-oldest/.ready ## the laws on the oldest supported Transformers
	$(OLDEST)/python -m pytest -q $(PARALLEL) -m oldest

.venv-vllm/.ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/python -m pip install $(PIP_FLAGS) --no-deps -r constraints-vllm.txt
	$(VLLM)/python -m pip install $(PIP_FLAGS) --no-deps -e .
	@touch $@

# Warnings of vLLM and what it imports are no errors of ours.
test-vllm: .venv-vllm/.ready ## the vLLM plugin, in an environment with vLLM for CPUs
	$(VLLM)/python -m pytest -q -W default -m "not slow" tests/vllm

test-vllm-all: .venv-vllm/.ready ## the same with the slow tests: soak, all recipes
	$(VLLM)/python -m pytest -q -W default tests/vllm

peer: ## the environment of kvpress, for parity vectors and speed comparisons
	$(PYTHON) -m venv .venv-peer
	$(PEER)/python -m pip install $(PIP_FLAGS) torch==2.13.0
	$(PEER)/python -m pip install $(PIP_FLAGS) -r tests/peers/requirements.txt
	$(PEER)/python -m pip install $(PIP_FLAGS) --no-deps kvpress==0.5.5

clean: ## remove environments and caches
	rm -rf .venv .venv-oldest .venv-peer .venv-vllm .pytest_cache .ruff_cache .hypothesis

# Sets everything up in .venv, trains, tests and checks. `make help` lists the targets.

PYTHON ?= python3
OPTIMIZER ?= polar
ARCHITECTURE ?= modern
CONFIG ?= $(firstword $(wildcard configs/gpt_zero2_$(OPTIMIZER).json) configs/gpt_$(OPTIMIZER).json)
NAME ?= $(OPTIMIZER)
STEPS ?=
VOCABULARY ?=
DATA ?=
SEED ?=
PROTOCOL ?= small
STUDY ?=

VENV := .venv
DONE := $(VENV)/.done
ACTIVATE := . $(VENV)/bin/activate &&
SETUP := VENV=$(VENV) PYTHON=$(PYTHON) launch/setup.sh

# Private to this environment: two that share a folder rebuild each other's ops.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions

GPUS_FOUND := $(shell nvidia-smi -L 2>/dev/null | grep -c ^GPU)
ifeq ($(GPUS_FOUND),0)
# A rank is a process on the CPU; one thread each, since threads of several ranks on the same cores only wait.
GPUS ?= 2
export DS_ACCELERATOR := cpu
export OMP_NUM_THREADS := 1
else
GPUS ?= $(GPUS_FOUND)
endif

FREE_PORT := import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])

# The parts of the tests, of which `make test` has two running at any time, the longest first. `rest` is whatever no other
# part has.
PARTS := distributed rest launch megatron_models roots algorithm

# Processes that import what this one compiles anew would each compile it again: hundreds in the tests.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup pretrain test $(PARTS:%=test-%) trainers trainers-test coverage lint wheel-test corpora evidence clean unlock

help:  ## this list
	@grep -E '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed 's/:.*  ## /|/' | awk -F'|' '{printf "make %-12s %s\n", $$1, $$2}'
	@echo
	@echo "make pretrain takes OPTIMIZER=polar|shampoo|spectral|muon|adamw ARCHITECTURE=modern|gpt2 VOCABULARY=bytes|size GPUS=ranks"
	@echo "              STEPS= SEED= NAME= DATA=file-or-folder CONFIG=json"
	@echo "make evidence takes PROTOCOL=small|full STUDY=\"some of its names\""

setup: $(DONE)/ops $(if $(DATA),,data/gutenberg)  ## the environment, DeepSpeed's ops and the corpus

pretrain: setup unlock  ## pretrain a GPT through the deepspeed launcher; call again to resume
	$(ACTIVATE) deepspeed --num_gpus $(GPUS) --master_port $$(python -c '$(FREE_PORT)') \
		launch/pretrain_gpt.py --deepspeed_config $(CONFIG) --name $(NAME) \
		--architecture $(ARCHITECTURE) $(if $(VOCABULARY),--vocabulary $(VOCABULARY)) \
		$(if $(STEPS),--steps $(STEPS)) $(if $(SEED),--seed $(SEED)) $(if $(DATA),--data $(DATA))

test: $(DONE)/ops unlock  ## the tests, two parts at a time; leaves coverage data for `make coverage`
	rm -f .coverage .coverage.*
	$(MAKE) --jobs 2 --keep-going --no-print-directory $(PARTS:%=test-%)
	$(ACTIVATE) coverage combine --quiet

test-roots test-algorithm test-megatron_models: test-%:
	$(ACTIVATE) coverage run -m pytest tests/$*

# Not counted, which takes longer: what they use of the package is used by the other parts too.
test-distributed test-launch: test-%:
	$(ACTIVATE) python -m pytest tests/$*

test-rest:
	$(ACTIVATE) coverage run -m pytest tests $(patsubst %,--ignore tests/%,$(filter-out rest,$(PARTS)) trainers)

trainers: $(DONE)/trainers

trainers-test: $(DONE)/trainers unlock  ## the examples and the tests of trainers, with Hugging Face's and Lightning's libraries
	$(ACTIVATE) HF_HUB_OFFLINE=1 python -m pytest tests/trainers

coverage: $(DONE)/package  ## what the last `make test` covered, at least 90 per cent of the package
	$(ACTIVATE) coverage report --fail-under 90

lint: $(DONE)/package  ## ruff, its formatter, and mypy --strict on the package
	$(ACTIVATE) ruff check .
	$(ACTIVATE) ruff format --check .
	$(ACTIVATE) mypy --strict ds_shampoo

wheel-test: $(DONE)/package  ## the README's example, run from the built wheel in an empty environment
	BUILDER=$(VENV)/bin/python PYTHON=$(PYTHON) tests/wheel_test.sh

clean:  ## remove the environment and everything built; runs and corpus stay
	rm -rf $(VENV) build dist *.egg-info .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(DONE)/venv:
	$(SETUP) venv
	@mkdir -p $(DONE) && touch $@

$(DONE)/torch: $(DONE)/venv
	$(SETUP) torch
	@touch $@

$(DONE)/package: $(DONE)/torch pyproject.toml setup.py
	$(SETUP) package
	@touch $@

$(DONE)/ops: $(DONE)/package | unlock
	$(SETUP) ops
	@touch $@

$(DONE)/trainers: $(DONE)/ops
	$(SETUP) trainers
	@touch $@

# A process that was killed while it loaded an op leaves a lock on which every later one waits for ever.
unlock:
	@$(PYTHON) launch/leftovers.py $(TORCH_EXTENSIONS_DIR)

# Order-only: fetched once. Where Gutenberg's books can't be had, training says so and uses another text.
data/gutenberg: | $(DONE)/package
	-$(ACTIVATE) python launch/fetch_data.py gutenberg

corpora: $(DONE)/package  ## every corpus that launch/ trains on
	$(ACTIVATE) python launch/fetch_data.py --all

evidence: setup corpora unlock  ## the small protocol over all tasks; PROTOCOL=full for the one that the docs report
	$(ACTIVATE) python -m benchmarks.evidence --protocol $(PROTOCOL) $(if $(STUDY),--only $(STUDY))

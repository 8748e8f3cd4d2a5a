# The two commands: `make reproduce-vldb` and `make test`. Each sets up what it needs by itself.

PYTHON  ?= python3
FULL    ?=
PROFILE ?= $(if $(FULL),full,standard)
RESULTS ?= results/$(PROFILE)
REPORT  ?= report
MINUTES ?= 30
VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready

export TOKENIZERS_PARALLELISM := false

.PHONY: help setup reproduce-vldb report test test-all soak bench lint format clean

help:
	@echo 'make reproduce-vldb           train, check, measure and write report/index.html (PROFILE=quick: minutes; FULL=1: an hour and more)'
	@echo 'make test                     the quick tests       make test-all   also the slow ones'
	@echo 'make soak                      half an hour of sweeps while things go wrong (MINUTES=2: shorter)'
	@echo 'make lint | format | bench    ruff and mypy | ruff format | microbenchmarks'

setup: $(READY)

# torch comes first and by itself: the packages that are built here (fairscale) look at it, and
# pip's build isolation would fetch another one for each of them.
$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo 'making $(VENV)'; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo 'Python 3.11 or newer is needed: make PYTHON=python3.11 (after rm -r $(VENV))'; exit 1; }
	@echo 'installing torch'
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy setuptools wheel ninja
	@echo 'installing the suite, the baselines, W&B and the development tools'
	@DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation \
	    -c constraints.txt -e '.[baselines,wandb,export,dev]'
	@$(BIN)/python -m suite.impls.deepspeed_build
	@touch $(READY)

# A cell that failed (status 1) is named, and the report is written from the others.
reproduce-vldb: setup
	@status=0; $(BIN)/suite sweep configs/sweeps/reproduce_$(PROFILE).yaml --out $(RESULTS) || status=$$?; \
	if [ $$status -le 1 ]; then $(MAKE) --no-print-directory report; fi; exit $$status

# Projections take a minute or two and depend on nothing that was measured: they are made anew every time.
report: setup
	@rm -rf $(RESULTS)/projection
	@$(BIN)/suite project --sensitivity --out $(RESULTS)/projection > /dev/null
	@$(BIN)/suite project --elsewhere --out $(RESULTS)/projection > /dev/null
	@for method in zero3 mics; do \
	    $(BIN)/suite project impl=$$method workload=bert-50b cluster=p4d cluster.nodes=16 train.micro_batch=8 \
	        --timeline --out $(RESULTS)/projection > /dev/null || exit; done
	@for method in zero3 'mics impl.options.partition_size=8' deepspeed-zero3; do \
	    $(BIN)/suite project --scaling impl=$$method workload=bert-10b cluster=p4d train.micro_batch=8 \
	        --out $(RESULTS)/projection > /dev/null || exit; done
	@if grep -qE '"evidence": "emulated", "impl": "(zero3|mics)"' $(RESULTS)/records.jsonl; then \
	    $(BIN)/suite project --emulated $(RESULTS) --out $(RESULTS)/projection > /dev/null; fi
	@$(BIN)/suite report $(RESULTS) $(RESULTS)/projection --out $(REPORT)

test: setup
	@$(BIN)/python -m pytest -m 'not slow'

test-all: setup
	@$(BIN)/python -m pytest

# Sweeps under random faults; MINUTES=2 for a short form.
soak: setup
	@$(BIN)/python tests/soak.py --minutes $(MINUTES)

bench: setup
	@$(BIN)/python -m pytest tests/bench --benchmark-enable --benchmark-only

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) report results build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# `make` alone lists the targets. ARGS go to the command: make serve ARGS="--mixed 2 --port 9000"

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help install serve wheel test test-floor conformance chaos fuzz lint clients format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## make .venv, with every version pinned

# torch first and alone: whichever build of the pinned version the index offers is then settled for what follows.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools torch
	$(PIP) --no-build-isolation --editable '.[torch,structured,dev]'
	$(BIN)/python -m diptych.transfer.native || echo "no C++ compiler: KV copies will use numpy, which is slower"
	$(BIN)/python -m diptych.engine.kernels || echo "no C++ compiler: the engine will use torch alone, which is slower"
	@touch $(STAMP)

serve: $(STAMP)  ## serve the bundled model with one prefill and one decode worker
	@exec $(BIN)/diptych serve $(ARGS)

# Of a copy, so that nothing is packed that was compiled from other sources, and the tree stays as it is.
WHEEL := build/wheel
DIST  := dist

wheel: $(STAMP)  ## make dist/*.whl with the libraries of every instruction set, for machines without a compiler
	@rm -rf $(WHEEL) && mkdir -p $(WHEEL) && cp -r diptych pyproject.toml README.md LICENSE $(WHEEL)
	@find $(WHEEL) -name '*.so' -delete
	@cd $(WHEEL) && for module in diptych.transfer.native diptych.engine.kernels; do \
	  $(abspath $(BIN))/python -m $$module --in-place || exit 1; \
	done
	@$(BIN)/pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir $(DIST) \
	  --config-settings=--build-option=--plat-name=linux_$$(uname -m) $(abspath $(WHEEL))
	@ls $(DIST)/diptych-*.whl

test: $(STAMP)  ## run the whole suite
	@$(BIN)/python -m pytest -q -ra --durations=10 $(ARGS)

chaos: $(STAMP)  ## kill and stop workers under load, hundreds of times (about a quarter of an hour)
	@PYTHONPATH=$(CURDIR) $(BIN)/python tests/chaos.py $(ARGS)

# The oldest transformers that pyproject.toml admits. torch stays: an older build is not to be had for every machine.
FLOOR  := $(VENV)/floor/transformers-5.17.0
FLOORS := tests/test_models.py tests/test_tokens.py tests/test_engine_torch.py tests/test_vectors.py

$(FLOOR): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ transformers==5.17.0 huggingface-hub==1.33.0

test-floor: $(FLOOR)  ## the engine's tests on the oldest transformers there may be
	@PYTHONPATH=$(FLOOR) $(BIN)/python -m pytest -q -rs -p no:cacheprovider $(FLOORS) $(ARGS)

conformance: $(STAMP)  ## print docs/conformance.md: families and features in every mode (about three minutes)
	@PYTHONPATH=$(CURDIR) $(BIN)/python benchmarks/conformance.py --markdown

fuzz: $(STAMP)  ## give every decoder what nobody should write: make fuzz ARGS="--minutes 10"
	@$(BIN)/python tests/fuzz.py $(ARGS)

lint: $(STAMP)  ## ruff (lint, format) and mypy
	@failed=; for check in "ruff check" "ruff format --check" mypy; do \
	  echo "$$check"; $(BIN)/$$check || failed=1; \
	done; test -z "$$failed"

clients: $(STAMP)  ## other people's clients against a live server (lm-eval, langchain, npm; installs them beside)
	@PYTHONPATH=$(CURDIR) $(BIN)/python tests/external/run.py $(ARGS)

format: $(STAMP)  ## let ruff format and fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv, caches and builds
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# `make demo` and `make test` do all of their own set-up. `make help` lists the rest.

VENV ?= .venv
# The first Python here that is new enough and can make a virtual environment and compile C++ against itself.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$p tools/doctor.py python >/dev/null 2>&1 && { echo $$p; exit; }; done; echo python3)
# Inductor takes its C++ compiler from CXX, and only g++ without it.
ifeq ($(origin CXX),default)
CXX := $(or $(firstword $(foreach c,g++ clang++ c++,$(shell command -v $(c) 2>/dev/null))),g++)
endif
export CXX
BIN := $(VENV)/bin
PROGRAMS ?= 20000
BENCHMARKS ?= $(filter-out attention_gpu plot,$(basename $(notdir $(wildcard benchmarks/[a-z]*.py))))

.DEFAULT_GOAL := help
.PHONY: help demo test check fuzz bench kernels tables clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "PYTHON=... VENV=... CXX=... choose the interpreter, the environment and the compiler"

demo: $(VENV)/.demo  ## three real models: what is lifted, the error, the time (MODEL=hub-id-or-folder)
	@$(BIN)/python examples/demo.py

test: $(VENV)/.test  ## the tests (ARGS="-k causal" narrows them)
	@$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.test $(VENV)/.dev  ## format, lint, types, layers, size report, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tools/check.py
	$(BIN)/python -m pytest $(ARGS)

fuzz: $(VENV)/.test  ## random attention programs, refused or right (PROGRAMS=20000)
	TV_FUZZ_PROGRAMS=$(PROGRAMS) $(BIN)/python -m pytest tests/test_fuzz.py -s $(ARGS)

bench: $(VENV)/.test  ## the numbers of README.md (BENCHMARKS=memory ARGS="--heads 2" runs one)
	@for b in $(BENCHMARKS); do echo "benchmarks.$$b"; $(BIN)/python -m benchmarks.$$b $(ARGS) || exit 1; done

kernels: $(VENV)/.test  ## the GPU kernels' machine code per architecture, without a GPU
	@$(BIN)/python tools/kernels.py $(ARGS)

tables: $(VENV)/.test  ## every config that can be chosen compiles, fits and does not spill (ARGS="--arch sm90")
	@$(BIN)/python tools/tables.py $(ARGS)

clean:  ## remove the environment and every cache
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per extra: made again when pyproject.toml changes.
$(VENV)/.made: tools/doctor.py
	@$(PYTHON) tools/doctor.py || exit 1
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: $(VENV)/.made pyproject.toml
	@$(PYTHON) tools/doctor.py || exit 1
	@echo "Installing tvcompile[$*] into $(VENV): PyTorch is large, the first time takes minutes"
	@$(BIN)/python -m pip install --disable-pip-version-check -e ".[$*]"
	@touch $@

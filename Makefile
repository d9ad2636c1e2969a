# `make demo` and `make test` need only Python >= 3.11 with pip and venv; everything else is installed into $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MEGATRON_NEWEST := 0.19.2
# A worker for each processor, as most tests use but one; a file's tests stay together and share what its fixtures made.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
	--numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all lint bench clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
# Tests run with this version too: beside the one that pip takes, which minds what each says of Python.
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python --upgrade \
		--target $(VENV)/megatron-newest megatron-core==$(MEGATRON_NEWEST)
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m fastmoe train --preset demo --overwrite $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(PYTEST) $(ARGS)

test-all: lint
	$(PYTEST) -m "not gpu" $(ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m fastmoe bench --preset cpu --out benchmarks/results $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

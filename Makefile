# Two commands: `make demo` and `make test`. Both set everything up first and reuse the environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup demo test test-slow lint format benchmark clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]' ruff mypy
	touch $@

demo: setup
	$(BIN)/lightning-dp benchmark configs/benchmark/demo.yaml

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[benchmark]'
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info

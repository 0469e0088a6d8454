# make run: install and run the main job.   make test: install and check everything.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: run test lint format bench clean

run: .venv/run.stamp
	$(BIN)/fedsim -m experiment=quickstart strategy=fedavg,fedspeed

test: .venv/test.stamp lint
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: .venv/test.stamp
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/lint-imports --no-logo

format: .venv/test.stamp
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: .venv/test.stamp
	$(BIN)/python -m benchmarks.overhead

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch first and at its pin, so that no other package chooses it
.venv/torch.stamp: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	touch $@

.venv/run.stamp: .venv/torch.stamp pyproject.toml
	$(PIP) --editable .
	touch $@

.venv/test.stamp: .venv/torch.stamp pyproject.toml
	$(PIP) --editable '.[dev]'
	touch $@ .venv/run.stamp

# Every target makes .venv, with the development extras, when it is missing or pyproject.toml is newer.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow check bench clean

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: .venv/.installed  ## the main job: the small model over examples/prompts, on local Ray
	$(BIN)/moray demo

test: .venv/.installed  ## everything but the slow suites
	$(BIN)/python -m pytest -m 'not slow and not gpu'

test-slow: .venv/.installed  ## suites of minutes
	$(BIN)/python -m pytest -m slow

check: .venv/.installed  ## what CI checks beside the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.installed  ## the engine beside its peers, on this machine
	$(BIN)/python benchmarks/bench_engine.py

clean:
	rm -rf .venv out build *.egg-info

# Every target makes .venv, with the development extras, when it is missing or pyproject.toml is newer.
PYTHON ?= python3
BIN := .venv/bin

# The oldest that pyproject.toml takes, and that of the CUDA image.
AOT_TRITON := 3.6.0 3.7.1

.PHONY: demo test test-slow chaos aot check autoscale bench dashboards lock clean

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: .venv/.installed  ## the main job: the small model over examples/prompts, on local Ray
	$(BIN)/moray demo

test: .venv/.installed  ## everything but the slow suites
	$(BIN)/python -m pytest -m 'not slow and not gpu and not alone' --numprocesses=2 --dist=loadfile
	$(BIN)/python -m pytest -m 'not slow and not gpu and alone'

test-slow: .venv/.installed  ## suites of minutes
	$(BIN)/python -m pytest -m slow

chaos: .venv/.installed  ## workers, nodes and drivers killed, thirty in one job; part of test-slow
	$(BIN)/python -m pytest -m chaos

aot: .venv/.installed  ## compile every kernel with other Tritons too: that of torch 2.11, that of the image
	for version in $(AOT_TRITON); do \
		test -d .aot/triton-$$version || $(BIN)/python -m pip install --quiet --no-deps --target .aot/triton-$$version triton==$$version || exit 1; \
		TRITON_CACHE_DIR=.aot/cache-$$version PYTHONPATH=.aot/triton-$$version $(BIN)/python tests/kernels/gpu/compile_ahead.py || exit 1; \
	done

check: .venv/.installed  ## what CI checks beside the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

autoscale: .venv/.installed  ## Ray's autoscaler with what submit --kuberay makes, and a small Kubernetes of our own; part of test-slow
	$(BIN)/python -m pytest tests/k8s/test_autoscale.py

bench: .venv/.installed  ## the engine beside its peers, on this machine
	$(BIN)/python benchmarks/bench_engine.py

dashboards: .venv/.installed  ## Grafana's, after a new Ray or new metrics
	$(BIN)/python k8s/components/monitoring/dashboards.py

# Where torch's wheels without CUDA are: PyTorch's index, or a folder that has them.
TORCH_CPU ?= https://download.pytorch.org/whl/cpu/torch/
LOCK := $(BIN)/uv pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-annotate \
	--custom-compile-command 'make lock' pyproject.toml

# Triton, a third of the image, has nothing to do without a GPU.
lock: .venv/.installed  ## what the images install; LOCK_ARGS=--upgrade for newer versions
	echo 'torch==2.13.0+cpu' | $(LOCK) $(LOCK_ARGS) --constraint - --find-links $(TORCH_CPU) --no-emit-package triton --output-file k8s/image/cpu.lock
	echo 'torch==2.13.0' | $(LOCK) $(LOCK_ARGS) --constraint - --output-file k8s/image/cuda.lock

clean:
	rm -rf .venv .aot out build *.egg-info

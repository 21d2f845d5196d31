# Every target makes .venv when it is missing, or when pyproject.toml or the lock is newer: with what moray needs for the
# demo, with the development extras as well for all others.
PYTHON ?= python3
BIN := .venv/bin

# uv installs, one on the PATH or else one that pip brings. It does not read pip's settings: a folder of wheels that is
# configured there, such as one with torch's build for the CPU, is passed on.
UV = $(shell command -v uv || echo $(BIN)/uv)
LINKS := $(shell $(PYTHON) -m pip config list 2> /dev/null | sed -n "s/.*find-links='\(.*\)'/\1/p" | head -1)
export UV_FIND_LINKS ?= $(LINKS)
export UV_SYSTEM_CERTS ?= 1
# Python writes what it has compiled, also where the environment says not to: else each of the many processes of a job, and
# each of the tests', compiles moray again, and pytest rewrites all of its modules.
unexport PYTHONDONTWRITEBYTECODE
INSTALL = $(UV) pip install --quiet --python $(BIN)/python --constraint requirements.lock --editable

# The oldest that pyproject.toml takes, and that of the CUDA image.
AOT_TRITON := 3.6.0 3.7.1

.PHONY: demo test test-slow chaos aot check autoscale bench dashboards lock clean

.venv/.product: pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -x $(UV) || $(BIN)/python -m pip install --quiet uv
	$(INSTALL) . --compile-bytecode  # else each of Ray's processes compiles what it imports first
	touch $@

.venv/.installed: .venv/.product
	$(INSTALL) '.[dev]'
	touch $@

demo: .venv/.product  ## the main job: the small model over examples/prompts, on local Ray
	$(BIN)/moray demo

test: .venv/.installed  ## everything but the slow suites
	$(BIN)/python -m pytest -m 'not slow and not gpu and not alone' --numprocesses=2 --dist=loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -m 'not slow and not gpu and alone' tests/e2e tests/chaos

test-slow: .venv/.installed  ## suites of minutes
	$(BIN)/python -m pytest -m slow

chaos: .venv/.installed  ## workers, nodes, drivers and Ray's daemons killed, thirty faults in one job; part of test-slow
	$(BIN)/python -m pytest -m chaos

aot: .venv/.installed  ## compile every kernel for every GPU with other Tritons too: that of torch 2.11, that of the image
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
lock: .venv/.installed  ## the versions that are installed here and in the images; LOCK_ARGS=--upgrade for newer ones
	$(UV) pip compile --quiet --universal --python-version 3.11 --no-annotate --extra dev $(LOCK_ARGS) \
		--custom-compile-command 'make lock' pyproject.toml --output-file requirements.lock
	echo 'torch==2.13.0+cpu' | $(LOCK) $(LOCK_ARGS) --constraint - --find-links $(TORCH_CPU) --no-emit-package triton --output-file k8s/image/cpu.lock
	echo 'torch==2.13.0' | $(LOCK) $(LOCK_ARGS) --constraint - --output-file k8s/image/cuda.lock

clean:
	rm -rf .venv .aot out build *.egg-info

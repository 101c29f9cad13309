# The entry points a person types. `make help` lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash

TORCH ?= torch==2.13.0
PYTHON ?= python3
export MAX_JOBS ?= $(shell nproc)

dev:  # builds the native libraries into the checkout, for the interpreter that PATH finds
	python setup.py -q build_ext --inplace

help:  ## lists the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# make train       install, prepare tiny Shakespeare, train, generate a sample, plot
# make test        install, run the tests
# make test-slow   the tests that take minutes
# make lint        ruff and mypy
# make gpu-check   test and measure a CUDA GPU, ten minutes
#
#   make train CONFIG=configs/shakespeare.yaml   another config on tiny Shakespeare
#   make train PYTHON=python3.12                 instead of python3 for creating .venv

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

GPU := $(shell command -v nvidia-smi 2>/dev/null)
CONFIG ?= $(if $(GPU),configs/shakespeare_gpu.yaml,configs/laptop.yaml)
LOG = $(or $(shell sed -n 's/^log_dir: *//p' $(CONFIG)),log)

help:
	@sed -n '1,/^$$/s/^# *//p' Makefile

.PHONY: help train test test-slow gpu-check lint

train: $(VENV)/ready
	$(RUN) prepare_shakespeare.py
	$(RUN) -m scripts.train --config $(CONFIG)
	$(RUN) -m scripts.generate --log_dir $(LOG) --prompt "ROMEO:"
	$(RUN) -m scripts.plot $(LOG)

test: $(VENV)/ready-dev
	$(RUN) -m pytest

test-slow: $(VENV)/ready-dev
	$(RUN) -m pytest -m slow

gpu-check: $(VENV)/ready-dev
	$(RUN) -m pytest -n0 -m cuda
	$(RUN) -m benchmarks.gpu_check

lint: $(VENV)/ready-dev
	$(RUN) -m ruff check .
	$(RUN) -m mypy

$(VENV)/ready: requirements.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
		|| { echo "error: $(PYTHON) is older than Python 3.11: pass a newer one, such as PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -e .
	@touch $@

$(VENV)/ready-dev: requirements-dev.txt $(VENV)/ready
	$(RUN) -m pip install -r requirements-dev.txt
	@touch $@

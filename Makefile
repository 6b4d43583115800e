# make train · make test · make lint: each creates .venv if it is missing or older than the requirements.
#   make train CONFIG=configs/shakespeare.yaml   instead of configs/laptop.yaml
#   make train PYTHON=python3.12                 instead of python3 for creating .venv

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

CONFIG ?= configs/laptop.yaml
LOG = $(or $(shell sed -n 's/^log_dir: *//p' $(CONFIG)),log)

.PHONY: train test test-slow gpu-check lint

train: $(VENV)/ready
	$(RUN) prepare_shakespeare.py
	$(RUN) -m scripts.train --config $(CONFIG)
	$(RUN) -m scripts.generate --log_dir $(LOG) --prompt "ROMEO:"
	$(RUN) -m scripts.plot $(LOG)

test: $(VENV)/ready-dev
	$(RUN) -m pytest

test-slow: $(VENV)/ready-dev
	$(RUN) -m pytest -m slow

# Ten minutes on a GPU. Without .venv: python3 -m benchmarks.gpu_check
gpu-check: $(VENV)/ready-dev
	$(RUN) -m benchmarks.gpu_check

lint: $(VENV)/ready-dev
	$(RUN) -m ruff check .
	$(RUN) -m mypy

$(VENV)/ready: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
		|| { echo "error: $(PYTHON) is older than Python 3.11: pass a newer one, such as PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -r requirements.txt
	@touch $@

$(VENV)/ready-dev: requirements-dev.txt $(VENV)/ready
	$(RUN) -m pip install -r requirements-dev.txt
	@touch $@

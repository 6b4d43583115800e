# make train · make test · make lint: each sets up .venv when it is missing or older than the requirements.
#   make train CONFIG=configs/laptop.yaml    another configuration than the one chosen for this machine
#   make train PYTHON=python3.12             another interpreter for the environment

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

# What `make train` runs: the guide's defaults where there is a CUDA GPU, a small model elsewhere.
CONFIG ?= $(shell $(RUN) -c "import torch; print('' if torch.cuda.is_available() else 'configs/laptop.yaml')" 2>/dev/null)
# Its folder: the log_dir of that file, if it has one. (The first line of `train` asks for CONFIG once: it loads PyTorch.)
LOG = $(or $(shell sed -n 's/^log_dir: *//p' $(CONFIG) /dev/null),log)

.PHONY: train test test-slow gpu-check lint

train: $(VENV)/ready
	$(eval CONFIG := $(CONFIG))
	$(RUN) prepare_shakespeare.py
	$(RUN) -m scripts.train $(addprefix --config ,$(CONFIG))
	$(RUN) -m scripts.generate --log_dir $(LOG) --prompt "ROMEO:"
	$(RUN) -m scripts.plot $(LOG)

test: $(VENV)/ready-dev
	$(RUN) -m pytest

test-slow: $(VENV)/ready-dev
	$(RUN) -m pytest -m slow

# Ten minutes on a GPU. Elsewhere than in .venv: python3 -m benchmarks.gpu_check
gpu-check: $(VENV)/ready-dev
	$(RUN) -m benchmarks.gpu_check

lint: $(VENV)/ready-dev
	$(RUN) -m ruff check .
	$(RUN) -m mypy

$(VENV)/ready: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
		|| { echo "error: $(PYTHON) is older than Python 3.11: pass PYTHON=python3.12, say" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -r requirements.txt
	@touch $@

$(VENV)/ready-dev: requirements-dev.txt $(VENV)/ready
	$(RUN) -m pip install -r requirements-dev.txt
	@touch $@

# Everything runs in .venv, which any target sets up first, with nothing but Python 3.11 or later and pip.
# `make help` lists the targets.

PYTHON ?= python3
# cpu: the torch pinned in constraints.txt. system: the torch that $(PYTHON) has already, for example with CUDA.
TORCH ?= cpu
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready-$(TORCH)
RUNS ?= runs

# What an installed torch brings along in versions of its own; not pinned with TORCH=system.
TORCH_BRINGS := torch|torchvision|triton|sympy|mpmath|networkx|filelock|fsspec|jinja2|markupsafe|setuptools|typing_extensions|numpy

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint format bench peers clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo "  PYTHON=...  interpreter to use (now: $(PYTHON)); TORCH=system keeps the torch that it has, for example with CUDA"

setup: $(STAMP) ## set up .venv and nothing else

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"steepest needs Python 3.11 or later, {sys.executable} is {v}: name another one, as in make PYTHON=python3.12")'
ifeq ($(TORCH),system)
	@$(PYTHON) -c 'import torch; print("using torch", torch.__version__, "of", torch.__file__)' || \
	  { echo "TORCH=system: $(PYTHON) cannot import torch; install torch for it, or name a Python that has it with PYTHON=..." >&2; exit 1; }
else ifneq ($(TORCH),cpu)
	@echo "TORCH=$(TORCH): use cpu or system" >&2; exit 1
endif
	@if ls $(VENV)/.ready-* >/dev/null 2>&1 && [ ! -e $(STAMP) ]; then \
	  echo "== $(VENV) was made for another TORCH: making it again"; rm -rf $(VENV); fi
	@if [ ! -x $(BIN)/python ]; then echo "== making $(VENV)"; \
	  $(PYTHON) -m venv $(if $(filter system,$(TORCH)),--system-site-packages) $(VENV); fi
	@echo "== installing steepest and its tools (a few minutes the first time)"
	@if [ $(TORCH) = system ]; then grep -v -i -E '^($(TORCH_BRINGS))==' constraints.txt; else cat constraints.txt; fi \
	  > $(VENV)/constraints.txt
	@PIP_CONSTRAINT=$(VENV)/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install \
	  $(if $(filter cpu,$(TORCH)),torch==$$(sed -n 's/^torch==//p' constraints.txt)) -e '.[cli,dev]'
	@touch $@

demo: $(STAMP) ## train digits, diabetes and toy_1d with Sven, SGD, Adam and L-BFGS; tables and HTML report (about 2 minutes)
	$(BIN)/steepest compare digits diabetes toy_1d --optimizers sven,sgd,adam,lbfgs --seeds 3 --out $(RUNS)/demo

test: $(STAMP) ## format check, lint, types, import contracts, tests and doctests
	@echo "== 1/5 format";           $(BIN)/ruff format --check .
	@echo "== 2/5 lint";             $(BIN)/ruff check .
	@echo "== 3/5 types";            $(BIN)/mypy
	@echo "== 4/5 import contracts"; $(BIN)/lint-imports
	@echo "== 5/5 tests, doctests";  $(BIN)/python -m pytest -m "not slow and not gpu"
	@echo "== all passed"

test-slow: $(STAMP) ## the tests that take minutes
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: $(STAMP) ## format check, lint, types and import contracts only
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## format the code and apply safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## steps of Sven, KFAC, FOP and LPSGDM, the Gram, attention, the paper's problems: records, tables (30 minutes)
	$(BIN)/python benchmarks/sven_step.py
	$(BIN)/python benchmarks/gram_forms.py
	$(BIN)/python benchmarks/sven_problems.py
	$(BIN)/python benchmarks/loop_overhead.py
	$(BIN)/python benchmarks/kfac_step.py
	$(BIN)/python benchmarks/lpsgd_step.py
	$(BIN)/python benchmarks/attention_length.py
	@if $(BIN)/python -c 'import curvlinops' 2>/dev/null; then $(BIN)/python benchmarks/kfac_factors.py; \
	  else echo "kfac_factors.py skipped: make peers installs curvlinops"; fi
	@if $(BIN)/python -c 'import torchjd' 2>/dev/null; then $(BIN)/python benchmarks/torchjd_gram.py; \
	  else echo "torchjd_gram.py skipped: make peers installs torchjd"; fi

peers: $(STAMP) ## install the libraries that some tests, benchmarks and optimizers of steepest compare come from
	PIP_CONSTRAINT=$(VENV)/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -e '.[cli,dev,peers,rivals]'

clean: ## remove caches and build output; keeps .venv and runs
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV)

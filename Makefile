# make help lists the targets. Everything lives in .venv; nothing outside this folder is touched.

PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/mnist

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo lenet test check lint types format picture clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  variables: PYTHON=$(PYTHON) (3.10 or newer), VENV=$(VENV), OUT=$(OUT)"

# One stamp for one environment: a second call installs nothing, and parallel targets wait for one install.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Expected Python 3.10 or newer, got $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Installing the tested versions into $(VENV), once; torch is large, this can take minutes."
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "Expected Python's venv module; on Debian and Ubuntu it is the package python3-venv." >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]'
	@touch $@

install: $(INSTALLED) ## create .venv with the tested versions (the targets below do it by themselves)

demo: $(INSTALLED) ## train, prune and fine-tune 784-128-10 on real digits, print the table
	$(BIN)/python examples/mnist.py --out $(OUT)

lenet: $(INSTALLED) ## the same with LeNet-5
	$(BIN)/python examples/mnist.py --model lenet --out $(OUT)-lenet

test: $(INSTALLED) ## run the tests and the examples in the docstrings
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy --strict

check: lint types test ## all that has to pass before a commit: ruff, mypy --strict, tests

format: $(INSTALLED) ## let ruff lay out the code and fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

picture: $(INSTALLED) ## redraw the picture of the README from real runs (kept in runs/picture)
	$(BIN)/python docs/make_picture.py

clean: ## remove .venv and caches (runs stay)
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find lightning_prune tests examples benchmarks docs -type d -name __pycache__ -prune -exec rm -rf {} +

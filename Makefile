# make demo | test | slow | lint | format | clean. Needs only make and Python 3.11 or newer (PYTHON=python3.12 make test).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# An environment belongs to the folder it was made in, so the stamps carry that folder: a copied tree sets itself up anew.
HERE := $(shell pwd | cksum | cut -d " " -f 1)
DEMO_READY := $(VENV)/.ready-demo-$(HERE)
DEV_READY := $(VENV)/.ready-dev-$(HERE)
RECIPE := setup.cfg pyproject.toml constraints.txt

# Tests and notebooks run with the bundled model and never ask the Hub for anything. They run in a process a core, each
# with one thread: small models gain nothing from more, and threads that wait for each other's cores lose a lot.
TESTING := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -n logical --maxprocesses 4 --dist loadfile

.PHONY: help demo test slow lint format clean

help:
	@echo "make demo    install into $(VENV) and run the demonstration on the bundled model and databases"
	@echo "make test    lint, fast tests, docstring sessions, notebooks"
	@echo "make slow    slow tests: real LLaMA-Factory runs, whole training runs, a GPU where there is one"
	@echo "make lint    ruff check and format check"
	@echo "make format  apply ruff's fixes and format"
	@echo "make clean   remove $(VENV), caches and build output"

demo: $(DEMO_READY)
	$(BIN)/t2s-pref demo

test: lint
	$(TESTING) --nbmake --nbmake-timeout=600 tests t2s_pref $(wildcard notebooks)

slow: $(DEV_READY)
	$(TESTING) -m "slow or gpu" --durations=10 tests

lint: $(DEV_READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(DEV_READY)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis demo_output
	find t2s_pref tests scripts notebooks -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last, so an interrupted installation is done again. Torch goes first and alone: whatever build the
# index offers under the constraint is then kept by everything installed after it.
$(DEMO_READY): $(RECIPE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "t2s_pref needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=...")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	@touch $@

$(DEV_READY): $(DEMO_READY)
	$(PIP) --editable ".[dev]"
	@touch $@

# Everything starts from here. Needs only Python 3.11+ with venv, make, and root for the real kernel.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CONFIG ?= config/tunledger.json
# Files of tests side by side, in their order; more at once than four would only wait for the disk and each other.
SPREAD ?= -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install run test test-full lint format bench lock clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "tunledger needs Python 3.11 or newer, this is $$($(PYTHON) --version); try make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "could not make $(VENV); on Debian and Ubuntu: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }

$(VENV)/.runtime: $(BIN)/python requirements.lock pyproject.toml
	@echo "installing the locked dependencies into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements-dev.lock
	@echo "installing the locked development tools into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@

install: $(VENV)/.runtime ## set up .venv; the command is then .venv/bin/tunledger

run: install ## migrate the database and serve on 127.0.0.1:8080
	@$(BIN)/tunledger migrate --config $(CONFIG)
	@exec $(BIN)/tunledger serve --config $(CONFIG)

test: $(VENV)/.dev ## all tests but the long sweeps; real-kernel ones in namespaces of their own
	@exec tests/run $(SPREAD) -m "not full"

test-full: $(VENV)/.dev ## all tests, the long sweeps too
	@exec tests/run $(SPREAD)

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## let ruff format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev ## the figures, next to what they are compared with
	@exec $(BIN)/python -m bench

lock: $(VENV)/.dev ## write the lock files anew: newest versions, hashes, no addresses
	$(BIN)/uv pip compile --quiet --upgrade --python-version 3.11 --universal --generate-hashes --no-header \
	  --extra lock -o requirements.lock pyproject.toml
	$(BIN)/uv pip compile --quiet --upgrade --python-version 3.11 --universal --generate-hashes --no-header \
	  --extra dev -c requirements.lock -o requirements-dev.lock pyproject.toml

clean: ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info

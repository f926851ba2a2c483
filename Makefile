# Every target creates or refreshes .venv by itself; Python 3.11+ and a package index are all it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROTOS := $(shell find protos/doorward -name '*.proto')
# Most tests wait for other processes: twice as many as cores. Modules in the order of tests/conftest.py.
IN_PARALLEL := --numprocesses 4 --dist loadscope --no-loadscope-reorder
OF_THE_DOMAIN := tests/unit tests/rpc $(addprefix tests/faults/test_,refresh.py deliveries.py identity.py rotation.py)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install up test postgresql check format generate baseline lock bench soak clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 12

install: $(STAMP)  ## create or refresh .venv

$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Doorward needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

up: $(STAMP)  ## run the server, the gateway, the bot and the stand-ins; Ctrl-C ends them all
	@$(BIN)/python -m tests.sandbox.settings > $(VENV)/up.toml
	@$(BIN)/doorward init --settings $(VENV)/up.toml
	@DOORWARD_GRPC_REFLECTION=true exec $(BIN)/honcho start --no-prefix

test: $(STAMP)  ## run every test, and those of the domain on PostgreSQL too
	$(BIN)/python -m pytest $(IN_PARALLEL)
	$(BIN)/python -m pytest $(IN_PARALLEL) --engine postgresql $(OF_THE_DOMAIN)

postgresql: $(STAMP)  ## run every test that touches a database on PostgreSQL
	$(BIN)/python -m pytest $(IN_PARALLEL) --engine postgresql

soak: $(STAMP)  ## run the fault tests at their full counts
	$(BIN)/python -m pytest --soak -rP tests/faults tests/bot

bench: $(STAMP)  ## measure, and print a table
	$(BIN)/python -m tests.bench

check: $(STAMP)  ## lint, types, layers, protos, generated code, Envoy's own validation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.protos check
	$(BIN)/doorward-gateway --validate
	$(BIN)/python -m tests.certificates $(BIN)/doorward-gateway --validate

format: $(STAMP)  ## format the code and the protos
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .
	$(BIN)/buf format --write

generate: $(STAMP)  ## make the stubs and the descriptors anew
	$(BIN)/python -m tests.protos generate

baseline: $(STAMP)  ## make the protos as they are what later ones must not break
	$(BIN)/python -m tests.protos baseline

lock:  ## resolve the dependencies anew (needs pip-tools in the active environment)
	pip-compile --quiet --strip-extras --all-extras --generate-hashes --allow-unsafe \
	  --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-emit-options \
	  --output-file requirements.lock pyproject.toml
	pip-compile --quiet --strip-extras --extra server --extra gateway --extra bot --build-deps-for wheel \
	  --constraint requirements.lock --generate-hashes --allow-unsafe \
	  --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-emit-options \
	  --output-file deploy/compose/requirements.lock pyproject.toml

clean:  ## remove what the other targets made, but not var/
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

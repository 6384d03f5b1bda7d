# `make demo` and `make test` work on a machine with Python 3.11 to 3.13, git and make: no root, no Docker, no compiler.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Byte code is made when a module is first imported: most of what is installed never is, and compiling takes a minute.
PIP = $(BIN)/python -m pip --disable-pip-version-check
INSTALL = $(PIP) install --quiet --no-compile --constraint constraints.txt
# Airflow starts a process for each task: without byte code on disk every one would compile what it imports again.
unexport PYTHONDONTWRITEBYTECODE
# Options of the demonstration:  make demo DEMO="--keep --events 500"
DEMO ?=
# Options of pytest:             make test TESTS="-k buffer -x"
TESTS ?=

.PHONY: help demo test check docs format clean

help:
	@echo "make demo    install into $(VENV), then run the whole loop on this machine (about four minutes)"
	@echo "make test    install what the tests need into $(VENV), then run them"
	@echo "make check   ruff, mypy, import-linter"
	@echo "make docs    build the documentation into site/"
	@echo "make format  let ruff format the code"
	@echo "make clean   delete $(VENV) and everything built"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "$(PYTHON) is no Python 3.11, 3.12 or 3.13, for which psana has packages:" \
	    "make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || \
	  { echo "$(PYTHON) cannot make virtual environments: on Debian and Ubuntu install python3-venv" >&2; exit 2; }

# psana's own requirements are installed by the extra psana-offline. psana follows without its dependencies, because one
# of them compiles against Kerberos headers; lclstreamer says what is missing if that part is ever needed.
$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[all]'
	$(INSTALL) --no-deps psana
	@touch $@

# DECTRIS' own decompression, which tests compare ours with, comes as source only.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) --editable '.[dev]'
	PIP_ONLY_BINARY=:none: $(INSTALL) dectris-compression >/dev/null 2>&1 || \
	  echo "no compiler: tests that need dectris-compression are skipped"
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/lclstream demo $(DEMO)

# Files are spread over two processes; tests of one file stay together and share what it has started.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(TESTS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --strict

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) site build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

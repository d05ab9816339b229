# make demo | test | lint | wheel-test | clean
#
# PYTHON     the interpreter that .venv is made from, 3.11 or newer (default: python3.11 if there is one, else python3)
# PIP_ARGS   more options for pip: on a machine without a GPU, the index of torch's CPU builds is a far smaller download
#            (make test PIP_ARGS="--extra-index-url ADDRESS"; the address is on torch's installation page)
# ARGS       more options for the command of the target (make demo ARGS=--quick, make test ARGS="-k kernel")

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint wheel-test clean

demo: $(VENV)/installed-test
	$(BIN)/hf-lipschitz demo $(ARGS)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/architecture/test_imports.py

wheel-test: $(VENV)/installed-test
	bash .ci/wheel-test $(BIN)/python

clean:
	rm -rf $(VENV) build dist .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v "$(PYTHON)" > /dev/null || \
	  { echo "No Python was found at '$(PYTHON)': name one, 3.11 or newer, with make PYTHON=/path/to/python3."; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$$("$(PYTHON)" --version) is too old: Python 3.11 or newer is needed; name one with make PYTHON=/path/to/python3."; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

# The stamp is newer than pyproject.toml once that extra is installed, so that later runs install nothing.
$(VENV)/installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) -e ".[$*]"
	@touch $@

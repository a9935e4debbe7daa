# Two commands for a bare machine with Python 3.11 or newer: `make demo` and `make test`. Each makes its own .venv.
PYTHON ?= python3
BIN := .venv/bin
# On all cores; the tests of a file stay together.
PYTEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile

.PHONY: demo test test-parity lint clean

demo: .venv/ready
	@$(BIN)/llamajax generate --model=box --prompt='Once upon a time'
	@echo

test: .venv/test
	$(PYTEST)

# The same suite with Hugging Face transformers to compare with, and IREE and ONNX Runtime to run bundles.
test-parity: .venv/parity
	$(PYTEST)

lint: .venv/lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/ready: pyproject.toml | .venv/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/test .venv/lint: .venv/%: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test,$*]'
	@touch $@

.venv/parity: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test,parity,iree,onnx]'
	@touch $@

# Two commands for a bare machine with Python 3.11 or newer: `make demo` and `make test`. Each makes its own .venv.
# PYTHON= names another Python, VENV= another folder for its environment.
PYTHON ?= python3
SHELL := bash
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
# On all cores; the tests of a file stay together. In the order of names the last files are quick: no core waits long.
PYTEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder --durations=10

# What the extra `docs` lists, without the package itself.
EXTRA_DOCS := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])

.PHONY: demo chat smollm2 test test-all test-extras notebooks lint docs clean

demo: $(VENV)/ready
	@$(BIN)/llamajax generate --model=box --prompt='Once upon a time'
	@echo

# Answers each line of input: with SmolLM2-135M-Instruct, 98 MB, which is fetched once, or the GGUF that is named so.
chat: $(VENV)/ready
	@$(BIN)/llamajax chat --model="$${LLAMAJAX_SMOLLM2:-smollm2}"

# The same model for tests, fetched unless it is there.
smollm2: $(VENV)/ready
	@test -n "$$LLAMAJAX_SMOLLM2" || $(BIN)/python -m llamajax.cli.smollm2

# In minutes: of matrices a fifteenth, another every day. Compiled as quickly as XLA can: see tests/conftest.py.
test: $(VENV)/test
	$(PYTEST)

# Everything, as users' programs are compiled: all cases, long fuzzing, kills, memory of large models.
test-all: $(VENV)/test
	@date; SECONDS=0; $(PYTEST) --all; code=$$?; echo "make test-all: $$(date), $$SECONDS s"; exit $$code

# What needs Hugging Face transformers or llama.cpp to compare with, or IREE and ONNX Runtime to run bundles; that alone.
# A few tests are of a model in use, which is fetched first. Those marked `optimized` are compiled as users' programs are.
test-extras: $(VENV)/extras smollm2
	$(PYTEST) -m 'extras and not optimized'
	XLA_FLAGS= $(PYTEST) -m 'extras and optimized' $$(grep -l 'mark\.optimized' tests/test_*.py)

# Executes the notebooks, in about a minute; SAVE=--inplace stores their text and pictures anew.
notebooks: $(VENV)/notebooks
	$(BIN)/jupyter-execute $(SAVE) notebooks/*.ipynb

lint: $(VENV)/lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The pages of docs/ into site/; a warning, such as a link to nothing, is an error. In an environment of its own: nothing is
# imported but mkdocs.
docs: $(VENV)-docs/ready
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict --quiet

$(VENV)-docs/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install --quiet --disable-pip-version-check $$($(PYTHON) -c '$(EXTRA_DOCS)')
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-docs build dist site

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/ready: pyproject.toml | $(BIN)/python
	$(PIP) --editable .
	@touch $@

$(VENV)/test $(VENV)/lint $(VENV)/notebooks: $(VENV)/%: $(VENV)/ready
	$(PIP) --editable '.[test,$*]'
	@touch $@

$(VENV)/extras: $(VENV)/ready
	$(PIP) --editable '.[test,parity,iree,onnx]'
	$(PIP) --no-deps trl==1.16.0  # for its copies of published chat templates: files, which need nothing else of it
	@touch $@

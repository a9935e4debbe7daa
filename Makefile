# A bare machine with Python 3.11 or newer can run `make demo` and `make test`. Both make the .venv that they need.
# PYTHON= names another Python, VENV= another folder for its environment.
PYTHON ?= python3
SHELL := bash
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
# Uses all cores; the tests of a file stay together. Files run in the order of their names, of which the last are quick,
# so no core waits long.
PYTEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder --durations=10

# Prints the packages of the extra `docs`, without llamajax itself.
EXTRA_DOCS := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])

.PHONY: demo chat smollm2 test test-all test-extras notebooks lint docs clean

demo: $(VENV)/ready
	@$(BIN)/llamajax generate --model=box --prompt='Once upon a time'
	@echo

# Chats with SmolLM2-135M-Instruct, 98 MB, which is fetched once, or with the GGUF file that LLAMAJAX_SMOLLM2 names.
chat: $(VENV)/ready
	@$(BIN)/llamajax chat --model="$${LLAMAJAX_SMOLLM2:-smollm2}"

# Fetches the same model for tests, unless it exists or LLAMAJAX_SMOLLM2 names a file.
smollm2: $(VENV)/ready
	@test -n "$$LLAMAJAX_SMOLLM2" || $(BIN)/python -m llamajax.cli.smollm2

# Takes minutes: runs a fifteenth of the tests marked `matrix`, a different one each day. XLA compiles as quickly as it
# can: see tests/conftest.py.
test: $(VENV)/test
	$(PYTEST)

# Runs everything, compiled like users' programs: all cases, long fuzzing, kills, memory of large models.
test-all: $(VENV)/test
	@date; SECONDS=0; $(PYTEST) --all; code=$$?; echo "make test-all: $$(date), $$SECONDS s"; exit $$code

# Runs only tests that need Hugging Face transformers or llama.cpp for comparison, or IREE and ONNX Runtime for bundles.
# A few tests use SmolLM2, which is fetched first. Tests marked `optimized` are compiled like users' programs.
test-extras: $(VENV)/extras smollm2
	$(PYTEST) -m 'extras and not optimized'
	XLA_FLAGS= $(PYTEST) -m 'extras and optimized' $$(grep -l 'mark\.optimized' tests/test_*.py)

# Executes the notebooks, in about a minute; SAVE=--inplace stores their outputs in the files.
notebooks: $(VENV)/notebooks
	$(BIN)/jupyter-execute $(SAVE) notebooks/*.ipynb

lint: $(VENV)/lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Builds the pages of docs/ into site/; a warning, such as a broken link, is an error. Uses a separate environment: only
# mkdocs is needed.
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

# make demo    installs, prepares Python's own sources, trains a small GPT, plots and writes text
# make test    installs what the tests need and runs them, but for the slow ones of make faults
# make test-fast  the tests without processes, training and compilation: a minute
# make faults  breaks everything on purpose and writes docs/reliability.md (half an hour)
# make gpu-check  runs everything that needs a GPU at its true size and writes docs/gpu.md
# make soak    asks `gpt2 serve` with 64 clients for a minute, some of which hang up or read slowly
# make lint    style, format and types
# make docs    builds the site of the documentation into site/; a broken link fails
# make lock    pins all packages by sha256 in requirements/ (needs uv)
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test test-fast faults gpu-check soak lint docs lock clean

demo: $(VENV)/installed
	$(BIN)/gpt2 demo

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not (slow and fault)" $(PYTEST_FLAGS)

test-fast: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not long" $(PYTEST_FLAGS)

faults: $(VENV)/installed-dev
	$(BIN)/python -m tests.faults

gpu-check: $(VENV)/installed-dev
	$(BIN)/python -m tests.gpu_check

soak: $(VENV)/installed-dev
	$(BIN)/python -m tests.serve.soak

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed-docs
	$(BIN)/python -m mkdocs build --strict --quiet

LOCK := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate
LOCK += --custom-compile-command "make lock" --upgrade pyproject.toml requirements/build.in

lock:
	$(LOCK) -o requirements/run.txt
	$(LOCK) --extra dev --extra docs -o requirements/dev.txt

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache .mypy_cache

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $(VENV)/installed $@

$(VENV)/installed-docs: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@

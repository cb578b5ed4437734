# make demo    installs, prepares Python's own sources, trains a small GPT, plots and writes text
# make test    installs what the tests need and runs them, but for the slow ones of make faults
# make test-fast  the tests without processes, training, compilation and many inputs: about a minute
# make faults  breaks everything on purpose and writes docs/reliability.md (half an hour)
# make gpu-check  runs everything that needs a GPU at its true size and writes docs/gpu.md
# make soak    asks `gpt2 serve` with 64 clients for a minute, some of which hang up or read slowly
# make lint    style, format and types
# make docs    builds the site of the documentation into site/; a broken link fails
# make lowest  installs every lower bound of pyproject.toml and runs the tests of these packages (needs uv)
# make newest  installs the newest version of everything and runs all tests
# make lock    pins all packages by sha256 in requirements/ (needs uv)
# make TORCH=2.14.1 …  any of these with another version of torch; TORCH= with the one that uv chooses.
#              A machine without an NVIDIA GPU gets the CPU build, where the package index offers one.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
CPU    := 2.13.0+cpu
TORCH  ?= $(if $(shell command -v nvidia-smi 2>/dev/null),,$(CPU))

.PHONY: demo test test-fast faults gpu-check soak lint docs lowest newest lock clean

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
	$(BIN)/python -m mkdocs build --strict

# What a lower bound promises is tested with these; torch's own in tests/kernels and tests/train.
LOWEST_TESTS := tests/checkpoint tests/commands tests/data tests/generate tests/huggingface \
  tests/kernels tests/learn tests/model tests/prepare tests/report tests/serve tests/train \
  tests/test_repository.py tests/test_tokenizer.py tests/test_wheel.py

lowest:
	uv venv --quiet --clear --seed --python $(PYTHON) $(VENV)-lowest
	uv pip compile --quiet --resolution=lowest-direct --python $(VENV)-lowest --all-extras \
	  pyproject.toml -o $(VENV)-lowest/pins.txt
	uv pip install --quiet --python $(VENV)-lowest -r $(VENV)-lowest/pins.txt
	uv pip install --quiet --python $(VENV)-lowest --no-deps -e .
	$(VENV)-lowest/bin/python -m tests.lower_bounds $(VENV)-lowest/pins.txt
	$(VENV)-lowest/bin/python -m pytest -n auto --dist worksteal -m "not (slow and fault)" \
	  $(PYTEST_FLAGS) $(LOWEST_TESTS)

newest:
	$(PYTHON) -m venv --clear $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e '.[dev,clients]'
	$(VENV)-newest/bin/python -m pytest -n auto --dist worksteal -m "not (slow and fault)" \
	  $(PYTEST_FLAGS)

LOCK := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate
LOCK += --custom-compile-command "make lock" --upgrade pyproject.toml requirements/build.in

lock:
	$(LOCK) -o requirements/run.txt
	$(LOCK) --extra dev --extra docs -o requirements/dev.txt

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest site .pytest_cache .ruff_cache .mypy_cache

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv || echo "no uv on the index; pip installs, in minutes"

# Without TORCH= on the command line or in the environment, an index that lacks the CPU build is no
# failure: uv then chooses, as on a Mac.
GO_ON := $(if $(filter file,$(origin TORCH)),2>/dev/null || echo "no torch $(TORCH) on the index; uv chooses")
WITH  := $(VENV)/with-torch-$(subst *,x,$(or $(TORCH),any))

$(WITH): | $(VENV)/bin/python
	$(if $(TORCH),$(BIN)/python -m pip install --quiet --no-compile 'torch==$(TORCH)' $(GO_ON))
	rm -f $(VENV)/with-torch-*
	touch $@

# uv takes 20 s for what takes pip two minutes. An index may be known to pip alone: then pip does it.
# Neither compiles to bytecode, of which most would never be imported; Python does, once, on import.
install = $(BIN)/python -m uv pip install --quiet --python $(BIN)/python -e '$(1)' \
  || $(BIN)/python -m pip install --quiet --no-compile -e '$(1)'

$(VENV)/installed: pyproject.toml $(WITH)
	$(call install,.)
	touch $@

$(VENV)/installed-dev: pyproject.toml $(WITH)
	$(call install,.[dev])
	touch $(VENV)/installed $@

$(VENV)/installed-docs: pyproject.toml $(WITH)
	$(call install,.[docs])
	touch $@

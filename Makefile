# `make demo` and `make test` need Python 3.11 or newer and a compiler, nothing else.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The oldest versions that pyproject.toml allows, tested beside the newest.
OLDEST := "tensorflow==2.20.*" "keras==3.12.0"
OLDEST_VENV ?= .venv-oldest
# Flower forces other versions of protobuf and cryptography than TensorFlow's own choice.
FLOWER_VENV ?= .venv-flower

# One process serves the tests of places, one those that wait, and one computes; see tests/conftest.py.
PYTEST := -m pytest -n 3 --dist loadgroup --no-loadscope-reorder --durations 15

.DEFAULT_GOAL := help
.PHONY: help demo test test-full test-newest test-oldest test-flower check lint format bench docs clean

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# One stamp a set of dependencies: nothing is installed twice.
$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "Installing tfdist, TensorFlow and Keras into $(VENV) (a few minutes the first time) ..."
	$(BIN)/python -m pip install --quiet -e . scikit-learn
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "Installing tfdist with what its tests need into $(VENV) ..."
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@

# Horovod has no wheels: it is built once for each TensorFlow and kept in ~/.cache/tfdist.
%/.horovod: %/.dev
	$*/bin/tfdist horovod build
	@touch $@

# Its pins fight with those of tfdist, so it is kept apart, without its dependencies, where only
# tests/privacy/test_beside_tensorflow_privacy.py looks. There is none for Python 3.12 on: those tests are skipped.
$(VENV)/.tensorflow-privacy: $(VENV)/.dev
	-$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/tensorflow-privacy \
		tensorflow-privacy==0.9.0 tensorflow-empirical-privacy==0.1.0 immutabledict patsy statsmodels
	@touch $@

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	@touch $@

$(OLDEST_VENV)/.dev: pyproject.toml
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST_VENV)/bin/python -m pip install --quiet -e ".[test]" $(OLDEST)
	@touch $@

$(FLOWER_VENV)/.dev: pyproject.toml
	$(PYTHON) -m venv $(FLOWER_VENV)
	$(FLOWER_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(FLOWER_VENV)/bin/python -m pip install --quiet -e ".[test,flower]"
	@touch $@

demo: $(VENV)/.demo  ## Train a real model over two local worker processes.
	$(BIN)/tfdist run -n 2 examples/quickstart.py

test:  ## Run the tests, with the newest and with the oldest versions: 20 minutes on 2 cores.
	@begin=$$(date +%s) && $(MAKE) --no-print-directory test-newest test-oldest \
		&& echo "make test: $$(($$(date +%s) - begin)) s"

test-full: $(VENV)/.dev $(VENV)/.horovod $(VENV)/.tensorflow-privacy  ## Run all tests, every case on every strategy.
	$(BIN)/python $(PYTEST) --full

test-newest: $(VENV)/.dev $(VENV)/.horovod $(VENV)/.tensorflow-privacy
	$(BIN)/python $(PYTEST)

test-oldest: $(OLDEST_VENV)/.dev $(OLDEST_VENV)/.horovod
	$(OLDEST_VENV)/bin/python $(PYTEST) -m oldest

test-flower: $(FLOWER_VENV)/.dev  ## Run the tests of tfdist.flower with Flower, in an environment of its own.
	$(FLOWER_VENV)/bin/python -m pytest --full tests/federated/test_flower.py tests/federated/test_flower_engine.py

check: lint  ## Lint, type-check and run the quick tests: for every commit.
	$(BIN)/python -m pytest -m quick -q -n 2 --dist loadfile

lint: $(VENV)/.dev  ## Lint and type-check.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.lint.private_parts
	$(BIN)/python -m tests.lint.length
	$(BIN)/python -m tests.lint.class_names
	$(BIN)/python -m tests.lint.capabilities
	$(BIN)/python -m tests.lint.architecture

format: $(VENV)/.dev  ## Format the code.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev  ## Measure speed, as ratios; takes a while and a quiet machine.
	$(BIN)/python -m benchmarks

docs: $(VENV)/.docs  ## Build the documentation into site/.
	$(BIN)/mkdocs build --strict

clean:  ## Remove what make created.
	rm -rf $(VENV) $(OLDEST_VENV) $(FLOWER_VENV) site build dist *.egg-info

# make demo: set up and run the main job; make test: set up and run all tests. Both create .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Development pins: the CPU build of torch; the package itself asks for torch>=2.10 only.
CONSTRAINTS := constraints.txt
NATIVE := setup.py native_build.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: setup demo test lint format bench test-asan test-ubsan test-tsan clean

setup: $(VENV)/.installed

$(VENV)/.created: $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) torch setuptools wheel ninja pybind11
	touch $@

$(VENV)/.installed: $(VENV)/.created $(NATIVE)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --no-build-isolation --editable '.[test]'
	touch $@

demo: setup
	$(BIN)/python examples/mnist.py $(ARGS)

test: setup
	$(BIN)/python -m pytest --cov=cram_kernels --cov-report=term $(ARGS)

lint: setup
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) '.[dev]' --no-build-isolation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build cram_kernels/*.so $(VENV)/.installed

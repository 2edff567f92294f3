# The main targets are `make demo` and `make test`. Each creates the virtual environment first if it does not exist.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo quick test test-latest test-oldest test-sanitizers test-triton test-onnx test-gpu bench-gpu lint docs docs-serve clean

demo: $(VENV)/ready          ## train six models on three tasks (six minutes on two cores); the report is in runs/
	$(BIN)/hqlt demo

quick: $(VENV)/ready         ## the same in one minute, with budgets too small to learn much from
	$(BIN)/hqlt demo --quick

test: $(VENV)/ready lint     ## lint, type checks and tests
	$(BIN)/pytest -n 2

# `make test` pins versions in constraints.txt. These targets test both ends of the ranges in pyproject.toml, each in its
# own environment. Run both when a range changes. (pip may download gigabytes: the GPU build of torch.)
LATEST := .venv-latest
OLDEST := .venv-oldest

test-latest: $(LATEST)/ready ## tests with the newest versions that the ranges allow
	$(LATEST)/bin/pytest -n 2

test-oldest: $(OLDEST)/ready ## tests with the oldest versions
	$(OLDEST)/bin/pytest -n 2

# The GPU kernels have a separate environment because triton and fla-core are large.
TRITON       := .venv-triton
TRITON_TESTS := tests/ops/test_synchronous.py tests/ops/test_synchronous_step.py tests/ops/test_fla.py \
                tests/ops/test_synchronous_traffic.py tests/ops/test_kernels_compile.py tests/model/test_compile.py

test-triton: $(TRITON)/ready ## the GPU kernels, interpreted on a CPU and compiled without a GPU
	TRITON_INTERPRET=1 $(TRITON)/bin/pytest -n 2 $(TRITON_TESTS)

test-gpu: $(TRITON)/ready    ## the same tests on a GPU, and all layers there
	TRITON_DEFAULT_FP_FUSION=1 $(TRITON)/bin/pytest $(TRITON_TESTS) tests/test_gpu.py

bench-gpu: $(TRITON)/ready   ## all GPU measurements: correctness, speed compared with other kernels, training
	PYTHON=$(TRITON)/bin/python bash benchmarks/gpu.sh

# ONNX export has a separate environment, too.
ONNX := .venv-onnx

test-onnx: $(ONNX)/ready     ## export layers and language models to ONNX, and run them in onnxruntime and its reference evaluator
	$(ONNX)/bin/pytest -n 2 tests/ops/test_onnx.py tests/model/test_onnx.py tests/ops/test_fast_weights_oracles.py

test-sanitizers: $(VENV)/ready ## invalid arguments to the native library under AddressSanitizer and UBSan
	PYTHON=$(BIN)/python sh tests/ops/sanitize.sh

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/ready          ## build the documentation site in build/site
	$(BIN)/python docs/pages.py build/pages
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -c docs build/pages build/site

docs-serve: $(VENV)/ready    ## serve the site at http://127.0.0.1:8000 and rebuild it when a page changes
	$(BIN)/sphinx-autobuild --pre-build "$(BIN)/python docs/pages.py build/pages" --watch docs --watch README.md \
		-c docs build/pages build/site

$(VENV)/ready: pyproject.toml constraints.txt $(wildcard setup.py)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(TRITON)/ready: pyproject.toml constraints.txt $(wildcard setup.py)
	$(PYTHON) -m venv $(TRITON)
	$(TRITON)/bin/pip install --quiet -c constraints.txt torch
	$(TRITON)/bin/pip install --quiet -c constraints.txt -e '.[dev,gpu]'
	touch $@

$(ONNX)/ready: pyproject.toml constraints.txt $(wildcard setup.py)
	$(PYTHON) -m venv $(ONNX)
	$(ONNX)/bin/pip install --quiet -c constraints.txt torch
	$(ONNX)/bin/pip install --quiet -c constraints.txt -e '.[dev,onnx]'
	touch $@

$(LATEST)/ready: pyproject.toml $(wildcard setup.py)
	$(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/pip install --quiet --upgrade --upgrade-strategy=eager -e '.[dev]'
	touch $@

$(OLDEST)/ready: pyproject.toml constraints-oldest.txt $(wildcard setup.py)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet -c constraints-oldest.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(TRITON) $(ONNX) $(LATEST) $(OLDEST) build dist src/*.egg-info

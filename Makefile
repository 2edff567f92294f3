# The two commands: `make demo` and `make test`. Each makes its virtual environment first, if there is none.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo quick test test-latest test-oldest test-sanitizers test-triton test-onnx test-gpu bench-gpu lint docs docs-serve clean

demo: $(VENV)/ready          ## train six models on three tasks, six minutes on two cores; a page in runs/
	$(BIN)/hqlt demo

quick: $(VENV)/ready         ## the same in one minute, with budgets too small to learn much
	$(BIN)/hqlt demo --quick

test: $(VENV)/ready lint     ## style, types and tests
	$(BIN)/pytest -n 2

# The constraints hide what other versions do: both ends of the ranges in pyproject.toml have environments of their own.
# Run both whenever a range is touched. (pip may take gigabytes: a build of torch for GPUs.)
LATEST := .venv-latest
OLDEST := .venv-oldest

test-latest: $(LATEST)/ready ## with the newest versions that the ranges admit
	$(LATEST)/bin/pytest -n 2

test-oldest: $(OLDEST)/ready ## with the oldest ones
	$(OLDEST)/bin/pytest -n 2

# The GPU kernels have an environment of their own, because triton and its peer are large.
TRITON       := .venv-triton
TRITON_TESTS := tests/ops/test_synchronous.py tests/ops/test_synchronous_step.py tests/ops/test_fla.py \
                tests/ops/test_synchronous_traffic.py tests/ops/test_kernels_compile.py tests/model/test_compile.py

test-triton: $(TRITON)/ready ## the GPU kernels' code, interpreted on a CPU and compiled for a GPU that is not there
	TRITON_INTERPRET=1 $(TRITON)/bin/pytest -n 2 $(TRITON_TESTS)

test-gpu: $(TRITON)/ready    ## the same on a GPU, and all layers there
	TRITON_DEFAULT_FP_FUSION=1 $(TRITON)/bin/pytest $(TRITON_TESTS) tests/test_gpu.py

bench-gpu: $(TRITON)/ready   ## right or wrong, ours beside the peers' kernels, training: all that is to be measured on a GPU
	PYTHON=$(TRITON)/bin/python bash benchmarks/gpu.sh

# Export to ONNX has an environment of its own too.
ONNX := .venv-onnx

test-onnx: $(ONNX)/ready     ## layers and language models exported to ONNX, run by onnxruntime; its reference of our operation
	$(ONNX)/bin/pytest -n 2 tests/ops/test_onnx.py tests/model/test_onnx.py tests/ops/test_fast_weights_oracles.py

test-sanitizers: $(VENV)/ready ## hostile arguments for the native library, under AddressSanitizer and UBSan
	PYTHON=$(BIN)/python sh tests/ops/sanitize.sh

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/ready          ## the documentation as a site, in build/site
	$(BIN)/python docs/pages.py build/pages
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -c docs build/pages build/site

docs-serve: $(VENV)/ready    ## the same at http://127.0.0.1:8000, built again whenever a page changes
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

# The two commands: `make demo` and `make test`. Each makes its virtual environment first, if there is none.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo quick test lint docs clean

demo: $(VENV)/ready          ## train five models on three tasks, six minutes on two cores; a page in runs/
	$(BIN)/hqlt demo

quick: $(VENV)/ready         ## the same in one minute, with budgets too small to learn much
	$(BIN)/hqlt demo --quick

test: $(VENV)/ready lint     ## style, types and tests
	$(BIN)/pytest -n 2

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/ready          ## the API's pages from its docstrings, in build/api
	$(BIN)/pdoc hqlt -o build/api

$(VENV)/ready: pyproject.toml constraints.txt $(wildcard setup.py)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info

# make demo | test | lint: each first makes .venv, again only when pyproject.toml or constraints.txt changed.
#
#   PYTHON       the interpreter to build .venv with
#   TORCH_INDEX  where torch comes from; on a CUDA machine, e.g. https://download.pytorch.org/whl/cu130
#   ARGS         more arguments for `lethe demo` or pytest, e.g. make test ARGS="-m gpu"

PYTHON ?= python3
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ARGS ?=

.PHONY: help demo test round-trip lint clean

help:
	@echo "make demo   watch the bundled reasoner generate with a full and with a pruned cache"
	@echo "make test   run the tests (ARGS: more arguments for pytest)"
	@echo "make lint   ruff and mypy"
	@echo "make round-trip  export the bundled reasoner to onnx and aoti, and run both in fresh processes"
	@echo "make clean  remove build outputs and caches, not $(VENV)"

demo: $(VENV)/.installed
	$(BIN)/lethe demo $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 $(ARGS)

round-trip: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 0 -m slow -k reasoner tests/exporters/test_round_trip.py $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch alone and first: its index serves nothing else, and what follows finds the pinned CPU build in place instead of
# resolving one that brings gigabytes of CUDA.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --no-deps -c constraints.txt --extra-index-url "$(TORCH_INDEX)" torch
	touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	$(PIP) install -c constraints.txt -e .
	touch $@

# Of what comes along here most is never imported: no bytecode for it, which takes pip a minute.
$(VENV)/.installed-dev: pyproject.toml $(VENV)/.torch
	$(PIP) install --no-compile -c constraints.txt -e ".[dev]"
	touch $(VENV)/.installed $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

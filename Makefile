# Everything runs in a virtual environment of its own. Another torch (a CPU build, say):
#   make test TORCH='torch==2.13.0 --index-url <index>'
TORCH ?= torch==2.13.0
VENV ?= .venv
PYTHON ?= python3

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')
CPP := $(NATIVE) $(wildcard benchmarks/*.cpp)
# The name holds the version of torch: the extension must be rebuilt for another one.
HAS_TORCH := $(VENV)/.has-$(firstword $(TORCH))
READY := $(VENV)/.ready

.PHONY: setup demo test bench gpu-check lint format clean

setup: $(READY)

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest

bench: $(READY) $(VENV)/.has-bench
	$(BIN)/python -m benchmarks

# For a machine with a GPU and no network: uses its own Python (torch, triton, pytest, hypothesis, nvcc), not .venv.
# PART: build, tests, bench, sanitize or e2e; all without it, in eight minutes.
gpu-check:
	PYTHONPATH=.:python $(PYTHON) -m benchmarks.gpu $(if $(PART),--part $(PART))

lint: $(READY) $(VENV)/.has-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(READY) $(VENV)/.has-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# Leaves the environment itself, which VENV may share with others.
clean:
	rm -rf build dist runs *.egg-info python/*.egg-info id3_kernels/*.so
	rm -rf .pytest_cache .hypothesis .benchmarks .ruff_cache
	rm -f $(READY) $(VENV)/.has-*
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(HAS_TORCH):
	@echo "setting up $(VENV) with $(TORCH)"
	@$(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.has-*
	@$(PIP) $(TORCH)
	@$(PIP) 'setuptools>=77' wheel ninja
	@touch $@

# torch first and no build isolation: the extension is compiled against the torch that will load it. A failed
# compile leaves the pure-Python backends, so `env` says at the end what can run here.
$(READY): $(HAS_TORCH) pyproject.toml setup.py $(NATIVE)
	@echo "building the kernels and installing"
	@$(PIP) --no-build-isolation -e '.[test,hf,plot,peft,trl,lightning]'
	@rm -f $(VENV)/.has-bench $(VENV)/.has-dev
	@$(BIN)/id3-optim env
	@touch $@

# The project is installed already, so this adds the extra's packages and builds nothing.
$(VENV)/.has-%: $(READY)
	@$(PIP) 'id3-optim[$*]'
	@touch $@

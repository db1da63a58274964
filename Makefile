# Everything runs in a virtual environment of its own. Another torch (a CPU build, say):
#   make test TORCH='torch==2.13.0 --index-url <index>'
# LOCK holds the exact versions of all other packages, and goes with this torch; `LOCK=` takes the newest.
TORCH ?= torch==2.13.0
LOCK ?= constraints.txt
VENV ?= .venv
PYTHON ?= python3

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
INSTALL := $(PIP) install $(if $(LOCK),-c $(LOCK))
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')
CPP := $(NATIVE) $(wildcard benchmarks/*.cpp)
# The name holds the version of torch: the extension must be rebuilt for another one.
HAS_TORCH := $(VENV)/.has-$(firstword $(TORCH))
READY := $(VENV)/.ready

.PHONY: setup demo test test-latest test-plugins bench gpu-check lint format docs wheel sdist lock clean

setup: $(READY)

demo: $(READY)
	$(BIN)/python examples/demo.py

# Each worker takes whole files: their fixtures run once. One thread each, since two are slower than one on a
# core; tests of threads set their own number.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# The newest release of every package but torch, which TORCH chooses; a fresh environment at each call.
test-latest:
	$(PYTHON) -m venv --clear .venv-latest
	$(MAKE) test VENV=.venv-latest LOCK=

# Other packages' trainers, each in a fresh environment. torchtune 0.6.1 needs an old torchao; LLaMA-Factory runs
# without torchvision and torchaudio, whose builds for CUDA do not load beside a torch for the CPU.
PLUGINS ?= axolotl llamafactory nemo-automodel torchtitan torchtune verl
test-plugins: $(READY)
	@for plugin in $(PLUGINS); do \
		python=.venv-$$plugin/bin/python; more=; unused=; \
		case $$plugin in torchtune) more=torchao==0.10.0;; llamafactory) unused="torchvision torchaudio";; esac; \
		echo "== $$plugin"; \
		$(PYTHON) -m venv --clear .venv-$$plugin && $$python -m pip -q install $(TORCH) \
			&& $$python -m pip -q install '$(firstword $(TORCH))' $$plugin $$more pytest hypothesis || exit 1; \
		if [ "$$unused" ]; then $$python -m pip -q uninstall -y $$unused; fi; \
		PYTHONPATH=.:python $$python -m pytest -rs tests/optim/test_plugins*.py \
			|| exit 1; \
	done

bench: $(READY) $(VENV)/.has-bench
	$(BIN)/python -m benchmarks

# For a machine with a GPU and no network: uses its own Python (torch, triton, pytest, hypothesis, nvcc), not .venv.
# PART: first, build, tests, bench, sanitize or e2e; all without it, in eight minutes.
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

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# build/lib* may hold modules that the tree has no longer.
wheel: $(READY)
	rm -rf build/lib* build/bdist*
	$(PIP) wheel . --no-deps --no-build-isolation -w dist
	@ls build/lib*/id3_kernels/_C.* >/dev/null 2>&1 \
		|| { echo "wheel: expected the C++ extension, got none: pip wheel -v says why" >&2; exit 1; }
	@case "$$(ls -t dist/*.whl | head -1)" in *+cu*) ls build/lib*/id3_kernels/_cuda.* >/dev/null 2>&1 \
		|| { echo "wheel: expected the CUDA extension, got none: pip wheel -v says why" >&2; exit 1; };; esac
	@ls -t dist/*.whl | head -1

sdist: $(READY) $(VENV)/.has-dev
	$(BIN)/python -m build --sdist --no-isolation

# Resolves all extras for every supported Python and system at once. What torch brings for CUDA is left to torch:
# a constraint on it would hold for one build of torch only.
lock:
	@$(PYTHON) -m venv $(VENV)-lock
	@$(VENV)-lock/bin/python -m pip install -qq --disable-pip-version-check uv
	@echo '$(firstword $(TORCH))' > $(VENV)-lock/torch.txt
	$(VENV)-lock/bin/uv pip compile -q pyproject.toml --all-extras --universal --python-version 3.10 \
		--upgrade --only-binary :all: --constraints $(VENV)-lock/torch.txt --no-emit-package torch \
		--annotation-style line --custom-compile-command 'make lock' -o $(VENV)-lock/lock.txt
	@awk '!/^(cuda|nvidia)-/ || /via.*(id3-optim|nvidia-cuda-nvcc)/' $(VENV)-lock/lock.txt \
		| sed 's# *, -c [^ ]*torch.txt##' > $(LOCK)

# Leaves the environment itself, which VENV may share with others.
clean:
	rm -rf build dist runs *.egg-info python/*.egg-info id3_kernels/*.so
	rm -rf .pytest_cache .hypothesis .benchmarks .ruff_cache
	rm -f $(READY) $(VENV)/.has-*
	find . -name __pycache__ -not -path './$(VENV)*/*' -prune -exec rm -rf {} +

$(HAS_TORCH):
	@echo "setting up $(VENV) with $(TORCH)"
	@$(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.has-*
	@$(PIP) install $(TORCH)
	@$(INSTALL) 'setuptools>=77' wheel ninja
	@touch $@

# torch first and no build isolation: the extension is compiled against the torch that will load it. LOCK then
# moves the packages that torch brought (an index of torch alone may lack the locked versions). A failed
# compile leaves the pure-Python backends, so `env` says at the end what can run here.
$(READY): $(HAS_TORCH) $(LOCK) pyproject.toml setup.py $(NATIVE)
	@echo "building the kernels and installing"
	@$(INSTALL) --no-build-isolation -e '.[test,docs,hf,plot,peft,trl,lightning,hub,completion,report]'
	@rm -f $(VENV)/.has-bench $(VENV)/.has-dev
	@$(BIN)/id3-optim env
	@touch $@

# The project is installed already, so this adds the extra's packages and builds nothing.
$(VENV)/.has-%: $(READY)
	@$(INSTALL) 'id3-optim[$*]'
	@touch $@

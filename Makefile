# `make demo` and `make test` do all the set-up on a fresh machine (Python 3.11 or newer).
# torch: on Linux PyPI's build, which runs on CUDA and on the CPU. Another build or version:
#     make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
# `make test` is what a change can break, in minutes; `make test-all` adds the tests that are marked
# thorough, `make test-part PART=2/5` a part of those. They run in JOBS processes, about 1 GB each:
#     make test JOBS=8

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
JOBS ?= 2
BIN := $(VENV)/bin

export TOKENIZERS_PARALLELISM = false
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_ROOT_USER_ACTION = ignore

.PHONY: demo test test-part test-all kernels check lint types contracts package docs clean print-torch

demo: $(VENV)/installed
	@$(BIN)/leanlift demo --output_dir leanlift-demo

# a file's tests share what they make, so they stay in one process
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test: $(VENV)/installed
	$(PYTEST) -m "not thorough"

test-part: test
	$(PYTEST) -m thorough --part $(PART)

test-all: test
	$(PYTEST) -m thorough

# the GPU's kernels for six generations, without a GPU: by the newest Triton, and by torch 2.11's
OLDER := $(abspath $(VENV))/triton-3.6.0
KERNELS := tests/ops/test_kernel_code.py tests/ops/test_kernels.py -m "thorough or not thorough"

kernels: $(VENV)/installed $(OLDER)
	$(PYTEST) $(KERNELS)
	PYTHONPATH=$(OLDER) $(PYTEST) $(KERNELS)

$(OLDER): | $(VENV)/installed
	@$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==3.6.0

check: lint types contracts test

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

contracts: $(VENV)/installed
	$(BIN)/lint-imports

# wheel and sdist in dist/, looked into and used; PACKAGE=--shared is quick: see .ci/package.py
package: $(VENV)/installed
	rm -rf dist
	$(BIN)/python .ci/package.py --torch "$(TORCH)" --keep dist $(PACKAGE)

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "Wrote site/index.html: $(BIN)/python -m mkdocs serve shows it, and every change."

$(VENV)/installed: pyproject.toml
	@echo "Setting up $(VENV): PyTorch and what else leanlift needs. This takes a few minutes, once."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet $(TORCH)
	@$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@

print-torch:
	@echo "$(TORCH)"

clean:
	rm -rf $(VENV) leanlift-demo dist build site

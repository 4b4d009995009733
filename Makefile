# make demo   the main job on an embedded example      make test    the test suite
# make check  everything CI asks for                   make bench   time the update on this machine
# make test-fast  the tests that take little time       make test-long  those that take many minutes
# make docs   the documentation as web pages, in build/site
# make clean  remove what the above created

PYTHON ?= python3
BIN := .venv/bin
COMMA := ,

# MLX on Linux needs a backend package of its own; on macOS it brings Metal.
ifeq ($(shell uname -s),Darwin)
EXTRAS := lm,dev
else ifneq ($(shell nvidia-smi >/dev/null 2>&1 && echo gpu),)
EXTRAS := lm,dev,$(if $(shell nvidia-smi | grep -E 'CUDA Version: *1[3-9]'),cuda13,cuda12)
else
# Its BLAS is slow: one of pip's, which is large, where the system has no OpenBLAS.
OPENBLAS := $(wildcard /usr/lib/*/libopenblas.so.0 /usr/lib64/libopenblas*.so.0 /usr/lib/libopenblas.so.0)
EXTRAS := lm,dev,cpu$(if $(OPENBLAS),,$(COMMA)blas)
endif

# Two processes, so each has one thread for matrix products. Their kernels: tests/kernels.py.
TEST := OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest
JOBS ?= 2

.PHONY: demo test test-fast test-long check lint types doctest bench docs clean
.DEFAULT_GOAL := check

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "compiled_adam needs Python 3.10 or newer: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@

demo: .venv/installed
	$(BIN)/compiled-adam demo

test: .venv/installed
	$(TEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-fast: .venv/installed
	$(TEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder -m 'not slow and not long'

test-long: .venv/installed
	$(TEST) -m long

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/installed
	$(BIN)/mypy

doctest: .venv/installed
	$(BIN)/python -m pytest --doctest-modules compiled_adam

check: lint types test doctest

bench: .venv/installed
	$(BIN)/python -m bench

# NO_MKDOCS_2_WARNING: the theme would advertise against MkDocs 2 at every build.
.venv/docs-installed: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

docs: .venv/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "wrote build/site/index.html"

clean:
	rm -rf .venv demo .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

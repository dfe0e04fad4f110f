# make demo    train three problems with MBF and its rivals; FAST=1 for a minute's worth
# make test    the test suite
# make bench   kernel and step benchmarks
# make lint    ruff and clang-format, versions pinned
# make format  the same, fixing what they can
# make clean   remove what the others made
#
# Each makes what it needs in its own virtual environment, $(VENV). Variables: PYTHON, VENV, TORCH (what pip installs
# as torch; TORCH=torch takes the newest build).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
LINTERS = ruff==0.17.5 clang-format==23.1.5
PY = $(VENV)/bin/python
NATIVE = $(wildcard csrc/* csrc/*/*) CMakeLists.txt setup.py pyproject.toml
SOURCES_CXX = $(shell find csrc -name '*.h' -o -name '*.cpp')

.PHONY: demo test bench lint format clean

demo: $(VENV)/installed
	$(PY) -m benchmarks.demo $(if $(FAST),--fast)

test: $(VENV)/installed
	$(PY) -m pytest tests -q

bench: $(VENV)/installed
	$(PY) -m pytest benchmarks -q --benchmark-only --benchmark-columns=min,median,iqr,rounds

lint: $(VENV)/linters
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(SOURCES_CXX)

format: $(VENV)/linters
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(SOURCES_CXX)

clean:
	rm -rf $(VENV) build *.egg-info mbf_kernels/_C*.so

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# MBF_NATIVE=1: here a build without the kernels is a failure, not a fallback.
$(VENV)/installed: $(VENV)/bin/python $(NATIVE)
	$(PY) -m pip install --quiet "$(TORCH)" numpy
	MBF_NATIVE=1 $(PY) -m pip install --quiet -e ".[test,demo]"
	touch $@

$(VENV)/linters: $(VENV)/bin/python Makefile
	$(PY) -m pip install --quiet $(LINTERS)
	touch $@

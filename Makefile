# make demo    train three problems with MBF and its rivals; FAST=1 for a minute's worth
# make test    the test suite
# make examples    train under Lightning, Accelerate, Transformers and timm: the part of the suite that runs examples/
# make reliability    100,000 random calls of the public functions, five times those of make test
# make bench   kernels and optimizer steps beside their peers: report.html and figures in benchmarks/results/; FAST=1 for
#              two minutes' worth, PEERS=1 to install the libraries it compares with, OUT=folder for another place
# make performance    docs/performance.md and the README's figures from the committed results of make bench
# make gpu     on a machine with an NVIDIA GPU: build, test, sanitize and measure, in under nine minutes
# make sanitize-address, make sanitize-thread    the CPU and the emulated GPU kernels under sanitizers: cmake and a C++
#              compiler are all they need
# make gates   compile the GPU kernels for several architectures, no GPU needed, and hold them to the pinned tables
# make instructions    count the instructions of the CPU kernels and hold them to the pinned table: x86-64 Linux, cmake and
#              a C++ compiler are all it needs
# make lint    ruff and clang-format, versions pinned
# make format  the same, fixing what they can
# make clean   remove what the others made
#
# Each makes what it needs in its own virtual environment, $(VENV). Variables: PYTHON, VENV, TORCH (what pip installs
# as torch; TORCH=torch takes the newest build), TRITON (likewise), ARCHITECTURES (what CUDA kernels are compiled for, where
# nvcc is found; native: this machine's GPU).
#
# make gpu alone uses $(GPU_PYTHON) as it is, with the torch, triton, pybind11, cmake, ninja and pytest it has, and no
# network. PARTS=test,bench chooses among environment, build, test, bench_copy, bench_ops, bench_step, sanitize, report;
# RESUME=1 goes on with what is not done; OUT=folder is where the results go; COMMIT=name where git cannot tell;
# REHEARSE=1 tries it all on a CPU.

PYTHON ?= python3
GPU_PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
ARCHITECTURES ?= 90
OPS = accuracy bad_blocks bad_input bits ops triton
# Another K-FAC, for tests; without torchvision, which would choose the torch and which only backpack's examples import.
CURVLINOPS = curvlinops-for-pytorch==3.0.1 backpack-for-pytorch einconv einops linear_operator opt_einsum unfoldNd
# Training engines. Only timm finds the torchvision that it needs: the last one that imports beside any build of torch,
# which has no wheels for Python 3.12 and newer.
ENGINES = pytorch-lightning==2.6.6 accelerate==1.15.0 transformers==5.20.2 requests
TIMM = timm==1.0.31 "torchvision==0.15.2; python_version < '3.12'"
LINTERS = ruff==0.17.5 clang-format==23.1.5
PY = $(VENV)/bin/python
NATIVE = $(wildcard csrc/* csrc/*/*) CMakeLists.txt setup.py pyproject.toml
SOURCES_CXX = $(shell find csrc tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cu*')

.PHONY: demo test reliability examples bench performance gpu gates sanitize-address sanitize-thread instructions lint format clean

demo: $(VENV)/installed
	$(PY) -m benchmarks.demo $(if $(FAST),--fast)

test: $(VENV)/installed $(VENV)/curvlinops $(VENV)/engines
	$(PY) -m pytest tests -q -n auto
	MBF_BACKEND=emulated $(PY) -m pytest tests/test_mbf.py tests/test_partition.py tests/test_capturable.py -q -n auto
	TRITON_INTERPRET=1 $(PY) -m pytest $(OPS:%=tests/test_%.py) -q -n auto -k triton

examples: $(VENV)/engines
	$(PY) -m pytest tests/test_examples.py -q -n auto

reliability: $(VENV)/installed
	RANDOM_CALLS=100000 $(PY) -m pytest tests/test_random_calls.py -q -n auto

bench: $(VENV)/installed $(if $(PEERS),$(VENV)/peers)
	BENCH_COMMAND="$(strip make bench $(if $(FAST),FAST=1) $(if $(PEERS),PEERS=1))" \
		$(PY) -m benchmarks.cpu $(if $(FAST),--plan fast) $(if $(OUT),--out "$(OUT)")

performance: $(VENV)/installed
	$(PY) -m benchmarks.cpu.publish

gpu:
	$(GPU_PYTHON) -m benchmarks.gpu $(if $(PARTS),--parts "$(PARTS)") $(if $(OUT),--out "$(OUT)") \
		$(if $(COMMIT),--commit "$(COMMIT)") $(if $(RESUME),--resume) $(if $(REHEARSE),--rehearse)

sanitize-address sanitize-thread: sanitize-%:
	cmake -S . -B build/sanitize-$* -DMBF_SANITIZE=$*
	cmake --build build/sanitize-$* --parallel $(shell nproc)
	printf '%s\n' cpu 'emulated float' 'emulated double' | xargs -L 1 -P $(shell nproc) build/sanitize-$*/driver

gates: $(VENV)/installed
	$(PY) -m pip install --quiet pybind11 cmake ninja
	$(PY) tools/cuda_gate.py --check --unchanged --built mbf_kernels/_C.*.so
	$(PY) tools/triton_gate.py --check

instructions:
	$(PYTHON) tools/instruction_gate.py --check

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

# A development build: without the kernels it fails instead of falling back, and it has the emulator.
$(VENV)/installed: $(VENV)/bin/python $(NATIVE)
	$(PY) -m pip install --quiet "$(TORCH)" "$(TRITON)" numpy
	MBF_NATIVE=1 MBF_EMULATOR=ON MBF_CUDA_ARCHITECTURES="$(ARCHITECTURES)" $(PY) -m pip install --quiet -e ".[test,demo,bench]"
	touch $@

$(VENV)/curvlinops: $(VENV)/installed
	$(PY) -m pip install --quiet --no-deps $(CURVLINOPS)
	touch $@

$(VENV)/engines: $(VENV)/installed
	$(PY) -m pip install --quiet --no-compile "$(TORCH)" $(ENGINES)
	$(PY) -m pip install --quiet --no-compile --no-deps --upgrade --target $(VENV)/timm $(TIMM)
	touch $@

$(VENV)/peers: $(VENV)/installed
	$(PY) -m pip install --quiet "$(TORCH)" "mbf-kernels[peers]"
	touch $@

$(VENV)/linters: $(VENV)/bin/python Makefile
	$(PY) -m pip install --quiet $(LINTERS)
	touch $@

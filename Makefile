# SPDX-License-Identifier: Apache-2.0
# The verbs that people, CI and the README share. Only PyPI is needed; `make help` lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= cpu,transformers,video,remote,metrics,demo,dev
NVCC ?= nvcc
BIN := $(VENV)/bin
PY := $(BIN)/python
export PYTHON

# The stamps live in the environment, so deleting it is enough to start afresh.
PACKAGES := $(VENV)/.packages
NATIVE := $(VENV)/.native
CSRC := $(shell find csrc tests/native -name '*.cpp' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null | sort)
CUDA_UNITS := $(filter csrc/cuda/%.cu csrc/cuda/%.cpp,$(CSRC))

# Tests marked gpu run where there is one.
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -o -m1 GPU)
MARKS := not slow and not sanitizers$(if $(HAS_GPU),, and not gpu)

.PHONY: help venv demo servers test test-slow sanitize torture coverage lint lint-python lint-types lint-cpp fmt bench cuda-check mutate fuzz clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(PACKAGES) $(NATIVE)  ## virtual environment with pinned packages and the built extension

# Built by the recipe of PACKAGES; when native code alone changes, only what changed is compiled again.
$(PACKAGES): pyproject.toml constraints.txt tools/make_venv.sh
	tools/make_venv.sh $(VENV) $(EXTRAS)
	touch $(PACKAGES) $(NATIVE)

$(NATIVE): setup.py $(CSRC) | $(PACKAGES)
	$(PY) setup.py --quiet build_ext --inplace
	touch $@

demo: venv  ## the worked example, on this machine
	$(PY) examples/demo.py

servers:  ## redis-server and Mooncake's libraries for tests: apt-get where root, else a word on what is skipped
	@tools/install_servers.sh

test: servers venv  ## all quick tests; GPU tests where there is a GPU
	$(BIN)/pytest -m "$(MARKS)"

sanitize: venv  ## the native code under the compiler's checkers of addresses, undefined behaviour and races
	$(BIN)/pytest -m sanitizers

test-slow: venv  ## the tests that take minutes
	$(BIN)/pytest -m "slow$(if $(HAS_GPU),, and not gpu)"

torture: venv  ## 500 kills of a busy writer, an end before every call, 8 readers beside a writer: 7 minutes
	$(BIN)/pytest -q -m slow -s tests/test_crash.py tests/test_crash_matrix.py tests/test_reader_torture.py

coverage: venv  ## quick tests with branch coverage of the Python code
	$(BIN)/coverage run -m pytest -m "$(MARKS)"
	$(BIN)/coverage report

lint: lint-python lint-types lint-cpp  ## every static check

lint-python: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check

lint-types: venv
	$(BIN)/mypy
	$(PY) -m mypy.stubtest --allowlist tools/stubtest_allowlist.txt --ignore-unused-allowlist kvstore._native

lint-cpp: venv
	$(BIN)/clang-format --dry-run -Werror $(CSRC)

fmt: venv  ## format Python and C++ in place
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CSRC)

bench: venv  ## every benchmark but profiles and questions, quickly; benchmarks/README.md says how to read them
	for name in append chat codec decode device-decode eviction hit-rates index io long objects quality ranking remote retrieval session shapes; do echo "== $$name"; $(BIN)/kvstore bench $$name --quick --json; done

cuda-check:  ## compile the CUDA sources for sm_80 and sm_90, without linking; needs nvcc, no GPU
	@command -v $(NVCC) >/dev/null || { echo "cuda-check: $(NVCC) not found" >&2; exit 1; }
	@[[ -n "$(CUDA_UNITS)" ]] || { echo "cuda-check: no sources in csrc/cuda" >&2; exit 1; }
	@objects=$$(mktemp -d) && trap 'rm -rf "$$objects"' EXIT && for unit in $(CUDA_UNITS); do \
	    echo "$(NVCC) $$unit"; \
	    $(NVCC) -std=c++17 -O2 -Werror all-warnings -Xcompiler -Wall,-Wextra -DKV_WITH_CUDA -Icsrc -c "$$unit" -o "$$objects/$$(basename "$$unit").o" \
	        -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90; \
	done

MUTANTS ?= 1000000
SEED ?= 1
FUZZ_SECONDS ?= 60

mutate: venv  ## a million damaged records at all SIMD levels under g++'s sanitizers; minutes; MUTANTS=, SEED=
	PYTHONPATH=. $(PY) tools/fuzz.py mutate $(MUTANTS) --seed $(SEED)

fuzz: venv  ## libFuzzer, a minute a target; needs clang
	PYTHONPATH=. $(PY) tools/fuzz.py fuzz $(FUZZ_SECONDS)

clean:  ## delete build outputs and caches; keeps .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	rm -f kvstore/_native*.so
	find kvstore kernels retrieval tests benchmarks examples tools -name __pycache__ -prune -exec rm -rf {} +

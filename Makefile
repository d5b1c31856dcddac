# make demo and make test are all the set-up there is: both create .venv, install the pinned requirements and run.
PYTHON ?= python3
BIN := .venv/bin
GPU := $(shell command -v nvidia-smi 2>/dev/null)

.PHONY: setup demo test test-slow test-llama test-distributed lint format speed bench-smoke clean

setup: .venv/.installed

# Without a GPU the CPU build of torch is tried first; constraints.txt then keeps whatever torch is there.
.venv/.installed: requirements.txt requirements-oracle.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(if $(GPU),false,$(BIN)/pip install -q torch==2.13.0+cpu) || $(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -r requirements.txt -c constraints.txt
	$(BIN)/pip install -q --no-deps -r requirements-oracle.txt
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	@touch $@

demo: setup
	$(BIN)/hestia demo

test: setup
	$(BIN)/pytest -m "not slow"

test-slow: setup
	$(BIN)/pytest

# Two processes over gloo, on the CPU: training, resuming, sharded weights, calibration.
test-distributed: setup
	$(BIN)/pytest tests/distributed tests/curvature/test_parallel.py

# llama-cpp-python builds from source (ten minutes on two cores); its tests are skipped by name without it.
test-llama: setup
	CMAKE_ARGS=-DGGML_NATIVE=ON $(BIN)/pip install -q "llama-cpp-python==0.3.36" -c constraints.txt
	$(BIN)/pytest -m llama_cpp

lint: setup
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/pyright
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

speed: setup
	for script in benchmarks/speed/*.py; do $(BIN)/python $$script || exit 1; done

bench-smoke: setup
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/experiments/smoke.py

clean:
	rm -rf .venv demo

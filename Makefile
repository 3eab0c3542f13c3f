PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ENV    := OMP_NUM_THREADS=1 DS_ACCELERATOR=$${DS_ACCELERATOR:-cpu}
PYTEST := $(ENV) $(BIN)/python -m pytest

# First the tests of one process, two at a time, then those that start ranks, which use all cores. Both are run, also
# where the first fail.
tests = $(PYTEST) -n 2 --ignore tests/distributed tests $(1); units=$$?; $(PYTEST) tests/distributed $(1) && exit $$units

.PHONY: demo test test-slow test-all lint format env clean

demo: env  ## train a GPT with AdamW and with 3D-Shampoo on 4 processes; results in runs/
	$(BIN)/shampoo3d train

test: env  ## everything but the slow tests
	$(call tests)

test-slow: env $(VENV)/trainers  ## more settings on more layouts, the 22 recorded topologies, up to 32 processes
	$(call tests,-m "slow or hypothesis" --hypothesis-profile slow)

test-all: test test-slow

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

env: $(VENV)/installed

# torch comes first: DeepSpeed's build looks for it, and must not choose another one.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch setuptools wheel
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev,bench]"
	touch $@

# Other people's trainers, which only slow tests use.
$(VENV)/trainers: $(VENV)/installed
	$(BIN)/pip install --quiet -c constraints.txt -e ".[trainers]"
	touch $@

clean:
	rm -rf $(VENV) build dist runs src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

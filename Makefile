PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ENV    := OMP_NUM_THREADS=1 DS_ACCELERATOR=$${DS_ACCELERATOR:-cpu}
PYTEST := $(ENV) $(BIN)/python -m pytest

# First the tests of one process, two at a time, then those that start ranks, which use all cores. Both are run, also
# where the first fail.
tests = $(PYTEST) -n 2 --ignore tests/distributed tests $(1); units=$$?; $(PYTEST) tests/distributed $(1) && exit $$units

# Tests that are run on the installed wheel: the package itself, and a little of each wing.
PACKAGED := tests/test_package.py tests/test_optimizer.py tests/planning/test_plan.py tests/settings/test_names.py

# `make test-versions` takes the interpreters that are here, and the first and last release of DeepSpeed that pass.
PYTHONS    ?= $(foreach v,3.10 3.11 3.12 3.13,$(shell python$v -c 'print("$v")' 2>/dev/null))
DEEPSPEEDS ?= 0.19.7 0.19.8
# What DeepSpeed refused before 0.19.8: AutoTP at ZeRO 3, and of sizes that its ranks do not divide.
REFUSED    := AutoTensorParallel-stage3 or EmptyShards

.PHONY: demo test test-units test-ranks test-slow test-all test-versions package site lint format env clean

demo: env  ## train a GPT with AdamW and with 3D-Shampoo on 4 processes; results in runs/
	$(BIN)/shampoo3d train

test: env  ## everything but the slow tests
	$(call tests)

test-units: env
	$(PYTEST) -n 2 --ignore tests/distributed tests

test-ranks: env
	$(PYTEST) tests/distributed $(SELECTED)

test-slow: env $(VENV)/trainers  ## more settings on more layouts, the 22 recorded topologies, up to 32 processes
	$(call tests,-m "slow or hypothesis" --hypothesis-profile slow)

test-all: test test-slow

test-versions: $(PYTHONS:%=test-python-%) $(DEEPSPEEDS:%=test-deepspeed-%)  ## docs/versions.md; an hour, gigabytes

test-python-%:
	$(MAKE) test-units PYTHON=python$* VENV=$(VENV)-python-$*

test-deepspeed-%:
	$(MAKE) env VENV=$(VENV)-deepspeed-$*
	$(ENV) $(VENV)-deepspeed-$*/bin/pip install --quiet deepspeed==$*
	$(MAKE) test-ranks VENV=$(VENV)-deepspeed-$* $(if $(filter-out 0.19.8,$*),SELECTED='-k "not ($(REFUSED))"')

# The wheel lies in an environment of its own, which sees the packages of $(VENV) but not the tree that $(VENV) points to.
package: env  ## build the wheel and the sdist, check them, install the wheel and test it with the tests of the sdist
	rm -rf dist build
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents --package src/shampoo3d dist/*.whl
	$(PYTHON) -m venv build/env
	build/env/bin/pip install --quiet --no-deps dist/*.whl
	$(BIN)/python -c 'print(*__import__("site").getsitepackages())' > "$$(build/env/bin/python -c 'print(*__import__("site").getsitepackages())')/dev.pth"
	mkdir build/sdist && tar -xf dist/*.tar.gz -C build/sdist --strip-components 1
	cd build/sdist && ../env/bin/shampoo3d --version && $(ENV) ../env/bin/python -m pytest $(PACKAGED)

# Not --quiet: then warnings would not count.
site: env $(VENV)/site  ## the documents as a site in build/site, their links and anchors checked; nothing is fetched
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

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

$(VENV)/site: $(VENV)/installed
	$(BIN)/pip install --quiet -c constraints.txt -e ".[site]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-* build dist runs src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

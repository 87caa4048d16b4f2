# `make demo` and `make test` need git, make and Python >= 3.11, and make everything else themselves.
# Verifiers that run code need bubblewrap (apt-get install bubblewrap): without it their tests are left out, with a warning.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test test-slow test-slow-core test-browser test-engines test-vllm test-verl lint docs pocket clean

demo: $(VENV)/.demo
	$(BIN)/python scripts/demo.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadfile -m 'slow and not engine'

# Of these, the ones that CI runs: the reference, hooks under compile, the shipped model's evidence, and the wheel.
SLOW_CORE := tests/rollout/test_capture.py tests/rollout/test_reference.py tests/test_package.py tests/test_pocket.py \
	tests/cli/test_cli.py
test-slow-core: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadfile -m 'slow and not engine' $(SLOW_CORE)

# The report in Chromium, which the system brings: apt-get install chromium.
test-browser: $(VENV)/.dev
	$(BIN)/python -m pytest -m browser tests/report/test_report_page.py

# Real vLLM, OpenRLHF's own client and whole verl runs, in environments of their own, made once and kept. A process for
# each file: what vLLM imports for one engine can keep it from building another.
ENGINE_TESTS := -m 'engine and not slow'
test-engines: test-vllm test-verl

test-vllm:
	python=$$(scripts/engine_env.sh vllm) && for file in vllm vllm_trl vllm_server; do \
		$$python -m pytest $(ENGINE_TESTS) tests/*/test_$$file.py || exit 1; done

test-verl:
	python=$$(scripts/engine_env.sh verl) && for file in openrlhf verl; do \
		$$python -m pytest $(ENGINE_TESTS) tests/*/test_$$file.py || exit 1; done

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The documentation as a site, in site/: open site/index.html. A link that leads nowhere is an error.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Makes the embedded model again from nothing; goes on where it was interrupted.
pocket: $(VENV)/.dev
	$(BIN)/python scripts/build_pocket.py

# torch first, and alone: a later resolution would replace a CPU build by the newest CUDA one.
$(VENV)/.venv:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed')"
	$(PYTHON) -m venv $(VENV)
	@echo "Installing PyTorch ..."
	$(PIP) torch
	touch $@

$(VENV)/.demo: $(VENV)/.venv pyproject.toml constraints.txt
	@echo "Installing mechreward ..."
	$(PIP) --editable '.[trl,report]'
	touch $@

$(VENV)/.dev: $(VENV)/.venv pyproject.toml constraints.txt
	@echo "Installing mechreward and its development tools ..."
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) dist demo site

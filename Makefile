# Every target does its own set-up; a second run finds it done. `check-null-gpu` needs a stand-in for
# a GPU besides, which tests/null_gpu/run.sh describes.
#
#   make demo ARGS="--rounds 1 --concurrency 8"     make test ARGS="-k metrics"
SHELL := /bin/bash
PYTHON_IN_VENV := .venv/bin/python
ARGS ?=
IN_TWO := --numprocesses 2 --dist loadfile
# What takes both cores for one test.
SERVICES := tests/e2e/distributed tests/e2e/reliability tests/e2e/test_documented.py
# A supported vLLM other than the one of .venv: its Python over that one's operators, and the tests of
# what depends on vLLM.
OTHER_VLLM ?= 0.33.0
OF_VLLM := tests/unit/config tests/unit/drafting tests/unit/hooks tests/engine/core \
	tests/e2e/serving/test_plugin_loading.py

.PHONY: help setup test test-all test-other-vllm lint types docs package format demo bench check-gpu check-null-gpu clean

help:
	@echo "make setup           the .venv: vLLM for this machine, the plugin, its tools"
	@echo "make test            the unit tests and the core of the engine's; at most 8 minutes on 2 cores"
	@echo "make test-all        all tests: vLLM's other features too, servers, ranks, Ray, training runs"
	@echo "make test-other-vllm the core of them on another supported vLLM, OTHER_VLLM=$(OTHER_VLLM)"
	@echo "make demo            vLLM with and without layerskip, side by side"
	@echo "make bench           layerskip and its peers side by side, with a report in benchmarks/results"
	@echo "make lint types      what CI checks besides"
	@echo "make docs            the documentation as a site, in build/site; its links are checked"
	@echo "make package         the wheel and the sdist, in dist/, and a try of them"
	@echo "make format          format the code and fix what can be fixed"
	@echo "make check-gpu       tests and a benchmark on a GPU machine; ARGS=tests or ARGS=table for one of them"
	@echo "make check-null-gpu  vLLM's GPU path on a stand-in that you bring: that it runs, not that it is right"
	@echo "make clean           remove .venv and everything generated"

setup:
	@scripts/setup.sh

test: setup
	$(PYTHON_IN_VENV) -m pytest $(IN_TWO) tests/unit tests/engine/core $(ARGS)

test-all: setup
	$(PYTHON_IN_VENV) -m pytest $(IN_TWO) $(SERVICES:%=--ignore %) $(ARGS)
	$(PYTHON_IN_VENV) -m pytest $(SERVICES) $(ARGS)

test-other-vllm: setup
	python=$$($(PYTHON_IN_VENV) -m scripts.vllm_python $(OTHER_VLLM)) && \
	PYTHONPATH=$$python $(PYTHON_IN_VENV) -m pytest $(IN_TWO) $(OF_VLLM) $(ARGS)

lint: setup
	$(PYTHON_IN_VENV) -m ruff format --check .
	$(PYTHON_IN_VENV) -m ruff check .
	.venv/bin/pydoclint --quiet layerskip_vllm benchmarks
	.venv/bin/lint-imports --no-logo

types: setup
	$(PYTHON_IN_VENV) -m mypy

docs: setup
	rm -rf build/docs build/site && mkdir -p build/docs
	git ls-files -z | xargs -0 cp --parents --target-directory build/docs
	$(PYTHON_IN_VENV) -m mkdocs build --strict

package: setup
	scripts/check_package.sh

format: setup
	$(PYTHON_IN_VENV) -m ruff check --fix .
	$(PYTHON_IN_VENV) -m ruff format .

demo: setup
	$(PYTHON_IN_VENV) -m benchmarks.serving.demo $(ARGS)

bench: setup
	$(PYTHON_IN_VENV) -m benchmarks.bench $(ARGS)

# Offline too: the set-up is left out where PYTHON, the Python to use, has a vLLM.
check-gpu:
	@python=$${PYTHON:-$(PYTHON_IN_VENV)}; \
	if ! "$$python" -c 'import vllm' 2>/dev/null; then scripts/setup.sh && python=$(PYTHON_IN_VENV) || exit; fi; \
	exec "$$python" -m benchmarks.check_gpu $(ARGS)

check-null-gpu: setup
	bash tests/null_gpu/run.sh

clean:
	rm -rf .venv .null-gpu demo-output bench-output benchmark-output exits-output tune-output verify-output outputs draft_vocab.json build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

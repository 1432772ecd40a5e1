# Every target does its own set-up; a second run finds it done.
#
#   make demo ARGS="--rounds 1 --concurrency 8"     make test ARGS="-k metrics"
SHELL := /bin/bash
PYTHON_IN_VENV := .venv/bin/python
ARGS ?=

.PHONY: help setup test test-distributed test-reliability lint types format demo check-gpu check-null-gpu clean

help:
	@echo "make setup           the .venv: vLLM for this machine, the plugin, its tools"
	@echo "make test            the tests of one engine; at most 20 minutes on 2 cores"
	@echo "make test-distributed  those of several ranks, engines and Ray nodes"
	@echo "make test-reliability  a server under mixed traffic and faults, for some minutes"
	@echo "make demo            vLLM with and without layerskip, side by side"
	@echo "make lint types      what CI checks besides"
	@echo "make format          format the code and fix what can be fixed"
	@echo "make check-gpu       the tests and one benchmark on a GPU machine"
	@echo "make check-null-gpu  vLLM's GPU path without a GPU: that it runs, not that it is right"
	@echo "make clean           remove .venv and everything generated"

setup:
	@scripts/setup.sh

test: setup
	$(PYTHON_IN_VENV) -m pytest --numprocesses 2 --dist loadfile --ignore tests/distributed \
	  --ignore tests/reliability $(ARGS)

test-distributed: setup
	$(PYTHON_IN_VENV) -m pytest tests/distributed $(ARGS)

test-reliability: setup
	$(PYTHON_IN_VENV) -m pytest tests/reliability $(ARGS)

lint: setup
	$(PYTHON_IN_VENV) -m ruff format --check .
	$(PYTHON_IN_VENV) -m ruff check .
	.venv/bin/pydoclint --quiet layerskip_vllm benchmarks

types: setup
	$(PYTHON_IN_VENV) -m mypy

format: setup
	$(PYTHON_IN_VENV) -m ruff check --fix .
	$(PYTHON_IN_VENV) -m ruff format .

demo: setup
	$(PYTHON_IN_VENV) -m benchmarks.demo $(ARGS)

check-gpu: setup
	benchmarks/check_gpu.sh $(ARGS)

check-null-gpu: setup
	bash tests/null_gpu/run.sh

clean:
	rm -rf .venv demo-output benchmark-output build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# The environments are made by tools/environment.py: .venv, and .venv-3.12 for the second version pair.
PYTHON ?= python3
ENVIRONMENT := $(PYTHON) tools/environment.py

# Continuous integration tests both version pairs; elsewhere what this machine has will do.
ifeq ($(CI),true)
FIRST_PAIR := --pair 3.11
SECOND_PAIR := --pair 3.12
else
FIRST_PAIR :=
SECOND_PAIR := --pair 3.12 --optional
endif

.DEFAULT_GOAL := help
.PHONY: help env quickstart verify check test clean

help: ## list these targets
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F '|' '{printf "  %-12s %s\n", $$1, $$2}'

env: ## make or update .venv, with the tools that test and check
	@$(ENVIRONMENT) $(FIRST_PAIR) --dev

quickstart: ## make .venv and train configs/quickstart.yaml: a few minutes on two cores
	@$(ENVIRONMENT)
	@.venv/bin/megatron-moe train configs/quickstart.yaml

verify: env ## train every kind of layout on up to 4 ranks and compare each with one process
	.venv/bin/python tools/verify_layouts.py

check: env ## ruff and mypy
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy

test: ## what continuous integration runs: check, the tests, and some again on the second version pair
	@$(ENVIRONMENT) $(FIRST_PAIR) --dev
	@$(ENVIRONMENT) $(SECOND_PAIR) --dev
	@$(MAKE) --no-print-directory check
	.venv/bin/python -m pytest
	@if [ -x .venv-3.12/bin/python ]; then \
		echo ".venv-3.12/bin/python -m pytest -m second_pair"; \
		.venv-3.12/bin/python -m pytest -m second_pair; \
	else \
		echo "Skipped: the tests of the second version pair, as Python 3.12 was not found"; \
	fi

clean: ## remove the environments and what the tools left; runs and the shared cache stay
	rm -rf .venv .venv-3.12 .venv-cache .venv*.lock build *.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find megatron_moe tests tools -name __pycache__ -prune -exec rm -rf {} +

# Type `make help`. Everything runs from a .venv that the first command fills from requirements.lock.
DEVICE     ?= auto
# Where there is a GPU the papers' own data, else embedded tasks that need none.
ifndef EXPERIMENT
EXPERIMENT := $(if $(filter-out cpu,$(DEVICE)),$(if $(shell nvidia-smi -L 2>/dev/null | grep GPU),untuned_warmup_short))
EXPERIMENT := $(or $(EXPERIMENT),untuned_warmup_quick)
endif
WORKERS    ?=
# A file in conf/backend/, and changes to it: "slurm partition=gpu gpus=1".
BACKEND    ?= local
STORE      ?= runs
PYTHON     ?= python3

BIN    := .venv/bin
READY  := .venv/ready
SWEEP   = $(BIN)/python -m runners.sweep
TABLES  = results/$(EXPERIMENT)
PLACE   = --device $(DEVICE) --store $(STORE) $(if $(WORKERS),--workers $(WORKERS)) --backend $(BACKEND)

.DEFAULT_GOAL := help
.PHONY: help setup sweep plan status figures collect restore bench test test-slurm lint format lock clean

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  EXPERIMENT=$(EXPERIMENT)   one of: $(basename $(notdir $(wildcard conf/experiment/*.yaml)))"
	@echo "  WORKERS=<processes>  DEVICE=auto|cpu|cuda  STORE=<folder of the runs>"
	@echo '  BACKEND=local, or jobs of a cluster: BACKEND="slurm partition=gpu gpus=1" (conf/backend/slurm.yaml has the keys)'

setup: $(READY)  ## make the .venv (done by every other command on first use)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; name one with PYTHON=...")'
	@echo "setting up .venv: about 6 GB, a minute or more"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep -oE '^uv==[0-9.]+' requirements.lock)"
	@$(BIN)/uv pip sync --python $(BIN)/python --require-hashes requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $(READY)

sweep: $(READY)  ## train what EXPERIMENT lacks, then tables, figures and verdicts
	@$(SWEEP) run $(EXPERIMENT) $(PLACE)
	@test $(TABLES)/report.md -nt $(TABLES)/runs.csv || $(BIN)/python -m analysis.run_notebooks --experiment $(EXPERIMENT)
	@$(BIN)/python -m analysis.report $(EXPERIMENT)

plan: $(READY)  ## what a sweep of EXPERIMENT would do, and how long it would take
	@$(SWEEP) plan $(EXPERIMENT) $(PLACE)

status: $(READY)  ## how far EXPERIMENT is
	@$(SWEEP) status $(EXPERIMENT) $(PLACE)

figures: $(READY)  ## redraw every figure from the committed tables (trains nothing)
	@$(BIN)/python -m analysis.run_notebooks

collect: $(READY)  ## write what an unfinished sweep has so far into results/, to be committed
	@$(SWEEP) collect $(EXPERIMENT) $(PLACE)

restore: $(READY)  ## put the committed runs of EXPERIMENT into the store, to go on from them
	@$(SWEEP) restore $(EXPERIMENT) --store $(STORE)

bench: $(READY)  ## measure how fast all this is, side by side with plain torch (PARTS=... for some of it)
	@$(BIN)/python -m bench $(PARTS) --device $(DEVICE)

test: $(READY)  ## the tests, a miniature sweep end to end among them
	@$(BIN)/python -m pytest

test-slurm: $(READY)  ## a sweep beside a real SLURM on this machine, which it installs (Debian, root) and stops
	@tests/slurm/with_slurm.sh $(BIN)/python -m tests.slurm.check

lint: $(READY)  ## ruff, mypy and the one-way imports between the packages
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

format: $(READY)  ## let ruff lay out the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

lock: $(READY)  ## renew requirements.lock from pyproject.toml
	@$(BIN)/uv pip compile --quiet --upgrade pyproject.toml --all-extras --universal --generate-hashes \
		--python-version 3.11 --no-emit-index-url --no-annotate --no-header --output-file requirements.lock

clean:  ## remove caches and the .venv; runs and results stay
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build outputs multirun
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

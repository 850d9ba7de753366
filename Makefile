# cxrkit: `make help` lists what can be done here.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
  $$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SWEEP ?= sweeps/demo.yaml
PATIENTS ?= 256

# One thread a process: two processes with two threads each stall one another on two cores.
export OMP_NUM_THREADS ?= 1
export NO_ALBUMENTATIONS_UPDATE := 1

.PHONY: help install demo rehearse test sync bench readme clean hooks

help: ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

install: $(STAMP) ## Make .venv and install everything into it (done by the other targets when needed)

$(STAMP): settings.ini setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "cxrkit needs Python 3.11 or newer with venv; found: $$(python3 --version 2>&1)"; exit 1; }
	@echo "Installing into $(VENV) with $$($(PYTHON) --version), some minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

hooks: $(STAMP) ## Install the git hooks that keep notebooks clean (once per clone)
	$(BIN)/nbdev_install_hooks
	$(BIN)/pre-commit install

demo: $(STAMP) ## Toy competition: files, cache, folds, 2 × 3 models, blend, submission, scores, quick rehearsal
	$(BIN)/cxrkit toy data/toy --patients $(PATIENTS) --seed 0
	$(BIN)/cxrkit sweep $(SWEEP)
	$(BIN)/cxrkit runs --comp toy
	$(BIN)/cxrkit scores toy
	$(BIN)/cxrkit rehearse toy --quick
	@echo "submission: $$(ls -t runs/toy/50_submit/*/submission.csv | head -1)"

rehearse: $(STAMP) ## After the demo: the submission as Kaggle will run it, in every scene; report in runs/rehearsal/
	@ls runs/toy/40_blend/*/manifest.json >/dev/null 2>&1 || { echo "nothing to rehearse yet: run make demo first"; exit 1; }
	$(BIN)/cxrkit rehearse toy

test: $(STAMP) ## Exports in sync, notebooks, pytest with real papermill flows: what CI runs
	@bash tests/in_sync.sh
	$(BIN)/nbdev_test --n_workers 2 --do_print
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup tests

sync: $(STAMP) ## Export nbs/ to cxrkit/ and clean the notebooks
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

bench: $(STAMP) ## Run the benchmark notebooks (ratios against named peers); results in runs/bench/
	@mkdir -p runs/bench
	@for n in nbs/bench/*.ipynb; do echo "$$n"; $(BIN)/papermill --cwd nbs/bench -k python3 $$n runs/bench/$$(basename $$n) || exit 1; done

readme: $(STAMP) ## Make README.md from nbs/index.ipynb
	$(BIN)/jupyter nbconvert --to markdown nbs/index.ipynb --output-dir . --output README

clean: ## Remove what was generated here: runs/, data/toy, caches (asks nothing, keeps .venv)
	rm -rf runs data/toy .pytest_cache build dist *.egg-info

# Two commands do all the set-up: `make demo` (see it work) and `make test` (lint, types, quick tests).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: demo test test-full check format clean

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Synthetic brains → store → pretraining → a page. QUICK=1: fewer brains and steps.
DEMO := runs/demo
SUBJECTS := $(if $(QUICK),10,32)
STEPS := $(if $(QUICK),60,500)

demo: $(STAMP)
	test -e $(DEMO)/phantom-$(SUBJECTS)/dataset_description.json || { rm -rf $(DEMO) && \
	  $(BIN)/brainscale phantom $(DEMO)/phantom-$(SUBJECTS) --subjects $(SUBJECTS) --seed 0 --spacing-mm 2; }
	$(BIN)/python data_prep/to_zarr.py $(DEMO)/phantom-$(SUBJECTS) $(DEMO)/store --prep configs/prep/brain_2mm.toml
	$(BIN)/brainscale doctor $(DEMO)/store --deep
	$(BIN)/brainscale pretrain configs/mae_small_cpu.toml data.store=$(DEMO)/store run.dir=$(DEMO) \
	  train.num_steps=$(STEPS) optim.warmup_steps=30 log.holdout_every_steps=100
	@echo "look at $(DEMO)/report.html"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/pytest -n 2 --dist loadfile

test-full: check
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,peers,viewers,trackers]'
	BRAINSCALE_TEST_FULL=1 $(BIN)/pytest -m "slow or not slow" --durations 20

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info

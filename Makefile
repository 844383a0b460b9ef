# Two commands do all the set-up: `make demo` (see it work) and `make test` (lint, types, quick tests).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: demo test test-full check docs format clean

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# Synthetic brains → store → pretraining with both objectives → scores and weights → pages. QUICK=1: fewer brains and steps.
DEMO := runs/demo
SUBJECTS := $(if $(QUICK),10,32)
MAE_STEPS := $(if $(QUICK),60,400)
JEPA_STEPS := $(if $(QUICK),60,300)
LOOKS := $(foreach key,log.holdout_every_steps health.probe_every_steps,$(key)=$(if $(QUICK),20,50))

demo: $(STAMP)
	test -e $(DEMO)/phantom-$(SUBJECTS)/dataset_description.json || { rm -rf $(DEMO) && \
	  $(BIN)/brainscale phantom $(DEMO)/phantom-$(SUBJECTS) --subjects $(SUBJECTS) --seed 0 --spacing-mm 2; }
	$(BIN)/python data_prep/to_zarr.py $(DEMO)/phantom-$(SUBJECTS) $(DEMO)/store --prep configs/prep/brain_2mm.toml
	$(BIN)/brainscale doctor $(DEMO)/store --deep
	$(BIN)/brainscale pretrain configs/mae_small_cpu.toml data.store=$(DEMO)/store run.dir=$(DEMO)/mae \
	  train.num_steps=$(MAE_STEPS) optim.warmup_steps=30 $(LOOKS)
	$(BIN)/brainscale pretrain configs/jepa_vcr_tiny_cpu.toml data.store=$(DEMO)/store run.dir=$(DEMO)/jepa \
	  train.num_steps=$(JEPA_STEPS) $(LOOKS)
	$(BIN)/brainscale evaluate $(DEMO)/mae $(DEMO)/jepa --store $(DEMO)/store --tasks configs/tasks/demo.toml \
	  --out $(DEMO)/scores --probes knn,linear --no-cnn --permutations 50 --few-shot 4,8
	rm -rf $(DEMO)/export && $(BIN)/brainscale export $(DEMO)/mae $(DEMO)/export
	$(BIN)/brainscale report $(DEMO)/mae $(DEMO)/jepa --out $(DEMO)/report.html
	@echo "look at $(DEMO)/report.html and $(DEMO)/scores/scores.html"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/pytest -n 2 --dist loadfile

test-full: check
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,docs,dali,peers,viewers,trackers]'
	BRAINSCALE_TEST_FULL=1 $(BIN)/pytest -m "slow or not slow" --durations 20

# The pages of docs/, every warning an error → docs/_build/html. Needs a network the first time only.
docs: $(STAMP)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -n -b html docs docs/_build/html

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info

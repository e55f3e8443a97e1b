# make demo, make test and make lint need Python 3.10 or later and nothing else: they create a
# virtual environment and install torch and the tools for development in it.
#   TORCH=torch==2.13.0 make test     with that torch, in a virtual environment of its own
PYTHON ?= python3
TORCH ?= torch
VENV := .venv-$(subst =,,$(firstword $(TORCH)))
# What the extra `bench` brings, numpy and transformers, does not run beside torch 1.
EXTRAS := $(if $(findstring ==1.,$(TORCH)),dev,dev,bench)
INSTALLED := $(VENV)/installed
EXAMPLE := docs/examples/train.py

.PHONY: demo test test-composer lint clean

# The same training script twice, without and with LPLN_PRECISION, and both results side by side.
demo: $(INSTALLED)
	$(VENV)/bin/python $(EXAMPLE) > $(VENV)/stock.tsv
	LPLN_PRECISION=amp $(VENV)/bin/python $(EXAMPLE) > $(VENV)/lowered.tsv
	@printf '\nfigure\tstock\t\tLPLN_PRECISION=amp\n' > $(VENV)/demo.tsv
	@paste $(VENV)/stock.tsv $(VENV)/lowered.tsv >> $(VENV)/demo.tsv
	@awk -F '\t' '{ printf "%-38s %-18s %s\n", $$1, $$2, $$4 }' $(VENV)/demo.tsv

# pytest's own command does not put the checkout on sys.path: what is tested is the wheel.
test: $(INSTALLED)
	$(VENV)/bin/pytest

# Composer pins an old torch; without its pins it runs on the newest.
test-composer: $(INSTALLED)
	$(VENV)/bin/pip install --quiet torchvision $(TORCH)
	$(VENV)/bin/pip install --quiet --no-deps mosaicml==0.32.1
	$(VENV)/bin/pip install --quiet mosaicml-cli "importlib-metadata<9" torchmetrics==1.7.4 \
	  torch_optimizer coolname tabulate py-cpuinfo psutil
	LPLN_TEST_COMPOSER=1 $(VENV)/bin/pytest tests/test_composer.py

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf .venv-* build dist

$(INSTALLED): pyproject.toml $(shell find lpln_autopatch -name '*.py')
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	rm -rf $(VENV)/wheel
	$(VENV)/bin/pip install --quiet $(TORCH)
	$(VENV)/bin/pip wheel --quiet --no-deps --wheel-dir $(VENV)/wheel .
	$(VENV)/bin/pip install --quiet "$$(echo $(VENV)/wheel/*.whl)[$(EXTRAS)]" $(TORCH)
	$(VENV)/bin/pip install --quiet --force-reinstall --no-deps $(VENV)/wheel/*.whl
	touch $@

# Everything here needs Python 3.10 or later and nothing else: it creates a virtual environment and
# installs torch and the tools for development in it.
#   TORCH=torch==2.13.0 make test     with that torch, in a virtual environment of its own
PYTHON ?= python3
TORCH ?= torch
VENV := .venv-$(subst =,,$(firstword $(TORCH)))
# What the extra `bench` brings, numpy and transformers, does not run beside torch 1.
EXTRAS := $(if $(findstring ==1.,$(TORCH)),dev,dev,bench)
INSTALLED := $(VENV)/installed
DEMO := $(VENV)-demo
EXAMPLE := docs/examples/train.py

.PHONY: demo test test-fused test-composer test-frameworks lint docs dist clean

# The same training script twice, without and with LPLN_PRECISION, and both results side by side.
# Not the speed: two runs, one after the other, compare none.
demo:
	test -d $(DEMO) || $(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/pip install --quiet $(TORCH) tqdm .
	$(DEMO)/bin/python $(EXAMPLE) > $(DEMO)/stock.tsv
	LPLN_PRECISION=amp $(DEMO)/bin/python $(EXAMPLE) > $(DEMO)/lowered.tsv
	@printf '\nfigure\tstock\t\tLPLN_PRECISION=amp\n' > $(DEMO)/demo.tsv
	@paste $(DEMO)/stock.tsv $(DEMO)/lowered.tsv | grep -v 'per second' >> $(DEMO)/demo.tsv
	@awk -F '\t' '{ printf "%-38s %-18s %s\n", $$1, $$2, $$4 }' $(DEMO)/demo.tsv

# pytest's own command does not put the checkout on sys.path: what is tested is the wheel.
test: $(INSTALLED)
	$(VENV)/bin/pytest --numprocesses auto --durations 10

# The Triton kernels, on the CPU: the interpreter needs NumPy. Where there is a GPU, `make test`
# runs them on it.
test-fused: $(INSTALLED)
	$(VENV)/bin/pip install --quiet triton numpy
	TRITON_INTERPRET=1 $(VENV)/bin/pytest --numprocesses auto tests/test_fused.py

# Composer pins an old torch; without its pins it runs on the newest.
test-composer: $(INSTALLED)
	$(VENV)/bin/pip install --quiet torchvision $(TORCH)
	$(VENV)/bin/pip install --quiet --no-deps mosaicml==0.32.1
	$(VENV)/bin/pip install --quiet mosaicml-cli "importlib-metadata<9" torchmetrics==1.7.4 \
	  torch_optimizer coolname tabulate py-cpuinfo psutil
	LPLN_TEST_COMPOSER=1 $(VENV)/bin/pytest tests/test_composer.py

test-frameworks: $(INSTALLED)
	$(VENV)/bin/pip install --quiet "$$(echo $(VENV)/wheel/*.whl)[frameworks]" $(TORCH)
	LPLN_TEST_FRAMEWORKS=1 $(VENV)/bin/pytest tests/test_report_on_models.py \
	  tests/test_frameworks.py tests/test_lightning.py tests/test_transformers.py \
	  tests/test_distributed.py
	LPLN_TEST_FRAMEWORKS=1 $(VENV)/bin/pytest tests/test_docs.py -k integrations

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The site, in build/site. Strict: a warning, as of a link or a docstring, is an error. The variable
# keeps the theme from printing news of its successor. (With --quiet, --strict sees no warnings.)
docs: $(INSTALLED)
	$(VENV)/bin/pip install --quiet "$$(echo $(VENV)/wheel/*.whl)[docs]" $(TORCH)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --config-file .mkdocs.yml
	LPLN_TEST_SITE=build/site $(VENV)/bin/pytest --quiet tests/test_site.py

# dist holds the wheel and the sdist of a release: their metadata is what an index accepts, they are
# built again to the same bytes, and installed, upgraded and uninstalled in an environment with torch.
dist: $(INSTALLED)
	rm -rf dist
	$(VENV)/bin/pip install --quiet "build>=1.2" "twine>=6"
	$(VENV)/bin/pyproject-build --outdir dist .
	$(VENV)/bin/twine check --strict dist/*
	LPLN_TEST_DIST=dist $(VENV)/bin/pytest tests/test_release.py

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

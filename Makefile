# Everything here needs Python 3.10 or later and nothing else: it creates a virtual environment and
# installs torch and the tools for development in it.
#   TORCH=torch==2.13.0 make test     with that torch, in a virtual environment of its own
PYTHON ?= python3
TORCH ?= torch
VENV := .venv-$(subst =,,$(firstword $(TORCH)))
# The packages of the extra `bench`, numpy and transformers, do not run beside torch 1.
EXTRAS := $(if $(findstring ==1.,$(TORCH)),dev,dev,bench)
# Triton's interpreter runs the kernels' tests. It needs NumPy, which the extra `bench` brings.
TRITON := $(if $(findstring ==1.,$(TORCH)),,"triton; sys_platform == 'linux' and platform_machine == 'x86_64'")
# Files that mark an environment with torch; with the package, too; with the tools, too.
HAS_TORCH := $(VENV)/has-torch
RUNS := $(VENV)/runs
INSTALLED := $(VENV)/installed
DEMO := $(VENV)
EXAMPLE := docs/examples/train.py

.PHONY: help demo test test-triton test-composer test-frameworks lint docs dist clean

# Disk and time were measured with torch 2.13.0 for CPU, on 2 busy cores, without downloading.
help:
	@printf '%s\n' \
	  'make demo             train a small model twice, stock and lowered, and compare;' \
	  '                      count what a GPU would do for BERT and ViT' \
	  '                      installs torch, this package, tqdm, tabulate, transformers: 1 GB, 1 minute' \
	  'make test             the tests, from the built wheel, with the Triton kernels' \
	  '                      installs the tools for development and Triton, too: 2.4 GB in all,' \
	  '                      3 minutes' \
	  'make lint             ruff and mypy, with the same' \
	  'make docs             the site, in build/site: MkDocs, 0.1 GB more' \
	  'make dist             the files of a release, in dist: build and twine, 0.03 GB more' \
	  'make test-triton      compile the kernels with older Tritons: 0.7 GB more' \
	  'make test-composer    with MosaicML Composer' \
	  'make test-frameworks  with transformers, Accelerate, Lightning, timm: 0.1 GB more' \
	  'make clean            remove every environment, build and dist' \
	  '' \
	  'Everything goes into .venv-torch. The newest torch with CUDA takes several GB instead;' \
	  'TORCH=torch==2.13.0 make test takes that torch, in an environment of its own.'

# The same training script twice, without and with LPLN_PRECISION; then the counts of a GPU's training
# step for two real models. The last command prints all figures and a conclusion.
demo: $(RUNS)
	$(DEMO)/bin/pip install --quiet transformers tabulate $(TORCH)
	$(DEMO)/bin/python $(EXAMPLE) --steps 30 > $(DEMO)/stock.tsv
	LPLN_PRECISION=amp $(DEMO)/bin/python $(EXAMPLE) --steps 30 > $(DEMO)/lowered.tsv
	$(DEMO)/bin/python -m lpln_autopatch bench count --models bert-base vit-b16 \
	  --json $(DEMO)/count.json > $(DEMO)/count.txt
	@$(DEMO)/bin/python -m lpln_autopatch.bench.demo $(DEMO)

# pytest's own command does not put the checkout on sys.path, so that it tests the wheel.
test: $(INSTALLED)
	$(VENV)/bin/pytest --numprocesses auto --dist loadgroup --durations 10

# The kernels compile with the Triton of torch 2.6 and of 2.11 too; `test` takes the newest.
test-triton: $(INSTALLED)
	set -e; for triton in 3.2.0 3.6.0; do \
	  rm -rf $(VENV)/triton; \
	  $(VENV)/bin/pip install --no-deps --target $(VENV)/triton triton==$$triton; \
	  PYTHONPATH=$(abspath $(VENV)/triton) $(VENV)/bin/pytest tests/test_fused.py -k compile_for; \
	done

# Composer pins an old torch; without its pins it runs on the newest.
test-composer: $(INSTALLED)
	$(VENV)/bin/pip install torchvision $(TORCH)
	$(VENV)/bin/pip install --no-deps mosaicml==0.32.1
	$(VENV)/bin/pip install mosaicml-cli "importlib-metadata<9" torchmetrics==1.7.4 \
	  torch_optimizer coolname tabulate py-cpuinfo psutil
	LPLN_TEST_COMPOSER=1 $(VENV)/bin/pytest tests/test_composer.py

test-frameworks: $(INSTALLED)
	$(VENV)/bin/pip install "$$(echo $(VENV)/wheel/*.whl)[frameworks]" $(TORCH)
	LPLN_TEST_FRAMEWORKS=1 $(VENV)/bin/pytest tests/test_report_on_models.py \
	  tests/test_frameworks.py tests/test_lightning.py tests/test_transformers.py \
	  tests/test_distributed.py
	LPLN_TEST_FRAMEWORKS=1 $(VENV)/bin/pytest tests/test_docs.py -k integrations

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Strict: a warning, as of a link or a docstring, is an error; with --quiet it would not be. The
# variable keeps the theme from printing news of its successor.
docs: $(INSTALLED)
	$(VENV)/bin/pip install "$$(echo $(VENV)/wheel/*.whl)[docs]" $(TORCH)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --config-file .mkdocs.yml
	LPLN_TEST_SITE=build/site $(VENV)/bin/pytest --quiet tests/test_site.py

# dist holds the wheel and the sdist of a release. Tests check the metadata as an index does, build
# both again to the same bytes, and install, upgrade and uninstall them beside torch.
dist: $(INSTALLED)
	rm -rf dist
	$(VENV)/bin/pip install "build>=1.2" "twine>=6"
	$(VENV)/bin/pyproject-build --outdir dist .
	$(VENV)/bin/twine check --strict dist/*
	LPLN_TEST_DIST=dist $(VENV)/bin/pytest tests/test_release.py

clean:
	rm -rf .venv-* build dist

# The file is made last: an interrupted environment is created from nothing.
$(HAS_TORCH):
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install $(TORCH)
	touch $@

$(RUNS): $(HAS_TORCH) pyproject.toml $(EXAMPLE) $(shell find lpln_autopatch -name '*.py')
	rm -rf $(VENV)/wheel
	$(VENV)/bin/pip wheel --quiet --no-deps --wheel-dir $(VENV)/wheel .
	$(VENV)/bin/pip install "$$(echo $(VENV)/wheel/*.whl)" tqdm $(TORCH)
	$(VENV)/bin/pip install --quiet --force-reinstall --no-deps $(VENV)/wheel/*.whl
	touch $@

$(INSTALLED): $(RUNS)
	$(VENV)/bin/pip install "$$(echo $(VENV)/wheel/*.whl)[$(EXTRAS)]" $(TRITON) $(TORCH)
	touch $@

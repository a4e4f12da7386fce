# make setup   .venv and the package in it     make test   what CI runs
# make demo    setup, then the demo, 5 minutes make ui     the MLflow UI on this repository's runs
# make docs    the documentation as a site, in site/ make screenshots  docs/ui_*.png
# make clean   what can be made again; leaves .venv, demo/ and mlruns/

SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# A stamp a state of what decides the installation (and of the place: scripts in .venv hold its path), so that a second call installs nothing.
STATE := $(firstword $(shell (cat settings.ini constraints.txt setup.py pyproject.toml; echo $(CURDIR)) | cksum))
INSTALLED := $(VENV)/.installed-$(STATE)
DEV := $(VENV)/.installed-dev-$(STATE)
DOCS := $(VENV)/.installed-docs-$(STATE)
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup demo test ui docs screenshots clean
.DEFAULT_GOAL := setup

setup: $(INSTALLED)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python found: install Python 3.11 or newer, or call: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11: call make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment: install its venv and ensurepip" >&2; exit 1; }

$(INSTALLED): | $(BIN)/python
	@echo "Installing into $(VENV): about 3 minutes and 7 GB."
	$(PIP) install -q -c constraints.txt -e '.[all]'
	@rm -f $(VENV)/.installed-*; touch $@

$(DEV): | $(INSTALLED)
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@

$(DOCS): | $(INSTALLED)
	$(PIP) install -q -c constraints.txt -e '.[docs]'
	@touch $@

demo: setup
	$(BIN)/cmr_demo

test: $(DEV)
	@$(BIN)/python tests/run.py

ui: setup
	@$(BIN)/cmr_ui

# the pictures of the user interface in docs/ (chromium, chromium-driver)
screenshots: $(DEV)
	@$(BIN)/python docs/screenshots.py

docs: $(DOCS)
	@$(BIN)/python docs/make_site.py

clean:
	rm -rf build dist site *.egg-info .pytest_cache .hypothesis
	find nbs cmr_diffusion tests -name __pycache__ -prune -exec rm -rf {} +

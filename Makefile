# Everything done twice. `make demo` and `make test` do all their own set-up.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
PROFILE ?= tiny
PORT ?= 3000
VENV := .venv
RUN := $(VENV)/bin/python
export DAGSTER_HOME ?= $(CURDIR)/.dagster
export M2M_PROFILE ?= $(PROFILE)
# modules are compiled when they are first imported, and kept: most of a gigabyte of packages never is
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(RUN) -m pip --disable-pip-version-check install -qq --no-compile --no-deps

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 8

$(VENV)/bin/pip:
	@echo "Making $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say which with make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.lock pyproject.toml | $(VENV)/bin/pip
	@echo "Installing (some 170 packages, 400 MB to download; a few minutes, once)"
	@# torch alone with what it asks for, so that a CUDA build brings its libraries; the rest is all in the lock
	@$(subst --no-deps,,$(INSTALL)) -c requirements.lock setuptools torch
	@$(INSTALL) -r requirements.lock
	@$(INSTALL) --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-dev: requirements-dev.lock $(VENV)/.installed
	@$(INSTALL) -r requirements-dev.lock
	@touch $@

$(VENV)/.installed-services: requirements-services.lock $(VENV)/.installed-dev
	@$(INSTALL) -r requirements-services.lock
	@touch $@

$(DAGSTER_HOME)/dagster.yaml: orchestration/dagster.yaml
	@mkdir -p $(@D)
	@cp $< $@

.PHONY: help install install-dev demo claims test test-services bench lint format ui lock clean

install: $(VENV)/.installed ## what the project needs, into .venv
install-dev: $(VENV)/.installed-dev ## and what its developers need

demo: install $(DAGSTER_HOME)/dagster.yaml ## the whole job with the tiny models: captions to report (PROFILE=...)
	@$(RUN) -W 'ignore:Function `job_execute_command` is superseded' \
	  -m dagster job execute -m orchestration.definitions -j m2m_pipeline
	@echo
	@echo "The report: $$($(RUN) -c 'from m2m.config import load_profile; print(load_profile().outputs)')/report/report.html"

claims: install ## the claims on the shipped tiny weights, measured anew into docs/results (half an hour)
	@for stage in filter-captions generate-sets cache-features "pretrain --variant self" "pretrain --variant dino"; do \
	  $(RUN) -m m2m $$stage --config tiny_claims; done
	@for evaluation in preceding_images consistency rollouts; do \
	  $(VENV)/bin/torchrun --nproc-per-node 2 -m m2m evaluate --variant $$evaluation --config tiny_claims; done
	@$(RUN) -m m2m.tiny results outputs/tiny_claims

test: install-dev ## the tests
	@$(RUN) -m pytest

bench: install ## the promises of speed, memory and exactness, measured (benchmarks/README.md)
	@$(RUN) -m benchmarks

test-services: $(VENV)/.installed-services ## the tests that need services (Slurm, Ray, Postgres, S3, a browser): started on loopback, ended after them
	@trap 'for one in slurm postgres ray; do services/$$one/down.sh || true; done' EXIT; \
	services/slurm/up.sh 2 || test $$? = 77; \
	services/postgres/up.sh || test $$? = 77; \
	PYTHON=$(CURDIR)/$(RUN) services/ray/up.sh || test $$? = 77; \
	$(RUN) -m pytest -m 'services and not slow' -rs

lint: $(VENV)/.installed-services ## style and types, of the launchers that need more too
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(VENV)/bin/pyright --pythonpath $(RUN)

format: install-dev ## let ruff lay the code out
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

ui: install $(DAGSTER_HOME)/dagster.yaml ## Dagster's web server and daemon on loopback (PORT=3000); Ctrl-C stops both
	@echo "Dagster: http://127.0.0.1:$(PORT)"
	@trap 'trap - EXIT INT TERM; kill $$(jobs -p) 2>/dev/null; wait' EXIT INT TERM; \
	$(VENV)/bin/dagster-daemon run -w workspace.yaml & \
	$(RUN) -m dagster_webserver -w workspace.yaml -h 127.0.0.1 -p $(PORT) & \
	wait -n

lock: | $(VENV)/bin/pip ## resolve pyproject.toml's ranges anew and pin them
	@$(RUN) .ci/lock.py

clean: ## outputs, Dagster's home and caches; not .venv
	rm -rf outputs .dagster .pytest_cache .ruff_cache .hypothesis

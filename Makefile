# Everything a person needs, one target each. `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATASET ?= digits
SEEDS ?= 0,1,2,3,4
STORM ?= 50
JOBS ?= 2
FUZZ ?= 2000
PROFILE ?= miniature
METHODS ?= finetune,fixed_sd,guided
PREFECT_PORT ?= 4200
MLFLOW_PORT ?= 5000
LISTEN ?= 127.0.0.1
STAMP := $(VENV)/.installed

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (some minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade-strategy only-if-needed \
	  -c constraints.txt -e '.[dev]'
	@touch $@

.PHONY: install
install: $(STAMP) ## make the virtual environment and install everything, once

.PHONY: data
data: $(STAMP) ## materialise a dataset: make data DATASET=digits (others: FROM=<archive> LISTS=<folder>)
	@$(BIN)/python -m tasks.datasets $(DATASET) --root data/$(DATASET) \
	  $(if $(FROM),--from '$(FROM)') $(if $(LISTS),--lists '$(LISTS)')

.PHONY: demo
demo: data ## run finetune, fixed_sd and guided on digits; print a table and where to look
	@$(BIN)/fscil dataset=digits method=$(METHODS) seed=0
	@$(BIN)/fscil report
	@echo
	@echo "Report and tables:   reports/report.html  reports/table.md"
	@echo "MLflow UI:           make ui   (then open http://127.0.0.1:5000)"
	@echo "Every epoch:         runs/digits/guided/seed-0/session-00/epoch-000/"
	@echo "Draw one again:      $(BIN)/fscil replay runs/digits/guided/seed-0/session-00/epoch-000"

.PHONY: digits-seeds
digits-seeds: data ## the same three methods over five seeds: make digits-seeds SEEDS=0,1,2,3,4
	@$(BIN)/fscil dataset=digits method=$(METHODS) seed=$(SEEDS)
	@$(BIN)/fscil report

.PHONY: report
report: $(STAMP) ## tables, plot data and the report page from runs/ into reports/
	@$(BIN)/fscil report

.PHONY: repro
repro: $(STAMP) ## every table from what changed: dvc repro in the virtual environment
	@PATH="$(abspath $(BIN)):$$PATH" dvc repro

.PHONY: profile
profile: $(STAMP) ## what dvc repro runs: make profile PROFILE=miniature (or paper)
	@$(BIN)/fscil profile $(PROFILE)

.PHONY: study
study: $(STAMP) ## measure what the method does on the runs in runs/; reports/study.md and plots
	@$(BIN)/fscil study

.PHONY: ui
ui: $(STAMP) ## the MLflow UI on http://127.0.0.1:5000: make ui MLFLOW_PORT=5001
	@DO_NOT_TRACK=true MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow server --backend-store-uri sqlite:///mlflow.db \
	  --host 127.0.0.1 --port $(MLFLOW_PORT) --workers 1

.PHONY: up
up: $(STAMP) ## Prefect server, worker and MLflow UI on 127.0.0.1, deployments registered: make up PREFECT_PORT=4200 LISTEN=<address>
	@$(BIN)/python -m flows up --prefect-port $(PREFECT_PORT) --mlflow-port $(MLFLOW_PORT) --host $(LISTEN)

.PHONY: down
down: $(STAMP) ## end what `make up` started
	@$(BIN)/python -m flows down

.PHONY: test
test: data ## the test suite, in JOBS processes of one thread
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: test-slow
test-slow: data ## the tests that take minutes
	@$(BIN)/python -m pytest -m slow

.PHONY: bench
bench: data ## speed and memory against what people use today, into reports/bench.md
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@$(BIN)/python -m tests.benchmarks

.PHONY: storm
storm: data ## kill runs at every kind of moment, start many at once, and compare what they end with: make storm STORM=50
	@$(BIN)/python -m tests.storm --runs $(STORM)
	@$(BIN)/python -m tests.crowd

.PHONY: fuzz
fuzz: data ## look long for input that breaks a parser or a promise: make fuzz FUZZ=2000 (examples of each kind)
	@FUZZ=$(FUZZ) $(BIN)/python -m pytest tests/properties --timeout 86400

.PHONY: check
check: $(STAMP) ## ruff, the type checker and the import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

.PHONY: audit
audit: ## compare the pinned dependencies with published advisories (needs the network; not part of check)
	@test -x .audit/bin/pip-audit || { $(PYTHON) -m venv .audit && .audit/bin/python -m pip install --quiet pip-audit; }
	@.audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

.PHONY: pretrain
pretrain: $(STAMP) ## train the miniature's weights again (about four hours of one core)
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[pretrain]'
	@$(BIN)/python -m tasks.miniature.pretrain

.PHONY: clean
clean: ## remove results, reports and the resumable state
	rm -rf runs reports .fscil mlflow.db mlartifacts

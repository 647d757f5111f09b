# Two commands do all the set-up: `make reproduce` and `make test`. The rest is listed by `make help`.
PRESET ?= smoke
ONLY ?=
SEED ?= 0
SET ?=
FLAGS ?=
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

RUN := $(BIN)/python -m paperlib.reproduce --preset $(PRESET) --seed $(SEED) \
	$(foreach name,$(ONLY),--only $(name)) $(foreach pair,$(SET),--set $(pair)) $(FLAGS)

.PHONY: help install reproduce claims report test test-slow browser-test lint format notebooks lab

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed ## make .venv and install the exact pins

$(VENV)/.installed: requirements.txt pyproject.toml
	@echo "installing into $(VENV): 1.6 GB, a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar off -r requirements.txt
	touch $@

reproduce: install ## run every notebook: PRESET=cpu ONLY=02 SEED=1 SET="steps=500" FLAGS=--fresh
	@$(RUN)

claims: install ## list all claims, failed ones first, and compute their numbers again from the recorded arrays
	@$(BIN)/python -m paperlib.report claims

report: install ## one page of everything recorded, that needs no network: report/index.html
	@$(BIN)/python -m paperlib.report

test: install lint ## lint, unit tests, every notebook cell against its committed output, and all of them training
	$(BIN)/python -m pytest -q -m "not slow and not browser" tests
	$(BIN)/python -m pytest -q --nbval notebooks
	rm -rf build && mkdir build
	for notebook in notebooks/[0-9]*.ipynb; do \
		$(BIN)/papermill --prepare-only --log-level ERROR -p preset smoke $$notebook build/$${notebook##*/}; done
	$(BIN)/python -m pytest -q --nbval-lax build

test-slow: install ## the tests that take longer
	$(BIN)/python -m pytest -q -m slow tests

browser-test: install ## the report and the notebooks in JupyterLab, in chromium (Debian: apt-get install chromium)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar off -r requirements-browser.txt
	$(BIN)/python -m pytest -q -m browser tests

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: install ## run the committed notebooks in place, as they are to be committed
	$(BIN)/python -m paperlib.report tables
	runs=$$(mktemp -d) && PAPERLIB_RUNS=$$runs TQDM_DISABLE=1 $(BIN)/jupyter nbconvert --log-level=ERROR \
		--ExecutePreprocessor.extra_arguments=--IPKernelApp.log_level=50 \
		--to notebook --execute --inplace notebooks/[0-9]*.ipynb && rm -r $$runs
	$(BIN)/nbstripout --keep-output --keep-count notebooks/[0-9]*.ipynb \
		--extra-keys "cell.metadata.execution cell.metadata.papermill metadata.papermill metadata.language_info.version"

lab: install ## open JupyterLab
	$(BIN)/jupyter lab --notebook-dir .

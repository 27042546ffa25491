# Both README commands work alone on a fresh clone: each installs what it needs into .venv first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
WORKERS ?= 2

.PHONY: quickstart test lint clean

quickstart: $(VENV)/.installed-quickstart
	$(BIN)/python -m aligngpt_playground quickstart --output runs/quickstart

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# torch first and by exact version: a looser pin lets pip take a build with gigabytes of CUDA where it is not wanted
$(VENV)/.installed-quickstart: pyproject.toml constraints.txt $(VENV)/bin/python
	$(BIN)/python -m pip install --progress-bar off -c constraints.txt torch
	$(BIN)/python -m pip install --progress-bar off -c constraints.txt -e ".[train,playground]"
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt $(VENV)/bin/python
	$(BIN)/python -m pip install --progress-bar off -c constraints.txt torch
	$(BIN)/python -m pip install --progress-bar off -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs

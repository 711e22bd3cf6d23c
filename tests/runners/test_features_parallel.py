"""Tensor and data parallel: with Gumiho, the same tokens as with speculation off.  Runner V1."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import predictable
import pytest
from engines import CORES, assert_same, generate, greedy, gumiho, pair, run, step, tokens
from places import PROCESSES
from release import MEMORY_NODES

pytestmark = pytest.mark.engine
PROMPTS = ["The quick brown", "12 ", "abc", "{}[]!"]
# Two workers, one core each.
STEPS = {"plain": generate(PROMPTS, greedy()), "again": generate(PROMPTS, greedy(40, repetition_penalty=1.3))}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    return predictable.write_target(folder / "target"), predictable.write_checkpoint(folder / "gumiho")


@pytest.fixture(scope="module")
def off(tmp_path_factory, models):
    refused = pair(*models, {}, "data parallel", data_parallel_size=2)
    return run(tmp_path_factory.mktemp("off"), {"off": pair(*models, STEPS)["off"]} | refused)


@pytest.mark.feature("tensor parallel", "V1")
def test_tensor_parallel(tmp_path, models, off):
    """Two workers: the serial layers are split over them; the heads run whole on each, or are shared out."""
    case = pair(*models, STEPS, tensor_parallel_size=2)["on"]
    accepted = {}
    for split in ("0", "1"):
        folder = tmp_path / split
        folder.mkdir()
        results = off | run(folder, {"on": case}, env=CORES | {"VLLM_GUMIHO_SPLIT_HEADS": split})
        accepted[split] = [assert_same(results, name)["counts"]["accepted"] for name in STEPS]
        assert results["on"]["facts"]["draft_tensor_parallel_size"] == 2
        for rank in (0, 1):
            assert f"(Worker_TP{rank}" in results["on"]["log"]
        assert ("heads shared by 2 ranks" in results["on"]["log"]) == (split == "1")
    assert accepted["0"] == accepted["1"]


@pytest.mark.feature("tensor parallel", "V1")
def test_draft_tensor_parallel_size_1(tmp_path, models, off):
    case = pair(*models, STEPS, tensor_parallel_size=2, speculative={"draft_tensor_parallel_size": 1})["on"]
    results = off | run(tmp_path, {"on": case}, env=CORES)
    for name in STEPS:
        assert_same(results, name)
    assert results["on"]["facts"]["draft_tensor_parallel_size"] == 1


@pytest.mark.feature("data parallel", "V1")
def test_data_parallel(tmp_path, models, off):
    """Two engines behind one AsyncLLM: both draft."""
    target, checkpoint = models
    job, result = tmp_path / "job.json", tmp_path / "result.json"
    settings = {"model": str(target), "data_parallel_size": 2, "speculative_config": gumiho(checkpoint)}
    prompts = [predictable.encode(text) for text in PROMPTS]
    job.write_text(json.dumps({"llm": settings, "prompts": prompts, "max_tokens": 24}))
    done = subprocess.run(
        [sys.executable, str(PROCESSES / "data_parallel_main.py"), str(job), str(result)],
        env=os.environ | (MEMORY_NODES or CORES),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.exists(), (done.stdout + done.stderr)[-4000:]
    answer = json.loads(result.read_text())
    assert answer["tokens"] == [ids[0] for ids in tokens(step(off, "off", "plain"))]
    assert sorted(answer["accepted"]) == ["0", "1"]
    assert all(count > 0 for count in answer["accepted"].values())


@pytest.mark.feature("data parallel", "V1")
def test_data_parallel_in_one_process_is_refused_as_without_gumiho(off):
    refused = "LLM(data_parallel_size=2) is not supported for single-process usage"
    assert refused in off["data parallel on"]["error"]
    assert off["data parallel on"]["error"] == off["data parallel off"]["error"]

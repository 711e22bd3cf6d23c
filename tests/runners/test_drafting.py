"""Greedy output with Gumiho equals the target's own, in both model runners."""

from __future__ import annotations

import pytest
import tiny
from engines import GREEDY, UNEQUAL_PROMPTS, case, run_engines

pytestmark = pytest.mark.engine
LENGTHS = (1, 2, 3, 7)
SCHEDULE = [[1, 2, 7], [3, 4, 3], [5, 8, 1]]


@pytest.fixture(scope="module", params=["v1", "v2"])
def results(request, tmp_path_factory, tiny_target, tiny_checkpoint):
    def gumiho(**more) -> dict:
        return {"method": "gumiho", "model": str(tiny_checkpoint), **more}

    cases = {"off": case(tiny_target)}
    for length in LENGTHS:
        cases[f"k{length}"] = case(tiny_target, gumiho(num_speculative_tokens=length))
    cases["schedule"] = case(tiny_target, gumiho(num_speculative_tokens_per_batch_size=SCHEDULE))
    cases["probabilistic"] = case(tiny_target, gumiho(draft_sample_method="probabilistic"))
    cases["small budget"] = case(tiny_target, gumiho(), max_num_batched_tokens=32, max_num_seqs=3)
    return run_engines(tmp_path_factory.mktemp(request.param), request.param, cases) | {"runner": request.param}


@pytest.mark.feature("greedy requests: continuous batching, every K, K by batch size", "V1")
@pytest.mark.feature("greedy requests: continuous batching, every K, K by batch size", "V2")
@pytest.mark.parametrize("name", [*(f"k{k}" for k in LENGTHS), "schedule", "probabilistic", "small budget"])
def test_greedy_output_is_the_targets_own(results, name):
    assert results["off"]["tokens"][0] == results[name]["tokens"][0]
    assert [len(out[0]) for out in results[name]["tokens"][0]] == [GREEDY["max_tokens"]] * len(UNEQUAL_PROMPTS)


def test_the_runner_asked_for_ran_with_the_gumiho_drafter(results):
    drafter = {"v1": "GumihoProposer", "v2": "GumihoSpeculator"}[results["runner"]]
    assert results["k7"]["runner"] == results["runner"]
    assert results["k7"]["drafter"] == drafter
    assert f"model runner {results['runner'].upper()}" in results["k7"]["log"]


@pytest.mark.parametrize("length", LENGTHS)
def test_every_step_drafts_k_tokens(results, length):
    result = results[f"k{length}"]
    assert result["k"] == length
    assert len(result["accepted"]) == length
    assert result["drafted"] == length * result["drafts"]
    assert result["accepted"][0] > 0


def test_a_schedule_drafts_fewer_tokens_in_larger_batches(results):
    result = results["schedule"]
    assert result["k"] == 7
    assert result["drafts"] < result["drafted"] < 7 * result["drafts"]


# Runner V1 with breakable CUDA graphs, under which the model keeps a copy of its o vectors.
KERNEL_ENGINES = {"v1": {"TRITON_INTERPRET": "1", "VLLM_USE_BREAKABLE_CUDAGRAPH": "1"}, "v2": {}}


@pytest.mark.parametrize("runner", [pytest.param("v1", marks=pytest.mark.long), "v2"])
def test_the_triton_kernels_in_the_engine_keep_the_text(tmp_path, tiny_target, tiny_checkpoint, runner):
    """Under the interpreter: heads in one launch per stage, the argmax without logits, both checked at the start."""
    calls = [{"prompts": UNEQUAL_PROMPTS[:2], "sampling": GREEDY | {"max_tokens": 8}}]
    gumiho = {"method": "gumiho", "model": str(tiny_checkpoint)}
    cases = {"off": case(tiny_target, None, calls), "on": case(tiny_target, gumiho, calls)}
    results = run_engines(tmp_path, runner, cases, {"VLLM_GUMIHO_KERNELS": "1", **KERNEL_ENGINES[runner]})
    assert results["on"]["tokens"] == results["off"]["tokens"]
    assert results["on"]["launches"] == {"heads": ["one Triton launch per stage"], "argmax": ["triton"]}
    assert results["on"]["drafted"] == 7 * results["on"]["drafts"]
    assert results["on"]["accepted"][0] > 0
    assert "heads by one Triton launch per stage" in results["on"]["log"]
    assert "argmax by Triton kernel (checked)" in results["on"]["log"]


def test_any_number_of_serial_steps_in_runner_v1(tmp_path, tiny_target):
    """The heads read the o vectors from the passes' outputs, or, with breakable CUDA graphs, from copies: the same."""
    cases = {"off": case(tiny_target)}
    for steps in (1, 3):
        tensors = tiny.drafter_tensors(num_serial_steps=steps, num_heads=2)
        checkpoint = tiny.write_released(tmp_path / f"steps{steps}", tensors)
        cases[f"s{steps}"] = case(tiny_target, {"method": "gumiho", "model": str(checkpoint)})
    results = {}
    for breakable in ("0", "1"):
        folder = tmp_path / breakable
        folder.mkdir()
        results[breakable] = run_engines(folder, "v1", cases, {"VLLM_USE_BREAKABLE_CUDAGRAPH": breakable})
    for steps in (1, 3):
        one, other = (results[breakable][f"s{steps}"] for breakable in ("0", "1"))
        assert one["tokens"] == other["tokens"] == results["0"]["off"]["tokens"]
        assert one["k"] == steps + 2
        assert one["drafted"] == one["k"] * one["drafts"]
        assert one["accepted"][0] > 0
        assert one["accepted"] == other["accepted"]

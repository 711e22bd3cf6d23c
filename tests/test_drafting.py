"""Greedy output with Gumiho equals the target's own, in both model runners."""

from __future__ import annotations

import pytest
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


def test_the_triton_kernels_in_the_engine_keep_the_text(tmp_path, tiny_target, tiny_checkpoint):
    """Runner V2 under the interpreter: the heads in one launch per stage, the argmax without logits."""
    calls = [{"prompts": UNEQUAL_PROMPTS[:2], "sampling": GREEDY | {"max_tokens": 8}}]
    gumiho = {"method": "gumiho", "model": str(tiny_checkpoint)}
    cases = {"off": case(tiny_target, None, calls), "on": case(tiny_target, gumiho, calls)}
    results = run_engines(tmp_path, "v2", cases, {"VLLM_GUMIHO_KERNELS": "1"})
    assert results["on"]["tokens"] == results["off"]["tokens"]
    assert results["on"]["launches"] == {"heads": ["one Triton launch per stage"], "argmax": ["triton"]}
    assert "heads by one Triton launch per stage" in results["on"]["log"]

"""Operators that write in place, as a GPU's do, change no draft: a wrong one would cost acceptance, never the text."""

from __future__ import annotations

import pytest
from engines import generate, greedy, pair, run, step, tokens

pytestmark = pytest.mark.engine
PROMPTS = [[3 + (i * 7 + j * 5) % 150 for j in range(5 + i * 6)] for i in range(3)]
LENGTHS = (1, 3, 7)
AT_ONCE = 6


@pytest.fixture(scope="module", params=["v1", "v2"])
def results(request, tmp_path_factory, tiny_target, tiny_checkpoint):
    steps = {"all": generate(PROMPTS, greedy(12, detokenize=False))}
    if request.param == "v1":  # V2's profile run is not for Triton's interpreter
        steps = {"profile": {"do": "profile"}} | steps
    cases = {}
    for length in LENGTHS:
        speculative = {"num_speculative_tokens": length}
        settings = {"speculative": speculative, "skip_tokenizer_init": True, "max_num_seqs": AT_ONCE}
        cases[f"plain {length}"] = pair(tiny_target, tiny_checkpoint, steps, **settings)["on"] | {"record": True}
    # The operators stay in place for all cases after the first that asks for them.
    cases |= {f"gpu-like {length}": cases[f"plain {length}"] for length in LENGTHS}
    cases[f"gpu-like {LENGTHS[0]}"] = cases[f"gpu-like {LENGTHS[0]}"] | {"plant": "gpu-like"}
    found = run(tmp_path_factory.mktemp("gpu-like"), cases, request.param)
    assert step(found, "plain 1", "all")
    assert found["plain 1"]["facts"]["runner"] == request.param
    return found


@pytest.mark.parametrize("length", LENGTHS)
def test_drafts_are_those_of_functional_operators(results, length):
    plain, like = f"plain {length}", f"gpu-like {length}"
    assert tokens(step(results, like, "all")) == tokens(step(results, plain, "all"))
    assert results[plain]["facts"]["gpu-like"] == {"fused norms": 0, "embeddings": 0}
    assert min(results[like]["facts"]["gpu-like"].values()) > 0
    assert all(len(drafted) == length for _, drafted in results[plain]["drafts"])
    assert len({tuple(drafted) for _, drafted in results[plain]["drafts"]}) > 3, "drafts hardly differ"
    assert results[like]["drafts"] == results[plain]["drafts"]


def test_sleep_keeps_every_tensor_of_the_draft_model(results):
    """vLLM's sleep (level 2) keeps buffers and loads parameters anew; the last pass's o vectors are made anew too."""
    for length in LENGTHS:
        assert results[f"plain {length}"]["facts"]["loose tensors"] == ["_fused"]


def test_a_gpus_profile_run_has_the_heads_of_the_largest_batch(results):
    """vLLM measures its memory by it."""
    if results["plain 1"]["facts"]["runner"] == "v2":
        pytest.skip("V2's profile run, which drafts by the function that serves, is not for Triton's interpreter")
    assert len(PROMPTS) < AT_ONCE
    assert all("error" not in step(results, f"gpu-like {length}", "profile") for length in LENGTHS)
    assert [results[f"gpu-like {length}"]["facts"]["most heads"] for length in LENGTHS] == [0, AT_ONCE, AT_ONCE]

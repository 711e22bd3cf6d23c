"""What a user may ask of vLLM 0.33 alone, and no default does: FLy, and a quantised copy of the LM head for drafts."""

from __future__ import annotations

import pytest
from engines import UNEQUAL_PROMPTS, case, greedy, gumiho, run_engines
from release import NEXT

pytestmark = [
    pytest.mark.engine,
    pytest.mark.next_release,
    pytest.mark.skipif(not NEXT, reason="options of vLLM 0.33"),
]
CALLS = [{"prompts": UNEQUAL_PROMPTS[:2], "sampling": greedy(8)}]
# FLy lets a rejected draft pass where the target's own choice has at least this entropy: none has.
STRICT = {"rejection_sample_method": "fly", "fly_entropy_threshold": 1e9}
QUANTISED = {"draft_lm_head_quantization": "fp8"}


@pytest.fixture(scope="module")
def results(tmp_path_factory, tiny_target, tiny_checkpoint):
    asked = {"off": None, "on": {}, "fly": STRICT}
    cases = {
        name: case(tiny_target, None if more is None else gumiho(tiny_checkpoint, **more), CALLS)
        for name, more in asked.items()
    }
    cases["quantised"] = case(tiny_target, gumiho(tiny_checkpoint, **QUANTISED), CALLS, dtype="bfloat16")
    return run_engines(tmp_path_factory.mktemp("v2"), "v2", cases)


def test_drafts_are_checked_by_fly(results):
    """In runner V2; vLLM refuses it in V1 on a CPU."""
    assert results["fly"]["tokens"] == results["on"]["tokens"] == results["off"]["tokens"]
    for name in ("drafts", "drafted", "accepted"):
        assert results["fly"][name] == results["on"][name]
    assert results["on"]["drafted"] == 7 * results["on"]["drafts"] > 0


def test_drafts_by_a_quantised_copy_of_the_lm_head(results):
    """vLLM makes it of a 16-bit LM head; the argmax kernel takes plain rows only."""
    found = results["quantised"]
    assert found["drafter"] == "GumihoSpeculator"
    assert found["drafted"] == 7 * found["drafts"] > 0
    assert "Quantized a fp8 copy of the lm_head" in found["log"]
    assert "argmax by logits" in found["log"]

"""What runner V2 keeps by request beside its drafts: confidences of adaptive verification, contexts of a watermark.

`engines.run` holds both to the equations and to the text, request by request.
"""

from __future__ import annotations

import predictable
import pytest
from engines import generate, greedy, pair, run, step, tokens
from predictable import encode

pytestmark = pytest.mark.engine
EASY = [encode(text) for text in ("ABCDEFGH", "01234567", "KLMNOPQR")]
HARD = [encode(text) for text in ("q{Z!", "x~3Y", "?w0-")]
BATCH = {"batch": generate([*EASY, *HARD], greedy(16))}
SAMPLED = {"sampled": generate([*EASY, *HARD], greedy(10, temperature=1.0))}
WATERMARK = {"algorithm": "dual_key_gumbel", "key": 42}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("requests")
    models = predictable.write_target(folder / "target"), predictable.write_checkpoint(folder / "gumiho")
    fixed = pair(*models, BATCH)
    cases = {"off": fixed["off"], "fixed": fixed["on"] | {"plant": "gpu-like"}}
    adaptive = {"speculative": {"enable_adaptive_verification": True}}
    cases["adaptive"] = pair(*models, BATCH, **adaptive)["on"] | {"plant": "adaptive"}
    drawn = {"speculative": {"draft_sample_method": "probabilistic"}, "watermark_config": WATERMARK}
    cases["watermark"] = pair(*models, BATCH | SAMPLED, **drawn)["on"]
    return run(folder, cases, "v2")


@pytest.mark.feature("adaptive verification", "V2")
def test_adaptive_verification_checks_fewer_drafts_that_fail(results):
    fixed, adaptive = step(results, "fixed", "batch"), step(results, "adaptive", "batch")
    assert tokens(adaptive) == tokens(fixed) == tokens(step(results, "off", "batch"))
    verified = results["adaptive"]["facts"]["verification"]
    assert 0 < verified["verified"] < verified["scheduled"]
    rejected = verified["verified"] - adaptive["counts"]["accepted"]
    assert rejected < (fixed["counts"]["drafted"] - fixed["counts"]["accepted"]) / 2
    assert adaptive["counts"]["accepted"] > fixed["counts"]["accepted"] / 3


@pytest.mark.feature("watermarked drafts", "V2")
def test_watermarked_drafts_go_on_from_their_own_request(results):
    assert tokens(step(results, "watermark", "batch")) == tokens(step(results, "off", "batch"))
    assert step(results, "watermark", "sampled")["counts"]["accepted"] > 0
    assert results["watermark"]["facts"]["drafts"]["compared"] > 200

"""Sampled output has the target's exact distribution: a G-test of the first tokens together.

The first token comes from the prompt, the next ones from drafts: by the two serial steps and the first head.  Runner
V2 is slow under Triton's interpreter: it gets fewer draws, in the long form alone.
"""

from __future__ import annotations

import predictable
import pytest
from distribution import JOINT, LENGTH, LIMIT, SETTINGS, VOCAB, drawn_tokens, exact, g_test, joint, steps
from engines import pair, run, step
from torch import Tensor

pytestmark = pytest.mark.engine
METHODS = ("greedy", "probabilistic")
V2_METHODS = {method: {"draft_sample_method": method} for method in METHODS}
V2_METHODS["sample and walk"] = {"seeded_text": "same"}
V2_METHODS |= {f"moa {method}": {"method": "moa", "draft_sample_method": method} for method in METHODS}
# By how many draws noise that is used twice is seen: what it does to a pair grows with the draws.
V2_DRAWS = dict.fromkeys(V2_METHODS, 800) | {"sample and walk": 1_600}
# By how much each is to be told: noise that is used twice leaves each token's own distribution right.
WALK_FAULTS = {"walks too far": 2 * LIMIT, "repeats noise": 1.2 * LIMIT}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Each token leaves several likely ones: a draft is right about every other time."""
    return predictable.write_target(tmp_path_factory.mktemp("sampled") / "target", VOCAB, noise=0.15, sharpness=0.3)


@pytest.fixture(scope="module", params=[5_000, pytest.param(20_000, marks=pytest.mark.long)])
def draws(request):
    """How many sequences are drawn of each setting and method."""
    return request.param


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, target, draws):
    folder = tmp_path_factory.mktemp("draws")
    checkpoint = predictable.write_checkpoint(folder / "gumiho", VOCAB)
    settings = {"max_num_seqs": 250, "seed": 17, "max_num_batched_tokens": 4096}
    cases = {}
    for method in METHODS:
        speculative = {"num_speculative_tokens": 3, "draft_sample_method": method}
        cases[method] = pair(target, checkpoint, steps(tuple(SETTINGS), draws), speculative=speculative, **settings)[
            "on"
        ]
        moa = {"method": "moa", "model": str(predictable.write_moa(folder / "moa", VOCAB, noise=0.2))}
        cases[f"moa {method}"] = pair(
            target, checkpoint, steps(("T=1", "top-p"), draws), speculative=speculative | moa, **settings
        )["on"]
    # Last: what is planted stays in the process.
    for method in METHODS:
        planted = {"llm": cases[method]["llm"], "steps": steps(("T=1",), draws), "plant": "accepts too often"}
        cases[f"wrong {method}"] = planted
    return run(folder, cases)


@pytest.fixture(scope="module", params=V2_METHODS)
def drawn_by_v2(tmp_path_factory, target, request):
    folder = tmp_path_factory.mktemp("v2")
    checkpoint = predictable.write_checkpoint(folder / "gumiho", VOCAB)
    speculative = {"num_speculative_tokens": 3} | V2_METHODS[request.param]
    if speculative.get("method") == "moa":
        speculative["model"] = str(predictable.write_moa(folder / "moa", VOCAB, noise=0.2))
    settings = {"max_num_seqs": 100, "seed": 17, "max_num_batched_tokens": 4096, "speculative": speculative}
    draws = V2_DRAWS[request.param]
    cases = pair(target, checkpoint, steps(("T=1",), draws), **settings)
    cases = {"on": cases["on"]}
    if request.param == "sample and walk":
        cases |= {fault: cases["on"] | {"plant": fault} for fault in WALK_FAULTS}
    return run(folder, cases, runner="v2"), draws


@pytest.mark.feature("sampling: temperature, top-p, top-k; greedy and probabilistic drafts", "V1")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SETTINGS)
def test_sampled_tokens_have_the_targets_joint_distribution(drawn, target, draws, method, name):
    counts = step(drawn, method, name)["counts"]
    assert 0.1 < counts["accepted"] / counts["drafted"] < 0.9
    probs, tokens = exact(target, **SETTINGS[name]), drawn_tokens(drawn, method, name)
    assert len(tokens) == draws
    assert g_test(joint(tokens, 0, JOINT), probs.sum(-1).flatten()) < LIMIT
    # The last two positions: the second serial step and the first head.
    assert g_test(joint(tokens, LENGTH - 2, LENGTH), probs.sum((0, 1)).flatten()) < LIMIT


@pytest.mark.feature("sampling: temperature, top-p, top-k; greedy and probabilistic drafts", "V1", "moa")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["T=1", "top-p"])
def test_tokens_drafted_by_moa_have_the_targets_joint_distribution(drawn, target, method, name):
    counts = step(drawn, f"moa {method}", name)["counts"]
    assert 0.1 < counts["accepted"] / counts["drafted"] < 0.9
    probs, tokens = exact(target, **SETTINGS[name]), drawn_tokens(drawn, f"moa {method}", name)
    assert g_test(joint(tokens, 0, JOINT), probs.sum(-1).flatten()) < LIMIT
    assert g_test(joint(tokens, LENGTH - 2, LENGTH), probs.sum((0, 1)).flatten()) < LIMIT


@pytest.mark.long
def test_sampled_tokens_of_v2_have_the_targets_joint_distribution(drawn_by_v2, target, request):
    found, draws = drawn_by_v2
    moa = request.node.callspec.params["drawn_by_v2"].startswith("moa")
    drafter = "Eagle3MoaForCausalLM" if moa else "EagleGumihoForCausalLM"
    assert (found["on"]["facts"]["runner"], found["on"]["facts"]["draft"]) == ("v2", [drafter])
    counts = step(found, "on", "T=1")["counts"]
    assert 0.1 < counts["accepted"] / counts["drafted"] < 0.9
    tokens = drawn_tokens(found, "on", "T=1")
    assert len(tokens) == draws
    assert max(of_neighbours(tokens, exact(target))) < LIMIT
    assert of_neighbours(tokens, exact(target, temperature=0.7))[0] > LIMIT, "too few draws to see a wrong temperature"
    for fault in found.keys() - {"on"}:
        pairs = of_neighbours(drawn_tokens(found, fault, "T=1"), exact(target))
        assert max(pairs) > WALK_FAULTS[fault], (fault, pairs)


def of_neighbours(tokens: Tensor, probs: Tensor) -> list[float]:
    """The G-test of each pair of tokens that follow one another: few draws tell no more than pairs apart."""
    rest = [[d for d in range(LENGTH) if d not in (i, i + 1)] for i in range(LENGTH - 1)]
    return [g_test(joint(tokens, i, i + 2), probs.sum(rest[i]).flatten()) for i in range(LENGTH - 1)]


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_wrong_sampler_is_caught(drawn, target, method):
    """Drafts accepted with their probability over 0.75."""
    counts = joint(drawn_tokens(drawn, f"wrong {method}", "T=1"), 0, JOINT)
    assert g_test(counts, exact(target).sum(-1).flatten()) > 2 * LIMIT


@pytest.mark.parametrize("method", METHODS)
def test_draws_at_another_temperature_are_caught(drawn, target, method):
    counts = joint(drawn_tokens(drawn, method, "T=0.7"), 0, JOINT)
    assert g_test(counts, exact(target).sum(-1).flatten()) > 2 * LIMIT

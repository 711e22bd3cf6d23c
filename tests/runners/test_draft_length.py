"""Drafts that end where another token is not worth verifying: which tokens are sent, and that texts stay the target's.

Engines are those of runner V1.  `engines.run` holds what is sent of each draft to the equations.
"""

from __future__ import annotations

import itertools

import numpy as np
import predictable
import pytest
import torch
from distribution import JOINT, LENGTH, LIMIT, SETTINGS, VOCAB, drawn_tokens, exact, g_test, joint, steps
from engines import assert_same, assert_same_beginnings, generate, greedy, pair, run, step
from hypothesis import given
from hypothesis import strategies as st
from predictable import encode

from vllm_gumiho.drafters import PER_REQUEST
from vllm_gumiho.errors import CheckpointError
from vllm_gumiho.request.per_request import ON_CPU, row_cost
from vllm_gumiho.runners.draft_length import chances_of_drawn, chances_of_greedy, lengths

chance = st.floats(0, 1, allow_nan=False)
drafts = st.tuples(st.integers(1, 4), st.integers(1, 4)).flatmap(
    lambda size: st.lists(chance, min_size=size[0] * size[1], max_size=size[0] * size[1]).map(
        lambda values: np.array(values).reshape(size)
    )
)
costs = st.floats(1e-3, 2)


def speed(chances: np.ndarray, sent: tuple[int, ...], row_cost: float) -> float:
    """Expected tokens by time where ``sent`` tokens of each draft are verified."""
    reached = chances.cumprod(axis=1)
    tokens = len(chances) + sum(reached[i, :count].sum() for i, count in enumerate(sent))
    return tokens / (1 + row_cost * (len(chances) + sum(sent)))


@given(drafts, costs)
def test_no_other_lengths_are_expected_to_be_faster(chances, row_cost):
    found = tuple(lengths(chances, row_cost))
    every = itertools.product(range(chances.shape[1] + 1), repeat=len(chances))
    best = max(speed(chances, sent, row_cost) for sent in every)
    assert speed(chances, found, row_cost) == pytest.approx(best)


@given(drafts, costs, st.data())
def test_no_token_decides_whether_it_is_sent_itself(chances, row_cost, data):
    """What is drafted after a token, and how likely that is, hangs on the token: none of it may reach back."""
    request, position = (data.draw(st.integers(0, size - 1)) for size in chances.shape)
    other = chances.copy()
    other[request, position + 1 :] = data.draw(chance)
    before, after = (lengths(some, row_cost)[request] > position for some in (chances, other))
    assert before == after


@pytest.mark.parametrize(
    ("chances", "cost", "expected"),
    [
        ([[0.9, 0.9, 0.9]], 0.01, [3]),
        ([[0.9, 0.1, 1.0]], 0.1, [1]),
        ([[0.05, 1.0, 1.0]], 0.2, [0]),
        ([[1.0, 1.0], [0.01, 1.0]], 0.1, [2, 0]),
        ([[0.0, 0.0]], 1e-9, [0]),
        ([[0.5, 0.5], [0.5, 0.5]], 1e-9, [2, 2]),
    ],
)
def test_what_is_sent(chances, cost, expected):
    assert lengths(np.array(chances), cost) == expected


def test_chances():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, -torch.inf, 3.0]])
    tokens, found = chances_of_greedy(logits)
    assert tokens.tolist() == [1, 0]
    torch.testing.assert_close(found, logits.softmax(-1).amax(-1))
    probs = torch.tensor([[0.2, 0.7, 0.1]]).repeat(3, 1)
    greedy_rows = torch.tensor([True, False, False])
    found = chances_of_drawn(probs, torch.tensor([1, 1, 0]), greedy_rows)
    torch.testing.assert_close(found, torch.tensor([0.7, 0.54, 0.54]), msg="a drawn token has a say in its chance")


def test_what_the_key_takes():
    assert row_cost(None) is None
    assert row_cost("confident") == ON_CPU
    assert row_cost(1) == 1.0
    for wrong in (0, -1, True, "always", float("inf"), [0.1]):
        with pytest.raises(CheckpointError, match=rf'{PER_REQUEST} is .*expected "confident", or a number above 0'):
            row_cost(wrong)


EASY = [encode(text) for text in ("ABCDEFGH", "01234567", "KLMNOPQR")]
HARD = [encode(text) for text in ("q{Z!", "x~3Y", "?w0-")]
STEPS = {
    "easy": generate(EASY, greedy(24)),
    "hard": generate(HARD, greedy(24)),
    "together": generate([*EASY, *HARD], greedy(24)),
    "long prompts": generate([text * 12 for text in EASY], greedy(12)),
    "traffic": {
        "do": "traffic",
        "prompts": [*EASY, *HARD],
        "sampling": greedy(20),
        "join": [0, 0, 3, 5, 6, 12],
        "abort": [None, 6, None, 3, 1, None],
    },
    "penalties": generate([*EASY, *HARD], greedy(12, repetition_penalty=1.3, min_tokens=4)),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lengths")
    models = predictable.write_target(folder / "target"), predictable.write_checkpoint(folder / "gumiho")
    settings = {"max_num_batched_tokens": 48, "max_num_seqs": 4}
    cases = pair(*models, STEPS, speculative={PER_REQUEST: 0.3}, **settings)
    cases["whole"] = pair(*models, STEPS, **settings)["on"]
    schedule = {PER_REQUEST: "confident", "num_speculative_tokens_per_batch_size": [[1, 2, 7], [3, 3, 1], [4, 8, 0]]}
    cases["schedule"] = pair(*models, STEPS, speculative=schedule, **settings)["on"]
    # Last: from here on the process takes async_scheduling as asked for.
    asked = {"speculative": {PER_REQUEST: 0.3}, "async_scheduling": True}
    cases["async"] = pair(*models, {"easy": STEPS["easy"]}, **settings, **asked)["on"]
    return run(folder, cases)


@pytest.mark.feature("draft length by request", "V1")
@pytest.mark.parametrize("name", ["easy", "hard", "together", "long prompts", "penalties"])
@pytest.mark.parametrize("case", ["on", "schedule"])
def test_texts_are_the_targets_own(results, case, name):
    assert step(results, case, name)["result"] == step(results, "off", name)["result"]


def test_less_is_sent_and_nearly_all_of_it_is_right(results):
    for name in ("hard", "together"):
        sent, whole = (step(results, case, name)["counts"] for case in ("on", "whole"))
        assert 0 < sent["drafted"] < whole["drafted"] / 2
        wrong, before = (counts["drafted"] - counts["accepted"] for counts in (sent, whole))
        assert wrong < before / 4
    easy, whole = (step(results, case, "easy")["counts"] for case in ("on", "whole"))
    assert easy["accepted"] > whole["accepted"] / 2


def test_requests_come_and_go(results):
    off, on = step(results, "off", "traffic"), step(results, "on", "traffic")
    assert on["result"]["cache_usage"] == 0
    assert_same_beginnings(off, on)


def test_async_scheduling_keeps_the_full_length_and_says_so(results):
    on = assert_same(results, "easy", on="async")
    assert on["counts"]["drafted"] == 7 * on["counts"]["drafts"]
    assert "--no-async-scheduling lets num_speculative_tokens_per_request work" in results["async"]["log"]


# What one of 250 requests' tokens costs so that about half of them are sent.
SOME = 0.004
DRAWS = 5_000


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Each token leaves several likely ones."""
    return predictable.write_target(tmp_path_factory.mktemp("sampled") / "target", VOCAB, noise=0.15, sharpness=0.3)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, target):
    folder = tmp_path_factory.mktemp("draws")
    checkpoint = predictable.write_checkpoint(folder / "gumiho", VOCAB)
    settings = {"max_num_seqs": 250, "seed": 17, "max_num_batched_tokens": 4096}
    cases = {}
    for method in ("greedy", "probabilistic"):
        speculative = {"num_speculative_tokens": 3, "draft_sample_method": method, PER_REQUEST: SOME}
        cases[method] = pair(target, checkpoint, steps(("T=1",), DRAWS), speculative=speculative, **settings)["on"]
    # Last: what is planted stays in the process.
    cases["wrong"] = cases["probabilistic"] | {"plant": "sent for what was drawn"}
    return run(folder, cases)


@pytest.mark.feature("draft length by request", "V1")
@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_sampled_tokens_have_the_targets_joint_distribution(drawn, target, method):
    counts = step(drawn, method, "T=1")["counts"]
    assert 0.1 < counts["accepted"] / counts["drafted"] < 0.95
    assert counts["drafted"] < 2.5 * DRAWS, "all of each draft was sent"
    probs, tokens = exact(target, **SETTINGS["T=1"]), drawn_tokens(drawn, method, "T=1")
    assert g_test(joint(tokens, 0, JOINT), probs.sum(-1).flatten()) < LIMIT
    assert g_test(joint(tokens, LENGTH - 2, LENGTH), probs.sum((0, 1)).flatten()) < LIMIT


def test_a_length_by_the_drawn_token_itself_is_caught(drawn, target):
    counts = joint(drawn_tokens(drawn, "wrong", "T=1"), 0, JOINT)
    assert g_test(counts, exact(target).sum(-1).flatten()) > 2 * LIMIT

"""Sampled output has the target's exact distribution: a G-test of the first tokens together.

The first token comes from the prompt, the next ones from drafts: by the two serial steps and the first head.  Runner
V2 is slow under Triton's interpreter: it gets fewer draws, in the long form alone.
"""

from __future__ import annotations

import math

import predictable
import pytest
import torch
from engines import generate, pair, run, step
from torch import Tensor

pytestmark = pytest.mark.engine
PROMPT = [5, 2, 7, 3]
VOCAB, LENGTH, JOINT = 8, 4, 3
V2_DRAWS = 800
SETTINGS = {
    "T=1": {"temperature": 1.0},
    "T=0.7": {"temperature": 0.7},
    "top-p": {"temperature": 1.0, "top_p": 0.8},
    "top-k": {"temperature": 1.0, "top_k": 3},
}
METHODS = ("greedy", "probabilistic")
# Standard deviations of a normal variable; a right sampler is above with a chance of 1 in 30,000.
LIMIT = 4.0


def steps(names: tuple[str, ...], draws: int) -> dict[str, dict]:
    common = {"max_tokens": LENGTH, "ignore_eos": True, "n": 100, "detokenize": False}
    return {name: generate([PROMPT] * (draws // 100), common | SETTINGS[name]) for name in names}


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
    # Last: what is planted stays in the process.
    for method in METHODS:
        planted = {"llm": cases[method]["llm"], "steps": steps(("T=1",), draws), "plant": "accepts too often"}
        cases[f"wrong {method}"] = planted
    return run(folder, cases)


@pytest.fixture(scope="module", params=METHODS)
def drawn_by_v2(tmp_path_factory, target, request):
    folder = tmp_path_factory.mktemp("v2")
    checkpoint = predictable.write_checkpoint(folder / "gumiho", VOCAB)
    speculative = {"num_speculative_tokens": 3, "draft_sample_method": request.param}
    settings = {"max_num_seqs": 100, "seed": 17, "max_num_batched_tokens": 4096, "speculative": speculative}
    cases = pair(target, checkpoint, steps(("T=1",), V2_DRAWS), **settings)
    return run(folder, {"on": cases["on"]}, runner="v2")


def constrained(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int = VOCAB) -> Tensor:
    """Probabilities ``[N, V]`` that a request samples from, of logits ``[N, V]``, float64."""
    ascending, order = (logits / temperature).sort(dim=-1)
    ascending[:, : VOCAB - top_k] = -torch.inf
    if top_p < 1:
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[:, -1] = False
        ascending[dropped] = -torch.inf
    return torch.zeros_like(logits).scatter_(-1, order, ascending.softmax(-1))


def exact(target, **setting) -> Tensor:
    """Probability of every sequence of `LENGTH` tokens after `PROMPT`, ``[V] * LENGTH`` float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    prefixes, weight = torch.tensor([PROMPT]), torch.ones(1, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(LENGTH):
            probs = constrained(model(prefixes).logits[:, -1].double(), **setting)
            weight = (weight[:, None] * probs).flatten()
            following = torch.arange(VOCAB).repeat(len(prefixes))[:, None]
            prefixes = torch.cat((prefixes.repeat_interleave(VOCAB, 0), following), dim=1)
    return weight.view([VOCAB] * LENGTH)


def g_test(counts: Tensor, probs: Tensor) -> float:
    """How far counts are from those expected of probs, in standard deviations of a normal variable.

    G = 2 sum O ln(O / E), cells with under five expected draws pooled; its chi-square tail is made normal by Wilson
    and Hilferty's cube root.
    """
    assert counts[probs == 0].sum() == 0, "tokens that have no probability were drawn"
    expected = probs * counts.sum()
    small = expected < 5
    seen = torch.cat((counts[~small], counts[small].sum()[None]))
    wanted = torch.cat((expected[~small], expected[small].sum()[None]))
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    statistic = 2 * float(torch.special.xlogy(seen, seen / wanted).sum())
    freedom = len(wanted) - 1
    assert freedom > 10
    return ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))


def drawn_tokens(drawn, case: str, name: str) -> Tensor:
    """``[draws, LENGTH]`` int64."""
    tokens = torch.tensor([ids for output in step(drawn, case, name)["result"] for ids in output["tokens"]])
    assert tokens.shape[1] == LENGTH
    return tokens


def joint(tokens: Tensor, first: int, last: int) -> Tensor:
    """Counts of the tokens at positions first..last together, flat float64."""
    cell = torch.zeros(len(tokens), dtype=torch.int64)
    for position in range(first, last):
        cell = cell * VOCAB + tokens[:, position]
    return torch.bincount(cell, minlength=VOCAB ** (last - first)).double()


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


@pytest.mark.long
def test_sampled_tokens_of_v2_have_the_targets_joint_distribution(drawn_by_v2, target):
    assert drawn_by_v2["on"]["facts"]["runner"] == "v2"
    counts = step(drawn_by_v2, "on", "T=1")["counts"]
    assert 0.1 < counts["accepted"] / counts["drafted"] < 0.9
    probs, tokens = exact(target), drawn_tokens(drawn_by_v2, "on", "T=1")
    assert len(tokens) == V2_DRAWS
    assert g_test(joint(tokens, 0, 2), probs.sum((2, 3)).flatten()) < LIMIT
    assert g_test(joint(tokens, LENGTH - 2, LENGTH), probs.sum((0, 1)).flatten()) < LIMIT
    wrong = exact(target, temperature=0.7)
    assert g_test(joint(tokens, 0, 2), wrong.sum((2, 3)).flatten()) > LIMIT, "too few draws to see a wrong temperature"


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_wrong_sampler_is_caught(drawn, target, method):
    """Drafts accepted with their probability over 0.75."""
    counts = joint(drawn_tokens(drawn, f"wrong {method}", "T=1"), 0, JOINT)
    assert g_test(counts, exact(target).sum(-1).flatten()) > 2 * LIMIT


@pytest.mark.parametrize("method", METHODS)
def test_draws_at_another_temperature_are_caught(drawn, target, method):
    counts = joint(drawn_tokens(drawn, method, "T=0.7"), 0, JOINT)
    assert g_test(counts, exact(target).sum(-1).flatten()) > 2 * LIMIT

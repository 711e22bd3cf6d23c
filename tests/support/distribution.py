"""Whether sampled tokens have a target's exact distribution: a G-test of the first tokens together."""

from __future__ import annotations

import math

import torch
from engines import generate, step
from torch import Tensor

PROMPT = [5, 2, 7, 3]
VOCAB, LENGTH, JOINT = 8, 4, 3
SETTINGS = {
    "T=1": {"temperature": 1.0},
    "T=0.7": {"temperature": 0.7},
    "top-p": {"temperature": 1.0, "top_p": 0.8},
    "top-k": {"temperature": 1.0, "top_k": 3},
}
# Standard deviations of a normal variable; a right sampler is above with a chance of 1 in 30,000.
LIMIT = 4.0


def steps(names: tuple[str, ...], draws: int) -> dict[str, dict]:
    common = {"max_tokens": LENGTH, "ignore_eos": True, "n": 100, "detokenize": False}
    return {name: generate([PROMPT] * (draws // 100), common | SETTINGS[name]) for name in names}


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

"""Sampled output keeps the target's distribution, with greedy and with probabilistic drafts."""

from __future__ import annotations

import pytest
import tiny
import torch
from engines import case, run_engines

pytestmark = pytest.mark.engine
PROMPT = [5, 17, 9, 30]
DRAWS = 3000
LENGTH = 3
# Upper 0.1 % point of chi-square per degree of freedom is below this for 20 or more of them.
LIMIT = 2.3


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tiny.write_target(tmp_path_factory.mktemp("sampled"), vocab_size=32, seed=7)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, target):
    checkpoint = tiny.write_released(tmp_path_factory.mktemp("c"), tiny.drafter_tensors(seed=1))
    calls = [{"prompts": [PROMPT] * DRAWS, "sampling": {"temperature": 1.0, "max_tokens": LENGTH, "ignore_eos": True}}]
    cases = {
        method: case(
            target,
            {"method": "gumiho", "model": str(checkpoint), "num_speculative_tokens": 3, "draft_sample_method": method},
            calls, max_num_seqs=64,
        )
        for method in ("greedy", "probabilistic")
    }  # fmt: skip
    return run_engines(tmp_path_factory.mktemp("draws"), "v1", cases)


def exact_probabilities(target, temperature: float) -> torch.Tensor:
    """Exact probabilities of each token at each of the sampled positions, ``[LENGTH, V]`` float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    vocab = model.config.vocab_size
    prefixes, weight, rows = torch.tensor([PROMPT]), torch.ones(1, dtype=torch.float64), []
    with torch.no_grad():
        for _ in range(LENGTH):
            probs = (model(prefixes).logits[:, -1].double() / temperature).softmax(-1)
            rows.append(weight @ probs)
            weight = (weight[:, None] * probs).flatten()
            prefixes = torch.cat(
                (prefixes.repeat_interleave(vocab, 0), torch.arange(vocab).repeat(len(prefixes))[:, None]), dim=1
            )
    return torch.stack(rows)


@pytest.fixture(scope="module")
def exact(target) -> torch.Tensor:
    return exact_probabilities(target, 1.0)


def chi_square_per_degree(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """Pearson's statistic over its degrees of freedom, cells with under five expected draws pooled."""
    expected = probs * counts.sum()
    small = expected < 5
    seen = torch.cat((counts[~small], counts[small].sum()[None]))
    wanted = torch.cat((expected[~small], expected[small].sum()[None]))
    keep = wanted > 0
    return float(((seen - wanted)[keep] ** 2 / wanted[keep]).sum() / max(1, int(keep.sum()) - 1))


def counts_at(tokens: list, position: int, vocab: int) -> torch.Tensor:
    return torch.bincount(torch.tensor([out[0][position] for out in tokens]), minlength=vocab).double()


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
@pytest.mark.parametrize("position", range(LENGTH))
def test_sampled_tokens_follow_the_targets_distribution(drawn, exact, method, position):
    assert "error" not in drawn[method], drawn[method].get("error")
    assert drawn[method]["drafts"] > 0
    assert sum(drawn[method]["accepted"]) > 100, "too few accepted drafts to test anything"
    counts = counts_at(drawn[method]["tokens"][0], position, exact.shape[1])
    assert chi_square_per_degree(counts, exact[position]) < LIMIT


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
@pytest.mark.parametrize("position", range(LENGTH))
def test_the_statistic_catches_a_wrong_sampler(drawn, target, method, position):
    """What a sampler at T = 0.7 would have to show is not what was drawn."""
    wrong = exact_probabilities(target, 0.7)
    counts = counts_at(drawn[method]["tokens"][0], position, wrong.shape[1])
    assert chi_square_per_degree(counts, wrong[position]) > LIMIT

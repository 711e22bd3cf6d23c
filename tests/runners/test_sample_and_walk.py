"""The walk of ``seeded_text: "same"``: what it gives out of rows, and the distribution of that, without an engine."""

from __future__ import annotations

import pytest
import torch
from distribution import g_test
from processes import walk_faults
from torch import Tensor

from vllm_gumiho.runners import sample_and_walk

VOCAB, STEPS, LENGTH, DRAWS = 5, 3, 3, 20_000
LIMIT = 4.0


def give(drawn: list[int], drafts: list[int], begins: list[int], steps: int = STEPS) -> list[list[int]]:
    """The tokens that count, by request.  What is behind the rows is poison."""
    poison = torch.full((4,), 99)
    tokens, count = sample_and_walk.walk(
        torch.cat((torch.tensor(drawn), poison)), torch.cat((torch.tensor(drafts), poison)), torch.tensor(begins), steps
    )
    assert tokens.shape == (len(begins) - 1, steps + 1)
    assert count.dtype == torch.int32
    return [row[:n].tolist() for row, n in zip(tokens, count.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("drawn", "drafts", "begins", "given"),
    [
        # One request of three drafts: all right, wrong in turn, and right again behind a wrong one.
        ([1, 2, 3, 4], [0, 1, 2, 3], [0, 4], [[1, 2, 3, 4]]),
        ([1, 2, 9, 4], [0, 1, 2, 3], [0, 4], [[1, 2, 9]]),
        ([9, 2, 3, 4], [0, 1, 2, 3], [0, 4], [[9]]),
        ([1, 9, 3, 4], [0, 1, 2, 3], [0, 4], [[1, 9]]),
        # Requests of 3, 0 and 2 drafts: none reads its neighbour's row as a draft of its own.
        ([1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5, 6, 7], [0, 4, 5, 8], [[1, 2, 3, 4], [5], [6, 7, 8]]),
        # A place holder is no draft, nor is one that a grammar has not seen.
        ([1, 2, 3, 4], [0, -1, 2, 3], [0, 4], [[1]]),
        ([1, 2, 3, 4], [0, 1, -1, 3], [0, 4], [[1, 2]]),
        # The last row of the batch has no follower, even where poison would match.
        ([1, 99], [0, 1], [0, 2], [[1, 99]]),
        ([99], [0], [0, 1], [[99]]),
    ],
)
def test_the_walk_stops_behind_the_first_wrong_draft(drawn, drafts, begins, given):
    assert give(drawn, drafts, begins) == given


@pytest.mark.parametrize("steps", [1, 2, 5, 7])
def test_any_number_of_drafts(steps):
    for right in range(steps + 1):
        drafts = [0, *range(10, 10 + right), *[0] * (steps - right)]
        assert give(list(range(10, 11 + steps)), drafts, [0, steps + 1], steps) == [list(range(10, 11 + right))]


LOGITS = 1.2 * torch.randn(VOCAB, VOCAB, VOCAB, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
GUESS = (LOGITS + 0.6 * LOGITS.flip(0)).argmax(-1)  # Of a drafter that knows the target somewhat.
KINDS = {"right": (None, False), "walks too far": ("walks too far", False), "repeats noise": (None, True)}


def generate(noise: Tensor, steps: int, repeats: bool = False) -> tuple[Tensor, Tensor]:
    """Tokens ``[N, LENGTH]`` after (0, 0), each by the two before it; and of each round's first draft, ``[2, rounds]``:
    whether it was accepted, and the chance that the target gives it.

    noise ``[N, positions, V]``: Gumbel, by position; of a request's first row for all its rows, if it ``repeats``.
    """
    count, room = noise.shape[0], LENGTH + steps
    text = torch.zeros(count, 2 + room + 1, dtype=torch.int64)
    done, drafts = torch.zeros(count, dtype=torch.int64), []
    while (done < LENGTH).any():
        at = 1 + done[:, None] + torch.arange(steps + 1)  # The rows' own tokens: the last one, then the drafts.
        at = at.clamp(max=room + 1)
        for i in range(1, steps + 1):
            before = text.gather(1, torch.stack((at[:, i] - 2, at[:, i] - 1), 1))
            text.scatter_(1, at[:, i, None], GUESS[before[:, 0], before[:, 1]][:, None])
        inputs, positions = text.gather(1, at), (at - 1).clamp(max=noise.shape[1] - 1)
        positions = positions[:, :1].expand_as(positions) if repeats else positions
        spread = noise.gather(1, positions[..., None].expand(-1, -1, VOCAB))
        drawn = (LOGITS[text.gather(1, at - 1), inputs] + spread).argmax(-1)
        begins = torch.arange(count + 1) * (steps + 1)
        tokens, given = sample_and_walk.walk(drawn.flatten(), inputs.flatten(), begins, steps)
        unfinished = done < LENGTH
        for i in range(steps + 1):
            rows = (unfinished & (i < given)).nonzero()[:, 0]
            text[rows, (2 + done[rows] + i).clamp(max=room + 2)] = tokens[rows, i]
        chance = LOGITS.softmax(-1)[text.gather(1, at - 1)[:, 0], inputs[:, 0], inputs[:, min(steps, 1)]]
        drafts.append(torch.stack(((given > 1).double(), chance))[:, unfinished])
        done += torch.where(unfinished, given, 0)
    return text[:, 2 : 2 + LENGTH], torch.cat(drafts, 1)


def gumbel(count: int = DRAWS) -> Tensor:
    random = torch.Generator().manual_seed(11)
    return -torch.log(-torch.log(torch.rand(count, LENGTH + STEPS + 1, VOCAB, generator=random, dtype=torch.float64)))


def joint(tokens: Tensor) -> Tensor:
    cells = (tokens * VOCAB ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
    return torch.bincount(cells, minlength=VOCAB**LENGTH).double()


@pytest.fixture(params=KINDS)
def kind(request):
    """Of walk; what is planted is taken away again."""
    fault, repeats = KINDS[request.param]
    if fault:
        walk_faults.FAULTS[fault]()
    yield request.param, repeats
    walk_faults.right()


def test_tokens_have_the_targets_joint_distribution_and_a_wrong_walk_is_caught(kind):
    name, repeats = kind
    probs = LOGITS.softmax(-1)
    first = probs[0, 0]
    second = first[:, None] * probs[0]
    exact = (second[..., None] * probs).flatten()
    tokens, drafts = generate(gumbel(), STEPS, repeats)
    assert float(drafts[0].mean()) > 0.2
    distance = g_test(joint(tokens), exact)
    assert distance < LIMIT if name == "right" else distance > 2 * LIMIT


def test_the_same_noise_gives_the_same_text_without_drafts(kind):
    name, repeats = kind
    noise = gumbel(2_000)
    plain, none = generate(noise, 0)
    assert not none[0].any()
    assert torch.equal(generate(noise, STEPS, repeats)[0], plain) == (name == "right")


def test_as_many_drafts_are_accepted_as_by_the_rejection_sampler():
    """It accepts a draft of one token with the token's probability."""
    accepted, chance = generate(gumbel(), STEPS)[1]
    error = float((chance * (1 - chance)).sum().sqrt() / len(chance))
    assert error < 0.005
    assert abs(float((accepted - chance).mean())) < LIMIT * error

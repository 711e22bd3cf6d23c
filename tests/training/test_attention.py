"""Attention of packed sequences against one dense mask over all; the cross-entropy against autograd's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vllm_gumiho.training import attention
from vllm_gumiho.training.attention import Sight
from vllm_gumiho.training.candidates import Candidates, soft_cross_entropy
from vllm_gumiho.training.row_attention import RowSight
from vllm_gumiho.training.target_head import LmHead

HEADS, KV_HEADS, WIDTH = 4, 2, 16
# A sequence longer than a block, one without anchors, one of one token.
LENGTHS = [37, 9, 1, 21]


@pytest.fixture(params=[8, 256], ids=["small blocks", "one block"])
def block(request, monkeypatch):
    monkeypatch.setattr(attention, "CPU_BLOCK", request.param)


def in_rows(picked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Segments and anchors ``[R, T]`` of two rows with padding between and after the sequences of `LENGTHS`.

    The last one, which has anchors, follows others in its row: what it sees of them would show.
    """
    segments, anchors = (torch.zeros(2, 50, dtype=kind) for kind in (torch.long, torch.bool))
    start = 0
    for number, (length, (row, at)) in enumerate(zip(LENGTHS, [(0, 0), (1, 0), (1, 9), (1, 12)], strict=True), 1):
        segments[row, at : at + length] = number
        anchors[row, at : at + length] = picked[start : start + length]
        start += length
    return segments, anchors


@pytest.fixture(params=["one by one", "rows"])
def sight(request):
    """Makes the way of a CPU, and of any other device."""
    return lambda picked: Sight(LENGTHS, picked) if request.param == "one by one" else RowSight(*in_rows(picked))


def anchors() -> torch.Tensor:
    picked = torch.zeros(sum(LENGTHS), dtype=torch.bool)
    # Two runs in the first sequence, as of two turns; one run in the last.
    picked[[*range(3, 9), *range(20, 35), *range(47 + 5, 47 + 18)]] = True
    return picked


def dense_mask(steps: int, all_queries: bool) -> torch.Tensor:
    """``[queries, N + steps * A]``: written down from what the module says, for all sequences at once."""
    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    place = torch.arange(sum(LENGTHS))
    seen = (sequence[:, None] == sequence) & (place[:, None] >= place)
    if all_queries:
        return seen
    own = torch.eye(int(anchors().sum()), dtype=torch.bool)
    return torch.cat([seen[anchors()], *[own] * steps], dim=1)


@pytest.mark.parametrize(("steps", "all_queries"), [(0, True), (0, False), (1, False), (2, False)])
def test_sequences_attend_as_under_one_dense_mask(block, sight, steps, all_queries):
    torch.manual_seed(0)
    picked = anchors()
    count, total = int(picked.sum()), sum(LENGTHS)
    q = torch.randn(total if all_queries else count, HEADS, WIDTH, requires_grad=True)
    sizes = [total, *[count] * steps]
    past = [tuple(torch.randn(n, KV_HEADS, WIDTH, requires_grad=True) for _ in "kv") for n in sizes]
    inputs = [q, *(x for pair in past for x in pair)]
    made = sight(picked)
    assert torch.equal(made.anchor_index, picked.nonzero()[:, 0])
    found = made.attend(q, past, all_queries)
    keys, values = (torch.cat(parts) for parts in zip(*past, strict=True))

    def heads(x):
        return x.transpose(0, 1).repeat_interleave(HEADS // x.shape[1], 0)

    mask = dense_mask(steps, all_queries)
    wanted = F.scaled_dot_product_attention(heads(q), heads(keys), heads(values), attn_mask=mask).transpose(0, 1)
    # What follows a sequence's last anchor, and a sequence without one, is needed by none and left out.
    needed = torch.ones(len(q), dtype=torch.bool)
    if all_queries:
        needed[:] = False
        needed[:35] = needed[47 : 47 + 18] = True
    torch.testing.assert_close(found[needed], wanted[needed], rtol=1e-5, atol=1e-6)
    weight = torch.randn_like(found) * needed[:, None, None]
    ours, theirs = (torch.autograd.grad((out * weight).sum(), inputs, retain_graph=True) for out in (found, wanted))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("all_queries", [False, True])
def test_no_anchors_leave_every_input_a_gradient(sight, all_queries):
    total = sum(LENGTHS)
    q = torch.randn(total if all_queries else 0, HEADS, WIDTH, requires_grad=True)
    k, v = (torch.randn(total, KV_HEADS, WIDTH, requires_grad=True) for _ in "kv")
    made = sight(torch.zeros(total, dtype=torch.bool))
    made.attend(q, [(k, v)], all_queries)[: 0 if all_queries else None].sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in (k, v))
    assert q.grad is not None


@pytest.mark.parametrize("drawn", [0, 30])
@pytest.mark.parametrize("rows", [3, 512])
def test_the_cross_entropy_and_its_gradient_are_autograds(monkeypatch, drawn, rows):
    monkeypatch.setattr("vllm_gumiho.training.candidates._LOGIT_ROWS", rows)
    torch.manual_seed(0)
    table, x = torch.randn(100, 8), torch.randn(7, 8, requires_grad=True)
    labels = torch.randint(100, (10,))
    subset = Candidates.draw(labels, torch.arange(5), 100, drawn)
    head = LmHead(table).rows(subset.ids)
    wanted = torch.rand(10, head.size).softmax(-1)
    at = torch.tensor([0, 9, 3, 3, 8, 1, 2])
    truth, known = subset.column(labels[at])
    assert known.all()
    found, likely = soft_cross_entropy(x, head, subset.log_weight, wanted, at, truth)
    logs = subset.logits(x, head).log_softmax(-1)
    plain = -(wanted[at] * logs).sum(-1)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(likely, logs.detach().gather(1, truth[:, None])[:, 0].exp())
    assert not likely.requires_grad
    by = torch.rand(7)
    ours, theirs = (torch.autograd.grad((y * by).sum(), x, retain_graph=True)[0] for y in (found, plain))
    torch.testing.assert_close(ours, theirs)

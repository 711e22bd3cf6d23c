"""What tests of kernels share: a seed, and buffers that are full of rubbish."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch):
    """Every fresh buffer is full of NaN, or of a number that no index may be."""

    def poison(t: Tensor) -> Tensor:
        if t.is_floating_point():
            return t.fill_(float("nan"))
        return t.fill_(-(1 << 30)) if t.dtype in (torch.int32, torch.int64) else t

    empty, new_empty = torch.empty, Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: poison(new_empty(self, *a, **k)))

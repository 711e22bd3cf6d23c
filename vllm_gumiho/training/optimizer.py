"""Optimisers for the drafter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` for matrices, AdamW (0.9, 0.95) for vectors, behind one optimiser's interface.

    Muon orthogonalises each matrix's momentum; with ``match_rms_adamw`` its updates have AdamW's size, so one
    learning rate serves both (arXiv 2502.16982).
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, plain: Iterable[nn.Parameter] = ()):
        """plain: parameters that AdamW takes whatever their shape."""
        params, apart = [p for p in params if p.requires_grad], {id(p) for p in plain}
        matrices = [p for p in params if p.ndim == 2 and id(p) not in apart]
        others = [p for p in params if p.ndim != 2 or id(p) in apart]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0))
        super().__init__(params, {"lr": lr})
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self._share()

    def _share(self) -> None:
        """One state and one list of groups for the parts and the whole: schedules and checkpoints see them all."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.state, part.param_groups = self.state, [group]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = closure() if closure else None
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

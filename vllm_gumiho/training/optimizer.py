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

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        plain: Iterable[nn.Parameter] = (),
        slow: Iterable[nn.Parameter] = (),
        rate: float = 1.0,
    ):
        """plain: parameters that AdamW takes whatever their shape.  slow: those that learn at ``rate * lr``."""
        params, simple = [p for p in params if p.requires_grad], {id(p) for p in plain}
        slower = {id(p) for p in slow} if rate != 1.0 else set()
        matrices = [p for p in params if p.ndim == 2 and id(p) not in simple]
        others = [p for p in params if p.ndim != 2 or id(p) in simple]
        self.parts: list[torch.optim.Optimizer] = []
        for own_lr, taken in ((lr, lambda p: id(p) not in slower), (rate * lr, lambda p: id(p) in slower)):
            if chosen := [p for p in matrices if taken(p)]:
                muon = torch.optim.Muon(chosen, lr=own_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
                self.parts.append(muon)
            if chosen := [p for p in others if taken(p)]:
                self.parts.append(torch.optim.AdamW(chosen, lr=own_lr, betas=(0.9, 0.95), weight_decay=0.0))
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


def apart(optimizer: torch.optim.Optimizer, params: Iterable[nn.Parameter], lr: float) -> None:
    """Give some of an optimiser's parameters a group of their own, with the settings of the first but another rate."""
    moved = {id(p): p for p in params if p.requires_grad}
    settings = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in moved]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    if moved:
        optimizer.add_param_group({**settings, "params": list(moved.values()), "lr": lr})

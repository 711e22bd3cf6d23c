"""From a target's feature to its logits: the LM head, and what the model's own code does with what it gives.

Nothing is looked up by a model's name: the model's own forward pass is watched.  Its feature is the vector that the LM
head reads, which is what a vLLM model's ``forward`` returns and so what serving gives the drafter; some models scale
their last hidden state before that (MiniCPM).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_gumiho.errors import TargetError

# Outputs of an LM head that a model is watched on: near 0 the scale shows, far away a soft cap, between them the form.
_NEAR, _FAR, _RANGE = 2.0**-10, 2.0**27, 300.0
# Of the largest logit: what is off by more is another form.
_APART = 1e-4


@dataclass(frozen=True)
class LmHead:
    """``[..., H]`` -> logits ``[..., V]``: ``y = scale * (W x + b)``, then ``soft_cap * tanh(y / soft_cap)``, if any.

    weight ``[V, H]``; bias ``[V]`` or None.  Rows may be those of some tokens alone.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    @property
    def size(self) -> int:
        """Tokens."""
        return self.weight.shape[0]

    def rows(self, ids: Tensor | None) -> LmHead:
        """Of these tokens; None is all."""
        if ids is None:
            return self
        return replace(self, weight=self.weight[ids], bias=None if self.bias is None else self.bias[ids])

    def to(self, device: torch.device, dtype: torch.dtype) -> LmHead:
        """The weight in the dtype of products; the bias is added to logits, in float32."""
        bias = None if self.bias is None else self.bias.to(device, torch.float32)
        return replace(self, weight=self.weight.to(device, dtype), bias=bias)

    def logits(self, x: Tensor) -> Tensor:
        """float32, made anew: it may be written to."""
        return self.follow(F.linear(x, self.weight).float())

    def follow(self, products: Tensor) -> Tensor:
        """Logits ``[..., V]`` of float32 products ``W x``, in their place."""
        if self.bias is not None:
            products = products.add_(self.bias)
        if self.scale != 1.0:
            products = products.mul_(self.scale)
        if self.soft_cap is not None:
            products = products.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return products

    def slope(self, logits: Tensor) -> Tensor | float:
        """Of each logit by its product: what a gradient is multiplied by on its way to the features."""
        if self.soft_cap is None:
            return self.scale
        return logits.div(self.soft_cap).square_().neg_().add_(1.0).mul_(self.scale)


@contextmanager
def head_reads(model: nn.Module) -> Iterator[list[Tensor]]:
    """What the LM head reads in forward passes of the model, ``[R, T, H]`` a pass; it computes one position alone."""
    held: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        held.append(args[0])
        return (args[0][:, :1], *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield held
    finally:
        hook.remove()


@torch.no_grad()
def read_head(model: nn.Module, name: str) -> tuple[LmHead, bool]:
    """A causal LM's head, with what follows it, and whether it reads the base model's last hidden state as it is.

    name: of the target, for messages.  Raises: TargetError where what follows is no scale and no soft cap.
    """
    module = model.get_output_embeddings()
    if module is None or getattr(module, "weight", None) is None:
        raise TargetError(f"target {name}: {type(model).__name__} has no LM head that can be read; use another target")
    seen: dict[str, Tensor] = {}

    def answer(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        seen["read"] = args[0]
        grid = torch.linspace(-_RANGE, _RANGE, out.shape[-1], device=out.device, dtype=out.dtype)
        return torch.stack([grid, *(torch.full_like(grid, value) for value in (_NEAR, _FAR))])[None]

    ids = torch.arange(1, 4, device=module.weight.device)[None]
    hook = module.register_forward_hook(answer)
    try:
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        hook.remove()
    if "read" not in seen:
        raise TargetError(
            f"target {name}: {type(model).__name__} does not call its LM head as a module, so that what it reads "
            "cannot be watched; use another target"
        )
    grid, near, far = logits.unbind(0)
    scale = float(near[0]) / _NEAR
    soft_cap = float(far[0]) if abs(float(far[0])) < 0.5 * abs(scale) * _FAR else None
    size = logits.shape[-1]
    bias = getattr(module, "bias", None)
    head = LmHead(module.weight.detach()[:size], None if bias is None else bias.detach()[:size], scale, soft_cap)
    given = torch.linspace(-_RANGE, _RANGE, module.weight.shape[0], device=grid.device)[:size]
    expected = replace(head, bias=None).follow(given)
    if not (grid - expected).abs().max() <= _APART * expected.abs().max():
        raise TargetError(
            f"target {name}: what {type(model).__name__} does with the output of its LM head is neither a scale nor a "
            "soft cap, so that labels would not be the target's own; use another target"
        )
    last = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return head, last.shape == seen["read"].shape and torch.allclose(last, seen["read"], rtol=1e-4, atol=1e-6)

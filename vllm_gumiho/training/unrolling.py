"""What the drafter computes in training.

For a sequence x with target features h (h[t] predicts x[t+1]) and an anchor t, draft position i = 1..K predicts
x[t+1+i], whose target distribution is softmax(lm_head(h[t+i])).

`Form.UNROLLED`: each serial step after the first reads the drafter's own feature of the step before, and attends to
the first pass's keys up to the anchor and to its own earlier draft positions: what drafting sees.
`Form.TEACHER_FORCED`: every serial step is the first pass at its own position, on true target features, as the paper
trains.
`Form.FIRST_PASS`: the first pass alone, as EAGLE-1 (arXiv 2401.15077) trains; drafting is serial all the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_gumiho.drafters.trainable_layers import SerialDrafter


class Form(Enum):
    """What the serial steps see in training."""

    UNROLLED = "unrolled"
    TEACHER_FORCED = "teacher-forced"
    FIRST_PASS = "first pass"


def serial_mask(segments: Tensor) -> Tensor:
    """Attention mask of the first pass, bool ``[R, 1, T, T]``: causal inside a segment."""
    index = torch.arange(segments.shape[1], device=segments.device)
    causal = (segments[:, :, None] == segments[:, None, :]) & (index[:, None] >= index[None, :])
    return causal[:, None]


class AnchorRows:
    """Anchors of packed rows, moved to the front of their rows: later serial steps run on nothing else.

    anchors: bool ``[R, T]``, A of them.  W: the most anchors that a row has.
    """

    def __init__(self, anchors: Tensor, mask: Tensor, positions: Tensor):
        """mask: the first pass's, ``[R, 1, T, T]``; positions ``[R, T]``."""
        counts = anchors.sum(1)
        width = max(1, int(counts.max()))
        # Ascending inside a row, so a flat list of anchors is in the order of x[anchors].
        columns = torch.argsort(~anchors, dim=1, stable=True)[:, :width]
        self.present = torch.arange(width, device=anchors.device) < counts[:, None]
        self.positions = positions.gather(1, columns)
        self._first_pass = mask[:, 0].take_along_dim(columns[:, :, None], dim=1)
        self._own = torch.eye(width, dtype=torch.bool, device=anchors.device).expand(anchors.shape[0], -1, -1)

    def mask(self, step: int) -> Tensor:
        """``[R, 1, W, T + step * W]``: first-pass keys up to the anchor, then each anchor's own draft positions."""
        return torch.cat([self._first_pass] + [self._own] * step, dim=-1)[:, None]

    def spread(self, x: Tensor) -> Tensor:
        """``[A, H]`` -> ``[R, W, H]``, zeros where a row has fewer anchors."""
        return x.new_zeros(*self.present.shape, x.shape[-1]).masked_scatter(self.present[..., None], x)

    def gather(self, x: Tensor) -> Tensor:
        """``[R, W, H]`` -> ``[A, H]``."""
        return x[self.present]


def shift(x: Tensor, by: int) -> Tensor:
    """``x[:, t + by]`` at t along the second dimension, zeros past the end."""
    return x if by == 0 else torch.cat((x[:, by:], torch.zeros_like(x[:, :by])), dim=1)


@dataclass
class Drafts:
    """Draft features at the A anchors, in ``x[anchors]``'s order: ``[A, H]`` a serial step, heads ``[n, A, H]``.

    further: what the serial steps after the last one served draft, at the heads' own positions.
    """

    serial: list[Tensor]
    heads: Tensor
    further: list[Tensor] = field(default_factory=list)


def draft(
    drafter: SerialDrafter,
    embed: Tensor,
    ids: Tensor,
    features: Tensor,
    positions: Tensor,
    segments: Tensor,
    anchors: Tensor,
    form: Form = Form.UNROLLED,
    with_heads: bool = True,
    own_token: Callable[[Tensor, Tensor], Tensor] | None = None,
    heads_steer: bool = True,
    further: int = 0,
) -> Drafts:
    """All draft positions' features for every anchor of packed rows.

    embed ``[V, H]``; ids, positions, segments ``[R, T]``; features ``[R, T, H]``; anchors bool ``[R, T]``.
    Position t is fed ``(E[x[t+1]], h[t])``.  Later serial steps and heads are fed the true next tokens (where a
    draft token is wrong, verification ends the chain there), or what ``own_token(draft features, true tokens)`` says.
    heads_steer: gradients of the heads reach the Transformer.  further: serial steps beyond those that are served.
    """
    steps = drafter.config.num_serial_steps
    past: list[list[tuple[Tensor, Tensor]]] = [[] for _ in drafter.layers]
    mask = serial_mask(segments)
    o = drafter.fuse(F.embedding(shift(ids, 1), embed), features)
    hidden = drafter.serial(o, positions, mask, past)
    serial, fused = [hidden[anchors]], []
    if form is Form.FIRST_PASS:
        return Drafts(serial, hidden.new_empty(0))

    def next_input(step: int) -> Tensor:
        tokens = shift(ids, step + 1)[anchors]
        tokens = tokens if own_token is None else own_token(serial[-1], tokens)
        return drafter.fuse(F.embedding(tokens, embed), serial[-1])

    last = steps + further
    rows = AnchorRows(anchors, mask, positions) if form is Form.UNROLLED and last > 1 else None
    for step in range(1, last):
        if rows is None:
            fused.append(shift(o, step)[anchors])
            serial.append(shift(hidden, step)[anchors])
            continue
        fused.append(next_input(step))
        out = drafter.serial(rows.spread(fused[-1]), rows.positions + step, rows.mask(step), past)
        serial.append(rows.gather(out))
    served, beyond = serial[:steps], serial[steps:]
    if not with_heads or not drafter.config.num_heads:
        return Drafts(served, hidden.new_empty(0), beyond)
    if not further:
        fused.append(shift(o, steps)[anchors] if form is Form.TEACHER_FORCED else next_input(steps))
    m = torch.cat(fused[:steps], dim=-1)
    return Drafts(served, drafter.heads(m if heads_steer else m.detach()), beyond)


def valid_anchors(segments: Tensor, answer: Tensor, position: int) -> Tensor:
    """Anchors t that draft ``x[t+1+position]`` from answer tokens ``x[t+1:t+1+position]``, all of one answer."""
    by = position + 1
    valid = (shift(segments, by) == segments) & (segments > 0)
    for ahead in range(1, by + 1):
        valid &= shift(answer, ahead)
    return valid

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

from vllm_gumiho.drafters.trainable_layers import Pass, SerialDrafter
from vllm_gumiho.drafters.trainable_layers import Sight as Sees
from vllm_gumiho.training.attention import Sight
from vllm_gumiho.training.data import segment_spans
from vllm_gumiho.training.row_attention import RowSight


class Form(Enum):
    """What the serial steps see in training."""

    UNROLLED = "unrolled"
    TEACHER_FORCED = "teacher-forced"
    FIRST_PASS = "first pass"


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

    embed ``[V, H]``; ids, positions, segments ``[R, T]``; features ``[R, T, H]``, with states of m layers behind them
    ``[R, T, (1 + m) H]`` for a drafter that reads those; anchors bool ``[R, T]``.
    Position t is fed ``(E[x[t+1]], h[t])``.  Later serial steps and heads are fed the true next tokens (where a
    draft token is wrong, verification ends the chain there), or what ``own_token(draft features, true tokens)`` says.
    heads_steer: gradients of the heads reach the Transformer.  further: serial steps beyond those that are served.
    """
    steps = drafter.config.num_serial_steps
    past: list[list[tuple[Tensor, Tensor]]] = [[] for _ in drafter.layers]
    # Flat from here on, without padding: sequences end to end.
    real = (segments > 0).flatten().nonzero()[:, 0]

    def flat(x: Tensor) -> Tensor:
        return x.flatten(0, 1)[real]

    sight: Sees
    if segments.device.type == "cpu":
        sight = Sight([stop - start for _, start, stop in segment_spans(segments)], flat(anchors))
    else:
        sight = RowSight(segments, anchors)
    at = sight.anchor_index
    o = drafter.fuse(F.embedding(flat(shift(ids, 1)), embed), drafter.first_features(flat(features)))
    serial, fused = [drafter.serial(o, Pass.at(flat(positions), drafter.config, sight), past)], []
    if form is Form.FIRST_PASS:
        return Drafts(serial, o.new_empty(0))

    def ahead(x: Tensor, by: int) -> Tensor:
        """``x[t + by]`` at the anchors t, x ``[N, H]``; anything where the sequence ends before."""
        return x[(at + by).clamp_max(x.shape[0] - 1)]

    def next_input(step: int) -> Tensor:
        tokens = shift(ids, step + 1)[anchors]
        tokens = tokens if own_token is None else own_token(serial[-1], tokens)
        return drafter.fuse(F.embedding(tokens, embed), serial[-1])

    first = serial[0]
    for step in range(1, steps + further):
        if form is Form.TEACHER_FORCED:
            fused.append(ahead(o, step))
            serial.append(ahead(first.new_zeros(real.shape[0], first.shape[-1]).index_copy(0, at, first), step))
            continue
        fused.append(next_input(step))
        serial.append(drafter.serial(fused[-1], Pass.at(flat(positions)[at] + step, drafter.config, sight, True), past))
    served, beyond = serial[:steps], serial[steps:]
    if not with_heads or not drafter.config.num_heads:
        return Drafts(served, o.new_empty(0), beyond)
    if not further:
        fused.append(ahead(o, steps) if form is Form.TEACHER_FORCED else next_input(steps))
    m = torch.cat(fused[:steps], dim=-1)
    return Drafts(served, drafter.heads(m if heads_steer else m.detach()), beyond)


def valid_anchors(segments: Tensor, answer: Tensor, position: int) -> Tensor:
    """Anchors t that draft ``x[t+1+position]`` from answer tokens ``x[t+1:t+1+position]``, all of one answer."""
    by = position + 1
    valid = (shift(segments, by) == segments) & (segments > 0)
    for ahead in range(1, by + 1):
        valid &= shift(answer, ahead)
    return valid

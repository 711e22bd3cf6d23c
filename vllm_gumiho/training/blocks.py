"""What Mixture of Attentions computes in training: every draft position of every anchor, in one masked pass.

Source: Mixture of Attentions (arXiv 2410.03804), on-policy by masks: between two anchors the features stop, while the
tokens go on.  What drafting sees is then what a mask lets be seen, since no feature is fed back.

Row t of packed sequences holds token x[t+1] and the target's states of x[t], as in serving.  From an anchor t, draft
position i = 1..K predicts x[t+1+i] from row t+i-1, whose self-attention sees all rows up to itself, and whose
cross-attention sees the features of rows up to t alone.

Shapes: R packed rows of T tokens, A anchors a row, D drafted tokens of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_gumiho.drafters.moa.trainable import MoaDrafter
from vllm_gumiho.training.unrolling import shift


class MaskedTarget(Protocol):
    """See `vllm_gumiho.training.target.FrozenTarget.masked`."""

    def masked(self, ids: Tensor, positions: Tensor, sees: Tensor) -> Tensor: ...


def anchor_rows(batch: dict[str, Tensor], lengths: tuple[int, int], shifted: bool) -> Tensor:
    """The anchor ``[R, T]`` of each row, a row of the same sequence: itself, or one before.

    Outside of answers every row is one.  In them there is one in every n, n being drawn for each sequence from
    ``lengths``, both included; shifted: where the first lies is drawn too, else at multiples of n.
    """
    segments, answer, positions = batch["segments"], batch["answer"], batch["positions"]
    shape, device = (segments.shape[0], int(segments.max()) + 1), segments.device
    every = torch.randint(lengths[0], lengths[1] + 1, shape, device=device)
    first = (torch.rand(shape, device=device) * every).long() if shifted else torch.zeros_like(every)
    every, first = every.gather(1, segments), first.gather(1, segments)
    inside = answer & shift(answer, 1) & (positions > 0)
    anchors = ~inside | ((positions + first) % every == 0)
    rows = torch.arange(segments.shape[1], device=device).expand_as(segments)
    return rows.where(anchors, 0).cummax(1).values


@dataclass
class Text:
    """One batch as the drafter reads it: embeddings of tokens x[t+1], features of tokens x[t], ``[R, T, H]`` each."""

    drafter: MoaDrafter
    embed: Tensor
    ids: Tensor
    positions: Tensor
    segments: Tensor
    embeds: Tensor
    features: Tensor
    same: Tensor

    @staticmethod
    def of(drafter: MoaDrafter, embed: Tensor, batch: dict[str, Tensor], states: Tensor) -> Text:
        """embed ``[V, H]``; states ``[R, T, m * H]`` of the m layers that the drafter reads."""
        ids, segments = batch["input_ids"], batch["segments"]
        held = states.unflatten(-1, (len(drafter.target_layers), -1))
        real = segments > 0
        features = embed.new_zeros(*ids.shape, embed.shape[1], dtype=states.dtype)
        found = drafter(held[real])
        features = features.to(found.dtype).masked_scatter(real[..., None], found)
        embeds = F.embedding(shift(ids, 1), embed)
        same = segments[:, :, None] == segments[:, None, :]
        return Text(drafter, embed, ids, batch["positions"], segments, embeds, features, same)

    def tokens(self) -> Tensor:
        """The self-attention's output of every row, ``[R, T, H]``."""
        at = self.positions + 1
        causal = torch.ones_like(self.same[0]).tril()
        return self.drafter.attend_to_tokens(self.embeds, at, self.embeds, at, self.same & causal)

    def drafted(self, x: Tensor, anchors: Tensor) -> Tensor:
        """What each row drafts from, ``[R, T, H]``.  x: `tokens`.  anchors ``[R, T]``: rows whose features it sees."""
        rows = torch.arange(x.shape[1], device=x.device)
        sees = self.same & (rows <= anchors[:, :, None])
        return self.drafter.attend_to_features(x, self.positions + 1, self.features, self.positions, sees)


@dataclass
class Chains:
    """Chains of the drafter's own tokens: from ``anchors [R, A]``, -1 where a row has fewer.

    tokens ``[R, A, D]``: the D tokens at draft positions 1..D.
    """

    text: Text
    anchors: Tensor
    tokens: Tensor

    @property
    def real(self) -> Tensor:
        """Which are anchors, bool ``[R, A]``."""
        return self.anchors >= 0

    def _places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of every drafted token ``[R, A * D]``: its anchor's row, its position in the text, and its draft position."""
        rows, count, length = self.tokens.shape
        at = self.anchors.clamp_min(0)
        number = torch.arange(1, length + 1, device=at.device).expand(rows, count, length)
        positions = self.text.positions.gather(1, at)[..., None] + 1 + number
        return at[..., None].expand_as(number).flatten(1), positions.flatten(1), number.flatten(1)

    def _own(self, number: Tensor) -> Tensor:
        """Drafted tokens of the same chain up to each, bool ``[R, A * D, A * D]``."""
        _, count, length = self.tokens.shape
        chain = torch.arange(count, device=number.device).repeat_interleave(length)
        return (chain[:, None] == chain) & (number[:, None, :] <= number[:, :, None])

    def _of_anchor(self, at: Tensor) -> Tensor:
        """Rows of each anchor's sequence, bool ``[R, A * D, T]``."""
        return self.text.same.gather(1, at[..., None].expand(-1, -1, self.text.same.shape[-1]))

    def drafted(self, last: bool = False) -> Tensor:
        """What the tokens after the drafted ones come from, ``[R, A, D, H]``; last: of each chain's last one alone."""
        at, positions, number = self._places()
        text, (_, count, length) = self.text, self.tokens.shape
        rows = torch.arange(text.ids.shape[1], device=at.device)
        seen = self._of_anchor(at) & (rows <= at[..., None])
        embeds = F.embedding(self.tokens.flatten(1), text.embed)
        asked = slice(length - 1, None, length) if last else slice(None)
        x = text.drafter.attend_to_tokens(
            embeds[:, asked],
            positions[:, asked],
            torch.cat((text.embeds, embeds), dim=1),
            torch.cat((text.positions + 1, positions), dim=1),
            torch.cat((seen, self._own(number)), dim=2)[:, asked],
        )
        out = text.drafter.attend_to_features(x, positions[:, asked], text.features, text.positions, seen[:, asked])
        return out.unflatten(1, (count, -1))

    def longer(self, tokens: Tensor) -> Chains:
        """With one more token each, ``[R, A]``."""
        return Chains(self.text, self.anchors, torch.cat((self.tokens, tokens[..., None]), dim=-1))

    def judged(self, target: MaskedTarget) -> Tensor:
        """The target's features of every drafted token, ``[R, A, D, H]``: it sees the text up to its anchor's token.

        That token, x[t+1], is verified; so are all before it.
        """
        at, positions, number = self._places()
        text, (_, count, length) = self.text, self.tokens.shape
        rows = torch.arange(text.ids.shape[1], device=at.device)
        seen = self._of_anchor(at) & (rows <= at[..., None] + 1)
        causal = text.same & torch.ones_like(text.same[0]).tril()
        unseen = causal.new_zeros(*causal.shape[:2], count * length)
        sees = torch.cat((torch.cat((causal, unseen), 2), torch.cat((seen, self._own(number)), 2)), 1)
        ids = torch.cat((text.ids, self.tokens.flatten(1)), dim=1)
        features = target.masked(ids, torch.cat((text.positions, positions), dim=1), sees)
        return features[:, text.ids.shape[1] :].unflatten(1, (count, length))


@torch.no_grad()
def own_chains(text: Text, anchors: Tensor, first: Tensor, length: int, choose: Callable[[Tensor], Tensor]) -> Chains:
    """Chains of ``length`` own tokens.  anchors ``[R, A]``, -1 for none.

    first ``[R, T, H]``: what each row's first draft token comes from.  choose: tokens ``[N]`` for ``[N, H]``.
    """
    at = anchors.clamp_min(0)
    drafted = first.gather(1, at[..., None].expand(-1, -1, first.shape[-1]))

    def chosen(x: Tensor) -> Tensor:
        return choose(x.flatten(0, 1)).view(anchors.shape)

    chains = Chains(text, anchors, chosen(drafted)[..., None])
    while chains.tokens.shape[-1] < length:
        chains = chains.longer(chosen(chains.drafted(last=True)[:, :, 0]))
    return chains

"""What Mixture of Attentions is trained for: losses at every depth of a block, and how often it drafts the data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vllm_gumiho.drafters.moa.trainable import MoaDrafter
from vllm_gumiho.training.blocks import Chains, MaskedTarget, Text, anchor_rows, own_chains
from vllm_gumiho.training.candidates import Candidates
from vllm_gumiho.training.model import TrainingModel
from vllm_gumiho.training.objective import Labels, Objective, Position, cross_entropies
from vllm_gumiho.training.target_head import LmHead
from vllm_gumiho.training.unrolling import shift, valid_anchors


@dataclass(frozen=True, kw_only=True)
class BlockObjective(Objective):
    """Loss weights as `Objective` has them; ``serial_decay`` to the i is what draft position i weighs, from 0.

    block: fewest and most tokens from one anchor to the next.  shifted: where the first anchor lies is drawn.
    every_first: every token of an answer is an anchor of the first draft position, whatever its block.
    by_count: a position weighs as many as there are anchors that reach it.
    """

    block: tuple[int, int]
    shifted: bool = True
    every_first: bool = True
    by_count: bool = False


def _joined(one: Position, other: Position) -> Position:
    """Anchors of both, as one position's."""
    counts = [at.ce.shape[0] for at in (one, other)]
    share = counts[0] / max(1, sum(counts))
    return Position(
        torch.cat((one.kept, other.kept)),
        torch.cat((one.ce, other.ce)),
        share * one.feature + (1 - share) * other.feature,
        torch.cat((one.agreed, other.agreed)),
    )


def losses(
    drafter: MoaDrafter,
    objective: BlockObjective,
    embed: Tensor,
    lm_head: LmHead,
    batch: dict[str, Tensor],
    features: Tensor,
    frequent: Tensor,
    own_tokens: float,
    target: MaskedTarget,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Training loss of one batch, and its parts for logging.

    features ``[R, T, (1 + m) H]``: the target's, and after them its states.  own_tokens: share of anchors whose chain
    is of the drafter's own tokens, drawn from what it drafts; the target judges them in a pass of its own.
    """
    ids, segments, answer = batch["input_ids"], batch["segments"], batch["answer"]
    hidden, states = features.split((embed.shape[1], features.shape[-1] - embed.shape[1]), dim=-1)
    subset = Candidates.draw(ids[answer], frequent, lm_head.size, objective.candidates, objective.vocabulary)
    labels = Labels(subset, lm_head.rows(subset.ids), hidden.flatten(0, 1), shift(answer, 1).flatten())
    text = Text.of(drafter, embed, batch, states)
    rows = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    anchors = anchor_rows(batch, objective.block, objective.shifted)
    in_block = anchors == rows
    first = valid_anchors(segments, answer, 1) & (in_block | objective.every_first)
    x = text.tokens()
    by_block = text.drafted(x, anchors)
    at_once = text.drafted(x, rows) if objective.every_first else by_block
    # Chains of own tokens take the place of the text's after these anchors.
    own = first & in_block & (torch.rand(ids.shape, device=ids.device) < own_tokens)

    def position(i: int) -> Position:
        valid = valid_anchors(segments, answer, i) & first
        if i > 1:
            valid &= in_block & ~own & (shift(anchors, i - 1) == rows)
        at = valid.flatten().nonzero()[:, 0]
        drafted = (at_once if i == 1 else by_block).flatten(0, 1)[at + i - 1]
        return labels.position(valid[first], drafted, at + i, ids.flatten()[at + i + 1])

    chain = [position(i) for i in range(1, objective.block[1] + 1)]
    if own.any():
        of_own = _own_chain(text, labels, own, at_once, objective, target)
        chain = [_joined(*both) for both in zip(chain, of_own, strict=True)]
    total, parts = torch.zeros((), device=ids.device), {}
    count = max(1, sum(at.ce.shape[0] for at in chain))
    for i, (at, ce) in enumerate(zip(chain, cross_entropies(chain, objective), strict=True)):
        weight = objective.serial_decay**i * (at.ce.shape[0] / count if objective.by_count else 1.0)
        total = total + weight * (objective.ce_weight * ce + objective.feature_weight * at.feature)
        if at.ce.shape[0]:
            parts[f"ce_{i + 1}"], parts[f"feature_{i + 1}"] = ce.detach(), at.feature.detach()
    return total, parts


def _own_chain(
    text: Text, labels: Labels, own: Tensor, first: Tensor, objective: BlockObjective, target: MaskedTarget
) -> list[Position]:
    """Positions of chains of own tokens: the first is the text's and not counted again, but what it leads to is.

    ``agreed`` is here how likely the target keeps the drafted token.
    """
    anchors = nn.utils.rnn.pad_sequence(
        [row.nonzero()[:, 0] for row in own], batch_first=True, padding_value=-1
    )  # [R, A]
    length = objective.block[1]

    def choose(x: Tensor) -> Tensor:
        logits = labels.subset.logits(x, labels.head)
        return labels.subset.tokens(torch.multinomial(logits.softmax(-1), 1)[:, 0])

    chains = own_chains(text, anchors, first, length, choose)
    real = chains.real
    # The last token drafts nothing that is trained.
    read = Chains(text, anchors, chains.tokens[..., :-1])
    drafted, judged = read.drafted()[real], read.judged(target)[real].to(labels.vectors.dtype)  # [A, K - 1, H]
    tokens, count = chains.tokens[real], int(real.sum())
    # How likely the target keeps a token says its distribution of the place before: the text's, or a judged one's.
    at = (anchors + torch.arange(own.shape[0], device=own.device)[:, None] * own.shape[1])[real] + 1
    before = torch.cat((labels.vectors[at][:, None], judged[:, :-1]), dim=1)
    kept_by_target = [_chance(labels, before[:, i], tokens[:, i]) for i in range(length - 1)]
    everyone = torch.ones(count, dtype=torch.bool, device=own.device)
    nobody = Position(~everyone, drafted.new_zeros(0).float(), 0.0 * drafted.sum(), kept_by_target[0])
    chain = [nobody]
    for i in range(length - 1):
        mine = Labels(labels.subset, labels.head, judged[:, i], everyone)
        found = mine.position(everyone, drafted[:, i], torch.arange(count, device=own.device), tokens[:, i + 1])
        chain.append(replace(found, agreed=kept_by_target[i + 1]) if i + 2 < length else found)
    return chain


@torch.no_grad()
def _chance(labels: Labels, hidden: Tensor, tokens: Tensor) -> Tensor:
    """The target's probability of tokens ``[A]`` after hidden states ``[A, H]``, among the candidates."""
    logits = labels.subset.logits(hidden, labels.head)
    ids = labels.subset.ids
    columns = tokens if ids is None else (ids == tokens[:, None]).int().argmax(-1)
    return logits.softmax(-1).gather(1, columns[:, None])[:, 0]


@torch.no_grad()
def hits(
    drafter: MoaDrafter,
    embed: Tensor,
    lm_head: LmHead,
    batch: dict[str, Tensor],
    features: Tensor,
    vocabulary: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy agreement with the data from every token of an answer, whatever the recipe's blocks.

    Returns int64 ``[K]`` each: anchors seen, tokens right, and right along with all positions before (accepted).
    """
    ids, segments, answer = batch["input_ids"], batch["segments"], batch["answer"]
    states = features[..., embed.shape[1] :]
    text = Text.of(drafter, embed, batch, states)
    x, rows = text.tokens(), torch.arange(ids.shape[1], device=ids.device)
    subset = Candidates(vocabulary, None)
    head, count = lm_head.rows(subset.ids), drafter.config.max_draft_tokens
    seen, right, accepted = (torch.zeros(count, dtype=torch.int64) for _ in range(3))
    alive = valid_anchors(segments, answer, 1)
    for i in range(1, count + 1):
        valid = valid_anchors(segments, answer, i)
        at = valid.flatten().nonzero()[:, 0]
        # Row t + i - 1 sees features up to its anchor's, i - 1 rows before; in the first rows there is none.
        drafted = text.drafted(x, (rows - (i - 1)).clamp_min(0).expand_as(ids)).flatten(0, 1)[at + i - 1]
        hit = torch.zeros_like(valid)
        hit[valid] = subset.tokens(head.logits(drafted).argmax(-1)) == shift(ids, i + 1)[valid]
        alive = alive & hit
        seen[i - 1], right[i - 1], accepted[i - 1] = valid.sum(), hit.sum(), alive.sum()
    return seen, right, accepted


class BlockTrainingModel(TrainingModel):
    """A Mixture of Attentions drafter and its frozen target, which judges the drafter's own tokens."""

    objective: BlockObjective

    def training_losses(self, batch: dict[str, Tensor], features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`losses` with the target's tensors and the share of own tokens that is due."""
        embed, lm_head = self._tables(features.device)
        frequent, own = self.frequent.to(features.device), self.own_tokens * self.progress
        target = self._target[0]
        return losses(self.drafter, self.objective, embed, lm_head, batch, features, frequent, own, target)

    def held_out_hits(self, batch: dict[str, Tensor], features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`hits` with the target's tensors."""
        embed, lm_head = self._tables(features.device)
        return hits(self.drafter, embed, lm_head, batch, features, self._vocabulary(features.device))

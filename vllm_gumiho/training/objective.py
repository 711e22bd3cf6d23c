"""What the drafter is trained for: losses on its draft features, and how often it agrees with the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_gumiho.drafters.trainable_layers import SerialDrafter
from vllm_gumiho.training.candidates import Candidates, rows_at_once, soft_cross_entropy
from vllm_gumiho.training.target_head import LmHead
from vllm_gumiho.training.unrolling import Form, draft, shift, valid_anchors


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Loss weights.  Paper's values (section 4.1 and Table 5): feature 1, ce 0.1, head i weighted 0.8^(i+1)/9.

    chain_floor: the cross-entropy of draft position i is a weighted mean over its anchors, of weights
    ``floor + (1 - floor) * prod_{j<i} p_j``, with p_j the probability the drafter gives to the true token at position
    j (not differentiated): a draft token only counts when all before it were accepted.  1 makes it a plain mean.
    serial_decay, head_weights: what a position weighs, whatever its anchors do: serial_decay^i for serial step i (from
    0), about the share of anchors that reach it.  The heads' weights are a scale of their own, which tells among heads
    as long as they do not steer.
    Of the derivative dE/dp_i of the expected accepted length (`vllm_gumiho.tuning.theory.sensitivity`) this takes the
    product alone, raised by the floor, to rank anchors within a position; how positions weigh against one another is
    fixed, and what p_i opens the way to is left out.  The feature loss is a plain mean over a position's anchors.
    heads_steer: the heads' losses train the Transformer too; else they read its features as they are.
    further_steps: serial steps trained beyond those served, each on the draft features of the one before.
    train_serial, train_heads: a part that is not trained is not differentiated, or for the heads not even run.
    vocabulary: token ids that may be drafted; None is all of them.
    """

    form: Form = Form.UNROLLED
    feature_weight: float = 0.1
    ce_weight: float = 1.0
    head_weights: tuple[float, ...] = ()
    chain_floor: float = 1.0
    serial_decay: float = 1.0
    heads_steer: bool = True
    further_steps: int = 0
    train_serial: bool = True
    train_heads: bool = True
    candidates: int = 0
    frequent: int = 0
    vocabulary: Tensor | None = None


@dataclass(frozen=True)
class Position:
    """What one draft position says of the A anchors, N of which it is drafted for.

    kept: which, bool ``[A]``.  ce: cross-entropy of each, ``[N]``.  feature: mean feature loss.  agreed: the
    probability that the drafter gives to the true token, ``[A]``, 1 where it is not drafted.
    """

    kept: Tensor
    ce: Tensor
    feature: Tensor
    agreed: Tensor


def cross_entropies(chain: Sequence[Position], objective: Objective) -> list[Tensor]:
    """The weighted mean cross-entropy of each position of a chain; see ``chain_floor`` of `Objective`."""
    floor = objective.chain_floor
    reached = torch.stack([torch.ones_like(chain[0].agreed), *(at.agreed for at in chain[:-1])]).cumprod(0)
    means = []
    for at, before in zip(chain, reached, strict=True):
        weight = floor + (1 - floor) * before[at.kept]
        # Zero, but of the graph: every process of a distributed run must have a gradient for the same parameters.
        means.append((at.ce * weight).sum() / weight.sum() if at.ce.shape[0] else 0.0 * at.feature)
    return means


class Labels:
    """The target's distributions of a batch, over the candidates, and what draft features say beside them.

    vectors ``[N, H]``: the target's features, of all tokens or of those asked for.
    """

    def __init__(self, subset: Candidates, head: LmHead, vectors: Tensor, wanted: Tensor):
        """head: the rows of the candidates.  wanted bool ``[N]``: of which distributions are needed."""
        self.subset, self.head, self.vectors = subset, head, vectors
        with torch.no_grad():
            rows = wanted.nonzero()[:, 0]
            # The distribution of a place serves every draft position that predicts the token after it.
            self.probs = torch.cat(
                [
                    subset.logits(vectors[some], head).softmax(-1).to(head.weight.dtype)
                    for some in rows.split(rows_at_once(rows))
                ]
            )
            self.row_of = rows.new_full((vectors.shape[0],), -1)
            self.row_of[rows] = torch.arange(rows.shape[0], device=rows.device)

    def position(self, kept: Tensor, x: Tensor, at: Tensor, truth: Tensor) -> Position:
        """Draft features ``[N, H]`` of the anchors ``kept [A]``; at: places of their distributions; truth: tokens."""
        agreed = torch.ones(kept.shape, device=kept.device)
        if x.shape[0] == 0:
            return Position(kept, x.sum(-1), 0.0 * x.sum(), agreed)
        column, known = self.subset.column(truth)
        ce, likely = soft_cross_entropy(x, self.head, self.subset.log_weight, self.probs, self.row_of[at], column)
        agreed = agreed.masked_scatter(kept, likely * known)
        return Position(kept, ce, F.smooth_l1_loss(x.float(), self.vectors[at].float()), agreed)


def losses(
    drafter: SerialDrafter,
    objective: Objective,
    embed: Tensor,
    lm_head: LmHead,
    batch: dict[str, Tensor],
    features: Tensor,
    frequent: Tensor,
    own_tokens: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Training loss of one batch, and its parts for logging.

    own_tokens: share of anchors that go on from the drafter's own greedy token (of the candidates), not the true one.
    """
    ids, segments, answer = batch["input_ids"], batch["segments"], batch["answer"]
    first = valid_anchors(segments, answer, 1)
    subset = Candidates.draw(ids[answer], frequent, lm_head.size, objective.candidates, objective.vocabulary)
    head = lm_head.rows(subset.ids)

    @torch.no_grad()
    def own_token(draft_features: Tensor, true: Tensor) -> Tensor:
        mine = torch.rand(true.shape, device=true.device) < own_tokens
        return true.masked_scatter(mine, subset.tokens(subset.logits(draft_features[mine], head).argmax(-1)))

    drafts = draft(
        drafter,
        embed,
        ids,
        features,
        batch["positions"],
        segments,
        first,
        objective.form,
        objective.train_heads,
        own_token if own_tokens > 0 else None,
        objective.heads_steer,
        objective.further_steps if objective.train_serial else 0,
    )
    hidden = features[..., : embed.shape[1]]
    labels = Labels(subset, head, hidden.flatten(0, 1), shift(answer, 1).flatten())

    def position(i: int, x: Tensor) -> Position:
        valid = valid_anchors(segments, answer, i)
        kept = valid[first]
        # Position t + i of the anchors t: where the target's feature and its distribution are.
        at = valid.flatten().nonzero()[:, 0] + i
        return labels.position(kept, x[kept], at, ids.flatten()[at + 1])

    served = len(drafts.serial)
    serial = [position(i, x) for i, x in enumerate(drafts.serial, 1)]
    further = [position(i, x) for i, x in enumerate(drafts.further, served + 1)]
    heads = [position(i, x) for i, x in enumerate(drafts.heads, served + 1)]
    # A head's position follows the served serial steps, whatever a further step drafts there.
    names = [str(i) if i <= served else f"further_{i}" for i in range(1, served + len(further) + 1)]
    scales = [objective.serial_decay**i if objective.train_serial else 0.0 for i in range(len(names))]
    terms = list(zip(names, scales, serial + further, cross_entropies(serial + further, objective), strict=True))
    names = [str(i) for i in range(served + 1, served + len(heads) + 1)]
    of_heads = cross_entropies(serial + heads, objective)[served:]
    terms += zip(names, objective.head_weights, heads, of_heads, strict=False)

    total, parts = torch.zeros((), device=ids.device), {}
    for name, scale, at, ce in terms:
        if scale:
            total = total + scale * (objective.ce_weight * ce + objective.feature_weight * at.feature)
        if at.ce.shape[0]:
            parts[f"ce_{name}"], parts[f"feature_{name}"] = ce.detach(), at.feature.detach()
    return total, parts


@torch.no_grad()
def hits(
    drafter: SerialDrafter,
    embed: Tensor,
    lm_head: LmHead,
    batch: dict[str, Tensor],
    features: Tensor,
    vocabulary: Tensor | None = None,
    with_heads: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy agreement with the data, per draft position, in the unrolled form whatever the recipe.

    with_heads: measure the heads' positions too, else the serial ones alone.
    Returns int64 ``[K]`` each: anchors seen, tokens right, and right along with all positions before (accepted).
    """
    ids, segments, answer = batch["input_ids"], batch["segments"], batch["answer"]
    first = valid_anchors(segments, answer, 1)
    drafts = draft(drafter, embed, ids, features, batch["positions"], segments, first, with_heads=with_heads)
    count = drafter.config.max_draft_tokens if with_heads else drafter.config.num_serial_steps
    seen, right, accepted = (torch.zeros(count, dtype=torch.int64) for _ in range(3))
    subset = Candidates(vocabulary, None)
    head = lm_head.rows(subset.ids)
    alive = torch.ones(int(first.sum()), dtype=torch.bool, device=ids.device)
    for i in range(1, count + 1):
        valid = valid_anchors(segments, answer, i)[first]
        x = (
            drafts.serial[i - 1]
            if i <= drafter.config.num_serial_steps
            else (drafts.heads[i - 1 - drafter.config.num_serial_steps])
        )
        hit = (subset.tokens(head.logits(x).argmax(-1)) == shift(ids, i + 1)[first]) & valid
        alive &= hit
        seen[i - 1], right[i - 1], accepted[i - 1] = valid.sum(), hit.sum(), alive.sum()
    return seen, right, accepted

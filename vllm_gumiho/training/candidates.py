"""Cross-entropy over a part of the vocabulary, without a tensor of all positions and tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_gumiho.training.target_head import LmHead

# Rows of logits over all candidates that are in memory at once: what a CPU's cache holds, and times that on a GPU.
_LOGIT_ROWS, _ON_GPU = 512, 16


@dataclass(frozen=True)
class Candidates:
    """A subset of the vocabulary for one step's cross-entropy.

    The batch's own labels, the most frequent answer tokens, and uniformly drawn others.  The drawn ones stand for
    all that were left out: ``log_weight`` is the log of how many each stands for, so that the normaliser is an
    unbiased estimate of the full one.  No ``[positions, heads, vocab]`` tensor of the whole vocabulary exists.
    Under a draft vocabulary everything is drawn from it, and a label outside it has no column.
    """

    ids: Tensor | None
    log_weight: Tensor | None
    num_sure: int = 0

    @staticmethod
    def draw(
        labels: Tensor, frequent: Tensor, vocab_size: int, drawn: int, vocabulary: Tensor | None = None
    ) -> Candidates:
        """labels, frequent: token ids; vocabulary: ids that may be drafted, ascending (None: all of them)."""
        size = vocab_size if vocabulary is None else vocabulary.numel()
        if drawn <= 0 or drawn + frequent.numel() >= size:
            return Candidates(vocabulary, None, 0 if vocabulary is None else size)
        sure = torch.unique(torch.cat((labels.flatten(), frequent)))
        rest = torch.ones(vocab_size, dtype=torch.bool, device=labels.device)
        if vocabulary is not None:
            sure = sure[torch.isin(sure, vocabulary)]
            rest = torch.zeros_like(rest).index_fill(0, vocabulary, True)
        rest[sure] = False
        others = rest.nonzero().flatten()
        picked = others[torch.randperm(others.numel(), device=labels.device)[:drawn]]
        log_weight = torch.zeros(sure.numel() + picked.numel(), device=labels.device)
        if picked.numel():
            log_weight[sure.numel() :] = torch.log(torch.tensor(others.numel() / picked.numel()))
        return Candidates(torch.cat((sure, picked)), log_weight, sure.numel())

    def column(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of label tokens, and whether each has one (bool)."""
        if self.ids is None:
            return tokens, torch.ones_like(tokens, dtype=torch.bool)
        sure = self.ids[: self.num_sure]
        columns = torch.searchsorted(sure, tokens).clamp_max(self.num_sure - 1)
        return columns, sure[columns] == tokens

    def tokens(self, columns: Tensor) -> Tensor:
        return columns if self.ids is None else self.ids[columns]

    def logits(self, features: Tensor, head: LmHead) -> Tensor:
        """head: the rows of these tokens."""
        logits = head.logits(features)
        return logits if self.log_weight is None else logits.add_(self.log_weight)


class _SoftCrossEntropy(torch.autograd.Function):
    """The gradient is made along with the value, of a few rows at a time: no ``[N, C]`` tensor is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, head: LmHead, log_weight: Tensor | None, wanted: Tensor, rows: Tensor, truth: Tensor
    ) -> tuple[Tensor, Tensor]:
        losses, likely, gradients = [], [], []
        for x_, rows_, truth_ in zip(*(y.split(rows_at_once(x)) for y in (x.detach(), rows, truth)), strict=True):
            logits = head.logits(x_)
            slope = head.slope(logits) if ctx.needs_input_grad[0] else 1.0
            if log_weight is not None:
                logits.add_(log_weight)
            wants = wanted[rows_]
            total = wants.sum(-1, dtype=torch.float32)
            log_sum = logits.logsumexp(-1)
            losses.append(log_sum * total - torch.linalg.vecdot(wants.float(), logits))
            likely.append((logits.gather(1, truth_[:, None])[:, 0] - log_sum).exp())
            if ctx.needs_input_grad[0]:
                chances = logits.sub_(log_sum[:, None]).exp_().mul_(total[:, None]).sub_(wants)
                if isinstance(slope, Tensor) or slope != 1.0:
                    chances.mul_(slope)
                gradients.append(chances.to(head.weight.dtype) @ head.weight)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        agreed = torch.cat(likely)
        ctx.mark_non_differentiable(agreed)
        return torch.cat(losses), agreed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (per_row,) = ctx.saved_tensors
        return (per_row * gradient[:, None].to(per_row.dtype)).to(per_row.dtype), None, None, None, None, None


def rows_at_once(x: Tensor) -> int:
    """Rows of logits in memory at once, on the device of x."""
    return _LOGIT_ROWS if x.device.type == "cpu" else _ON_GPU * _LOGIT_ROWS


def soft_cross_entropy(
    x: Tensor, head: LmHead, log_weight: Tensor | None, wanted: Tensor, rows: Tensor, truth: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the head's logits of x, plus ``log_weight``, against ``wanted[rows]``; how likely the truth is.

    x ``[N, H]``; head: C rows, not trained; wanted ``[B, C]``; rows, truth ``[N]``.  Returns ``[N]`` twice, the
    second without a gradient.
    """
    return _SoftCrossEntropy.apply(x, head, log_weight, wanted, rows, truth)

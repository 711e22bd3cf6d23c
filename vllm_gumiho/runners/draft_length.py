"""How many of a request's draft tokens are worth verifying, by what the drafter itself says of them.

A token counts only where all before it are right, so that the chance that token j helps is the product of the chances
of tokens 1..j.  A step that verifies n draft tokens of B requests gives B + (sum of their chances) tokens, in time
1 + c (B + n), with c what one more row costs as a share of a step without any.  A token is sent as long as it raises
tokens by time:

    chance (1 + c (B + n)) > c (B + sum of chances so far)

Tokens are taken from the most to the least likely one.  Whether a token is sent depends on those before it in its
request, on other requests and on the distribution that it was drawn from, never on itself or on what follows: the
rejection sampler then gives the target's distribution, as it does for drafts of any length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_gumiho.drafters import PER_REQUEST


def chances_of_greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest tokens ``[N]`` and their probabilities ``[N]`` float32, of logits ``[N, V]``."""
    logits = logits.float()
    best, tokens = logits.max(dim=-1)
    return tokens, (best - logits.logsumexp(dim=-1)).exp()


def chances_of_drawn(probs: Tensor, tokens: Tensor, greedy: Tensor) -> Tensor:
    """What a token drawn from ``probs [N, V]`` is expected to have of it, ``[N]``; its own share where it is greedy.

    tokens ``[N]``, greedy bool ``[N]``.  The drawn token itself must not decide whether it is verified.
    """
    return torch.where(greedy, probs.gather(-1, tokens[:, None])[:, 0], probs.square().sum(dim=-1))


def lengths(chances: np.ndarray, row_cost: float) -> list[int]:
    """How many tokens of each draft to send, for ``chances [B, K]`` of each token given those before it.

    row_cost: c, above 0.
    """
    batch, most = chances.shape
    reached = np.cumprod(chances, axis=1)
    # By chance, and where chances are equal an earlier token first: none is sent without those before it.
    order = np.lexsort((np.tile(np.arange(most), batch), -reached.ravel()))
    sorted_ = reached.ravel()[order]
    tokens = batch + np.concatenate(([0.0], np.cumsum(sorted_)[:-1]))
    time = 1 + row_cost * (batch + np.arange(batch * most))
    pays = sorted_ * time > row_cost * tokens
    count = batch * most if pays.all() else int(pays.argmin())
    sent = np.zeros(batch * most, dtype=np.int64)
    sent[order[:count]] = 1
    return sent.reshape(batch, most).sum(axis=1).tolist()


@dataclass
class DraftLengths:
    """Collects the chances of a step's draft tokens, and says how many of each draft are sent."""

    row_cost: float
    _chances: list[Tensor] = field(default_factory=list)

    @staticmethod
    def asked_for(vllm_config: Any) -> DraftLengths | None:
        """None where every draft has the same length."""
        cost = getattr(vllm_config.speculative_config.draft_model_config.hf_config, PER_REQUEST, None)
        return None if cost is None else DraftLengths(cost)

    def begin(self) -> None:
        """A new step."""
        self._chances = []

    def add(self, chances: Tensor) -> None:
        """Of the next tokens of each request, ``[B * n]``, a request's own side by side."""
        self._chances.append(chances)

    def cut(self, drafted: Tensor, idle: np.ndarray) -> list[list[int]]:
        """``drafted [B, K]`` as lists of the tokens that are sent.  idle: rows whose drafts vLLM drops anyway."""
        batch, most = drafted.shape
        if not most:  # a schedule's K of 0
            return [[] for _ in range(batch)]
        chances = torch.cat([some.view(batch, -1) for some in self._chances], dim=1)
        # One wait for the device: ids are exact in float64.
        chances, drafted = torch.stack([chances.double(), drafted.double()]).cpu()
        chances[idle] = 0.0
        sent = lengths(chances.numpy(), self.row_cost)
        return [tokens[:length] for tokens, length in zip(drafted.long().tolist(), sent, strict=True)]

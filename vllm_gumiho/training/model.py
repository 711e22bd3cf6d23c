"""Drafter and frozen target together, in the shape that Hugging Face Trainer wants."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from vllm_gumiho.drafters.trainable_layers import SerialDrafter
from vllm_gumiho.training.objective import Objective, hits, losses
from vllm_gumiho.training.target import FrozenTarget
from vllm_gumiho.training.target_head import LmHead


class TrainingModel(nn.Module):
    """``forward(**batch) -> {"loss", ...}`` in training, ``{"loss", "logits"}`` with the counts of `hits` else.

    own_tokens: share of anchors that draft on from the drafter's own token when training ends; it rises linearly
    with ``progress`` (0 to 1, set by the trainer).  bf16: bfloat16 autocast, done here and not by Trainer, whose FSDP2
    would instead keep the weights in bfloat16 and leave the target's float32 tensors to meet them.
    """

    def __init__(
        self,
        drafter: SerialDrafter,
        objective: Objective,
        target: FrozenTarget,
        frequent: Tensor,
        own_tokens: float = 0.0,
        bf16: bool = False,
    ):
        super().__init__()
        self.drafter = drafter
        self.objective = objective
        self._target = [target]  # in a list: neither a submodule nor in the state dict
        self.frequent = frequent
        self.own_tokens, self.progress, self.bf16 = own_tokens, 0.0, bf16
        self._cast: tuple[Tensor, LmHead] | None = None

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=self.bf16):
            return self._forward(batch)

    def _forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        features = self.target_features(batch)
        if self.training:
            loss, parts = self.training_losses(batch, features)
            return {"loss": loss, **parts}
        counts = torch.stack(self.held_out_hits(batch, features))
        return {"loss": torch.zeros((), device=features.device), "logits": counts[None].to(features.device)}

    def held_out_hits(self, batch: dict[str, Tensor], features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`hits` with the target's tensors."""
        embed, lm_head = self._tables(features.device)
        vocabulary = self._vocabulary(features.device)
        return hits(self.drafter, embed, lm_head, batch, features, vocabulary, self.objective.train_heads)

    def _vocabulary(self, device: torch.device) -> Tensor | None:
        vocabulary = self.objective.vocabulary
        return None if vocabulary is None else vocabulary.to(device)

    def target_features(self, batch: dict[str, Tensor], cached: bool = True) -> Tensor:
        """The target's features of the batch, ``[R, T, width]``, on its device.  cached: a store may be used."""
        target = self._target[0].to(batch["input_ids"].device)
        features = target.features(batch) if cached else target.compute(batch)
        return features.to(torch.bfloat16 if self.bf16 else target.embed.dtype)

    def target_is_cached(self, batch: dict[str, Tensor]) -> bool:
        """Whether `target_features` needs no pass of the target, as far as files that are there can be read."""
        return self._target[0].is_cached(batch)

    def training_losses(self, batch: dict[str, Tensor], features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`losses` with the target's tensors and the share of own tokens that is due."""
        embed, lm_head = self._tables(features.device)
        return losses(
            self.drafter,
            self.objective,
            embed,
            lm_head,
            batch,
            features,
            self.frequent.to(features.device),
            self.own_tokens * self.progress,
        )

    def _tables(self, device: torch.device) -> tuple[Tensor, LmHead]:
        """The target's embedding and LM head, in the dtype of products: cast once."""
        target = self._target[0]
        if self._cast is None or self._cast[0].device != device:
            dtype = torch.bfloat16 if self.bf16 else target.embed.dtype
            embed, tied = target.embed.to(device, dtype), target.lm_head.weight is target.embed
            head = replace(target.lm_head, weight=embed) if tied else target.lm_head
            self._cast = (embed, head.to(device, dtype))
        return self._cast

"""Drafter and frozen target together, in the shape that Hugging Face Trainer wants."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vllm_gumiho.drafters.trainable_layers import SerialDrafter
from vllm_gumiho.files import whole
from vllm_gumiho.training.objective import Objective, hits, losses
from vllm_gumiho.training.unrolling import serial_mask


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

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        with torch.autocast(batch["input_ids"].device.type, torch.bfloat16, enabled=self.bf16):
            return self._forward(batch)

    def _forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        features = self.target_features(batch)
        if self.training:
            loss, parts = self.training_losses(batch, features)
            return {"loss": loss, **parts}
        target, vocabulary = self._target[0], self.objective.vocabulary
        if vocabulary is not None:
            vocabulary = vocabulary.to(features.device)
        counts = torch.stack(hits(self.drafter, target.embed, target.lm_head, batch, features, vocabulary))
        return {"loss": torch.zeros((), device=features.device), "logits": counts[None].to(features.device)}

    def target_features(self, batch: dict[str, Tensor], cached: bool = True) -> Tensor:
        """The target's features of the batch, ``[R, T, H]``, on its device.  cached: the cache may be used, if any."""
        target = self._target[0].to(batch["input_ids"].device)
        return target.features(batch) if cached else target.compute(batch)

    def target_is_cached(self, batch: dict[str, Tensor]) -> bool:
        """Whether `target_features` needs no pass of the target, as far as files that are there can be read."""
        return self._target[0].is_cached(batch)

    def training_losses(self, batch: dict[str, Tensor], features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`losses` with the target's tensors and the share of own tokens that is due."""
        target = self._target[0]
        return losses(
            self.drafter,
            self.objective,
            target.embed,
            target.lm_head,
            batch,
            features,
            self.frequent.to(features.device),
            self.own_tokens * self.progress,
        )


class FrozenTarget:
    """The target's embedding, LM head and features.

    Features are the hidden states after the final norm (what a vLLM model's ``forward`` returns).  cache: a folder
    in which the features of a row are kept as bfloat16, one file a row named by the row's content, so that later
    epochs and other runs on the same rows need no target pass; None computes them anew each time.
    """

    def __init__(self, model: nn.Module, cache: str | Path | None = None):
        self.model = model.eval().requires_grad_(False)
        self.cache = Path(cache) if cache else None
        self._take_tensors()
        if self.cache:
            self.cache.mkdir(parents=True, exist_ok=True)
            self._identity = self._fingerprint()

    def to(self, device: torch.device) -> FrozenTarget:
        """Move to the device that the batches are on; nothing is done when it is there."""
        if self.embed.device != device:
            self.model.to(device)
            self._take_tensors()
        return self

    @torch.no_grad()
    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """``[R, T, H]`` for rows of ``input_ids``, ``positions`` and ``segments`` ``[R, T]``."""
        if self.cache is None:
            return self.compute(batch)
        files = self._files(self.cache, batch)
        rows = [self._read(file) for file in files]
        if any(row is None for row in rows):
            computed = self.compute(batch)
            for file, row, new in zip(files, rows, computed, strict=True):
                if row is None:
                    with whole(file) as part:
                        save_file({"features": new.to("cpu", torch.bfloat16).contiguous()}, part)
            rows = [self._read(file) for file in files]
        return torch.stack([row for row in rows if row is not None]).to(self.embed.device, self.embed.dtype)

    @torch.no_grad()
    def compute(self, batch: dict[str, Tensor]) -> Tensor:
        """`features` anew, whatever the cache has."""
        mask = torch.zeros(1, device=self.embed.device, dtype=self.embed.dtype).where(
            serial_mask(batch["segments"]), torch.finfo(self.embed.dtype).min
        )
        return self.model.base_model(
            input_ids=batch["input_ids"], position_ids=batch["positions"], attention_mask=mask, use_cache=False
        ).last_hidden_state

    def is_cached(self, batch: dict[str, Tensor]) -> bool:
        """Whether the cache has a file for every row."""
        return self.cache is not None and all(file.is_file() for file in self._files(self.cache, batch))

    @torch.no_grad()
    def probe_scale(self, batch: dict[str, Tensor]) -> Tensor:
        """Root mean square of the features of one batch's tokens."""
        return self.features(batch)[batch["segments"] > 0].float().square().mean().sqrt()

    def _take_tensors(self) -> None:
        self.embed = self.model.get_input_embeddings().weight.detach()
        self.lm_head = self.model.get_output_embeddings().weight.detach()

    def _fingerprint(self) -> bytes:
        """Tells targets apart by their config and the bits of one weight matrix."""
        last = [p for p in self.model.base_model.parameters() if p.ndim == 2][-1].detach()
        digest = hashlib.sha256(repr(sorted(self.model.config.to_diff_dict().items())).encode())
        digest.update(last.float().cpu().numpy().tobytes())
        return digest.digest()

    def _keys(self, batch: dict[str, Tensor]) -> list[str]:
        columns = [batch[name].cpu().numpy() for name in ("input_ids", "positions", "segments")]
        return [
            hashlib.sha256(self._identity + b"".join(row.tobytes() for row in rows)).hexdigest()[:40]
            for rows in zip(*columns, strict=True)
        ]

    def _files(self, cache: Path, batch: dict[str, Tensor]) -> list[Path]:
        return [cache / f"{key}.safetensors" for key in self._keys(batch)]

    @staticmethod
    def _read(file: Path) -> Tensor | None:
        if not file.is_file():
            return None
        try:
            return load_file(file)["features"]
        except (SafetensorError, KeyError, OSError):
            return None

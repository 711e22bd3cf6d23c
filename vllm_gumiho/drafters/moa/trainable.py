"""The Mixture of Attentions drafter as a trainable torch module; state-dict names are the checkpoint's.

Source: Mixture of Attentions for Speculative Decoding (arXiv 2410.03804).

Shapes: R rows, T tokens a row, m target layers read, W their width, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vllm_gumiho.checkpoint.tensors import D2T
from vllm_gumiho.drafters.checkpoints import save_speculators
from vllm_gumiho.drafters.moa import MOA
from vllm_gumiho.drafters.moa.features import LayerFeatures
from vllm_gumiho.drafters.moa.layers import AttentionLayer
from vllm_gumiho.drafters.moa.layout import CHAIN, LAYER_KEY, LayerShape
from vllm_gumiho.drafters.trainable_layers import DrafterConfig


@dataclass(frozen=True)
class MoaConfig:
    """draft: of the self-attention and the cross-attention.  layers: of the layer self-attention."""

    draft: DrafterConfig
    layers: LayerShape
    max_draft_tokens: int = CHAIN


class MoaDrafter(LayerFeatures):
    """Layer self-attention, self-attention and cross-attention; the target's embedding and LM head are no part."""

    def __init__(self, config: MoaConfig):
        c = config.draft
        super().__init__(config.layers, c.hidden_size, c.rope_theta, c.rms_norm_eps)
        self.config = config
        self.self_attention = AttentionLayer(c)
        self.cross_attention = AttentionLayer(c)

    @staticmethod
    def config_for(target: Any, layers: tuple[int, ...], max_draft_tokens: int = CHAIN) -> MoaConfig:
        """Sizes for a target, given by its Hugging Face text config, that read states of these layers.

        The draft layers have the target's shape, and the layer self-attention too, with an MLP of half the inside: it
        runs once for each layer read.
        """
        draft = DrafterConfig.of_target(target, 2, 1, 0, fc_bias=False)
        shape = LayerShape(
            width=draft.hidden_size,
            intermediate_size=draft.intermediate_size // 2,
            num_heads=draft.num_attention_heads,
            num_key_value_heads=draft.num_key_value_heads,
            head_dim=draft.head_dim,
            target_layers=tuple(sorted(layers)),
        )
        return MoaConfig(draft, shape, max_draft_tokens)

    @torch.no_grad()
    def init_weights(self, feature_scale: float, embed_scale: float) -> None:
        """Norms one; the mean over the layers passes through; small residual branches.

        feature_scale, embed_scale: root mean squares of the target's last hidden states and embeddings.
        """
        for layer in (self.self_attention, self.cross_attention, self.layer_self_attention):
            for name, parameter in layer.named_parameters():
                if parameter.ndim == 2:
                    small = name.endswith(("o_proj.weight", "down_proj.weight"))
                    nn.init.normal_(parameter, std=0.02 if small else parameter.shape[1] ** -0.5)
        nn.init.zeros_(self.Ekv2E.bias)
        nn.init.normal_(self.Ekv2E.weight, std=self.Ekv2E.in_features**-0.5)

    def attend_to_tokens(
        self, x: Tensor, positions: Tensor, source: Tensor, source_positions: Tensor, sees: Tensor
    ) -> Tensor:
        """The self-attention layer: embeddings ``[R, Q, H]`` of tokens, over those of ``source [R, S, H]``.

        positions: the tokens' own.  sees bool ``[R, Q, S]``.  Returns ``[R, Q, H]``.
        """
        return self.self_attention(x, positions, source, source_positions, sees[:, None])

    def attend_to_features(
        self, x: Tensor, positions: Tensor, features: Tensor, feature_positions: Tensor, sees: Tensor
    ) -> Tensor:
        """What the LM head drafts from, ``[R, Q, H]``: queries of `attend_to_tokens`, over features ``[R, T, H]``.

        positions: the queries' tokens' own.  sees bool ``[R, Q, T]``.
        """
        return self.cross_attention(x, positions, features, feature_positions, sees[:, None])

    def serial_parameters(self) -> Iterator[nn.Parameter]:
        """All: each pass drafts one token."""
        return self.parameters()

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """None."""
        yield from ()

    def fitted_parameters(self) -> Iterator[nn.Parameter]:
        """None: there is no start in closed form."""
        yield from ()

    def save(self, folder: Path, tensors: dict[str, Tensor], verifier: str, vocabulary: Tensor | None) -> None:
        """Write the trained ``tensors`` in the speculators layout.

        verifier: the target.  vocabulary: ids that may be drafted, ascending; None for all.
        """
        if vocabulary is not None:
            tensors = {**tensors, D2T: vocabulary.cpu() - torch.arange(vocabulary.numel())}
        tokens = {"proposal_methods": [{"speculative_tokens": self.config.max_draft_tokens}]}
        told = {LAYER_KEY: asdict(self.config.layers), "speculators_config": tokens}
        save_speculators(folder, tensors, verifier, self.config.draft.layer_config(), drafter=MOA, config=told)

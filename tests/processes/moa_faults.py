"""The two ways to get the attentions of a Mixture of Attentions chain wrong."""

from __future__ import annotations

from typing import Any


def see_drafted_features() -> None:
    """The cross-attention's sequence grows with the chain: it sees cache slots of tokens that are only drafted."""
    from vllm_gumiho.drafters.moa import context

    context.ending_at = lambda common, lengths: common


def miss_drafted_tokens() -> None:
    """The self-attention's sequence ends with the verified tokens too."""
    from vllm_gumiho.drafters.moa.context import ending_at
    from vllm_gumiho.runners.moa_v1 import MoaProposer

    build = MoaProposer.build_per_group_and_layer_attn_metadata

    def missing(self: Any, common: Any, draft_index: int = 0) -> Any:
        groups, layers = build(self, common, draft_index)
        if draft_index:
            shorter = build(self, ending_at(common, common.seq_lens - draft_index), 0)[1]
            layers |= {name: shorter[name] for name in layers if name != self.model.features_layer}
        return groups, layers

    MoaProposer.build_per_group_and_layer_attn_metadata = missing


FAULTS = {
    "features of drafted tokens are seen": see_drafted_features,
    "drafted tokens are not seen": miss_drafted_tokens,
}

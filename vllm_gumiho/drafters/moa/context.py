"""Attention over features of verified tokens alone, beside a chain of drafted ones that grows.

The keys and values of these features are written into a paged KV cache of their own when the target has verified
tokens.  A draft pass then reads them and writes none: however many tokens are drafted already, its sequence ends where
the verified tokens end.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata, subclass_attention_backend
from vllm.v1.attention.selector import get_attn_backend

from vllm_gumiho.errors import DraftModelError


def ending_at(common: CommonAttentionMetadata, lengths: Tensor) -> CommonAttentionMetadata:
    """The same batch with sequence lengths ``[B]``, none longer than before: bounds on the CPU stay bounds."""
    return common.replace(seq_lens=lengths, _num_computed_tokens_cache=None)


@functools.cache
def verified_only(base: type[AttentionBackend]) -> type[AttentionBackend]:
    """``base`` with metadata that ends at the verified tokens; a backend, and so a builder, of its own."""
    builder: Any = base.get_builder_cls()

    class VerifiedOnlyBuilder(builder):
        # Model runner V2: the verified lengths ``[max requests]`` of this batch, which its CUDA graphs read.
        verified_lens: Tensor | None = None

        def build(self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
            if self.verified_lens is not None:
                lengths = self.verified_lens[: common_attn_metadata.num_reqs]
                common_attn_metadata = ending_at(common_attn_metadata, lengths)
            return super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)

        def build_for_drafting(self, common_attn_metadata: Any, draft_index: int) -> Any:
            """Model runner V1: ``draft_index`` tokens of the sequences are drafted ones."""
            if draft_index:
                lengths = (common_attn_metadata.seq_lens - draft_index).clamp(min=1)
                common_attn_metadata = ending_at(common_attn_metadata, lengths)
            return super().build_for_drafting(common_attn_metadata, draft_index)

    return subclass_attention_backend("VerifiedOnly", base, VerifiedOnlyBuilder)


# Their subclasses too.
_TAKE_KEYS_OF_THEIR_PASS = {"TurboQuantAttentionBackend", "AiterFlashAttentionBackend"}


def check_backend(base: Any) -> None:
    """Raises: DraftModelError for an attention backend that cannot read a cache which was written before its pass."""
    if base.forward_includes_kv_cache_update:
        raise DraftModelError(
            f"attention backend {base.get_name()} writes its KV cache only within a pass, which MoA's attention "
            "to verified tokens cannot use; choose another with attention_backend in the speculative config"
        )
    if not _TAKE_KEYS_OF_THEIR_PASS.isdisjoint(parent.__name__ for parent in base.__mro__):
        raise DraftModelError(
            f"attention backend {base.__name__} takes the keys of its own pass, which MoA's attention to verified "
            "tokens does not have; choose another with attention_backend in the speculative config, or another "
            "kv_cache_dtype"
        )


class VerifiedAttention(Attention):
    """Reads the cache of verified tokens in a pass, and is written by `write` alone."""

    def __init__(self, num_heads: int, head_size: int, num_kv_heads: int, cache_config: Any, prefix: str):
        dtype = torch.get_default_dtype()
        cache_dtype = cache_config.cache_dtype if cache_config is not None else "auto"
        base = get_attn_backend(head_size, dtype, cache_dtype)
        check_backend(base)
        super().__init__(
            num_heads,
            head_size,
            head_size**-0.5,
            num_kv_heads=num_kv_heads,
            cache_config=cache_config,
            prefix=prefix,
            attn_backend=verified_only(base),
        )

    def read(self, query: Tensor) -> Tensor:
        """``[N, heads * D]`` -> ``[N, heads * D]``."""
        return self(query, None, None)

    def write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Keys and values, each ``[N, KV heads * D]``, into cache slots ``[N]``; rows of slot -1 go nowhere."""
        shape = (-1, self.num_kv_heads, self.head_size)
        self.impl.do_kv_cache_update(self, key.view(shape), value.view(shape), self.kv_cache, slots)

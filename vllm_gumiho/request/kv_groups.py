"""Whether vLLM's KV cache groups would tear the draft layers apart, which model runner V1 does not take."""

from __future__ import annotations

from collections import Counter
from typing import Any

FULL = "full_attention"


def tears_drafts_apart(config: Any, draft_layers: int) -> bool:
    """Whether draft layers of full attention fall into several KV cache groups beside this target's layers.

    As vLLM 0.32 and 0.33 do it (`vllm.v1.core.kv_cache_utils`): layers of a kind are dealt out in turn over groups of
    as many layers as the rarest kind has, or all in one where no kind has half as many again as the rarest.  Only a
    target with about as many layers of full attention as of another kind is concerned.

    config: the target's Hugging Face text config.
    """
    count = getattr(config, "num_hidden_layers", 0)
    kinds = Counter(getattr(config, "layer_types", None) or ())
    if not kinds and getattr(config, "sliding_window", None):
        kinds = Counter({"sliding_attention": count})
    if not kinds or set(kinds) == {FULL}:
        return False
    kinds[FULL] += draft_layers
    fewest, most = min(kinds.values()), max(kinds.values())
    size = most if most < 1.5 * fewest else fewest
    return draft_layers > 1 and kinds[FULL] > size

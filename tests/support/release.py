"""The differences between the releases of vLLM that the tests run with; docs/results/vllm-0.33.md explains each."""

from typing import Any

from vllm_gumiho.engines.facts import vllm_version

NEXT = not str(vllm_version()).startswith("0.32")
# A block of the prefix cache is known by the tokens that drafts read behind it too: one whose next token is another
# one is no hit with drafts.  Before, with drafts, the last block that was hit was always computed anew.
HASHES_LOOK_AHEAD = NEXT
# A speculators checkpoint that is served by itself names its target in a hub, not in a folder.
VERIFIER_BY_NAME = NEXT
# Data-parallel engines want a memory node each, of which a small machine has one: vLLM's own switch, which binds cores.
MEMORY_NODES = {"VLLM_CPU_SIM_MULTI_NUMA": "1", "VLLM_CPU_OMP_THREADS_BIND": "auto"} if NEXT else {}


def watermark_contexts(watermarker: Any) -> Any:
    """``[requests, width]``: what the watermark of each request's next draft goes on from."""
    return (watermarker.state if NEXT else watermarker).contexts


def layer_groups(specs: dict[str, Any]) -> list[set[str]]:
    """Names of layers that share a KV cache, as vLLM groups them."""
    if NEXT:
        from vllm.v1.core import kv_cache_planning as module
    else:
        from vllm.v1.core import kv_cache_utils as module
    return [set(group.layer_names) for group in module._get_kv_cache_groups_uniform_page_size(specs)]

"""Attention backends that MoA's pass over verified tokens goes with, of vLLM's own."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from vllm_gumiho.drafters.moa.context import check_backend
from vllm_gumiho.errors import DraftModelError

pytestmark = pytest.mark.next_release
BACKENDS = "vllm.v1.attention.backends."


def backend(module: str, name: str) -> type:
    return getattr(importlib.import_module(BACKENDS + module), name)


@pytest.mark.parametrize(("module", "name", "parent"), [
    ("turboquant_attn", "TurboQuantAttentionBackend", None),
    ("ultraquant_attn", "UltraQuantAttentionBackend", "TurboQuantAttentionBackend"),
    ("rocm_aiter_fa", "AiterFlashAttentionBackend", None),
])  # fmt: skip
def test_backends_that_need_the_keys_of_their_pass_are_refused(module, name, parent):
    """Their keys are None where the cache was written before.  By name: not all can be imported without a GPU."""
    (text,) = (Path(folder, f"{module}.py").read_text() for folder in importlib.import_module(BACKENDS[:-1]).__path__)
    assert f"class {name}({parent or 'AttentionBackend'}):" in text
    made = backend("triton_attn", "TritonAttentionBackend")
    for one in filter(None, (parent, name)):
        made = type(one, (made,), {})
    with pytest.raises(DraftModelError, match=f"attention backend {name} takes the keys of its own pass.*choose anoth"):
        check_backend(made)


@pytest.mark.parametrize(("module", "name"), [
    ("triton_attn", "TritonAttentionBackend"), ("flash_attn", "FlashAttentionBackend"),
    ("flex_attention", "FlexAttentionBackend"), ("cpu_attn", "CPUAttentionBackend"),
])  # fmt: skip
def test_backends_that_write_their_cache_apart_are_taken(module, name):
    check_backend(backend(module, name))


def test_a_backend_that_writes_its_cache_within_the_pass_is_refused():
    class Within(backend("triton_attn", "TritonAttentionBackend")):
        forward_includes_kv_cache_update = True

    with pytest.raises(DraftModelError, match="writes its KV cache only within a pass"):
        check_backend(Within)

"""Stand-ins for what vLLM hands to us, and planted measurements."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tiny import HIDDEN, TARGET_LAYERS, VOCAB

from vllm_gumiho.errors import CheckpointError

PARALLEL = SimpleNamespace(
    pipeline_parallel_size=1,
    decode_context_parallel_size=1,
    nnodes=1,
    distributed_executor_backend="mp",
    data_parallel_size=1,
    data_parallel_size_local=1,
    data_parallel_backend="mp",
)
ROPE = {"rope_type": "default", "rope_theta": 500000.0}


def fake_target(model="org/target", hidden=HIDDEN, vocab=VOCAB, head_dim=32, **text):
    text = {"rope_parameters": ROPE, "rms_norm_eps": 1e-6, "max_position_embeddings": 512} | text
    return SimpleNamespace(
        model=model,
        max_model_len=512,
        hf_text_config=SimpleNamespace(**text),
        get_hidden_size=lambda: hidden,
        get_vocab_size=lambda: vocab,
        get_head_size=lambda: head_dim,
    )


def states_of(target, gives: bool = True, layers: int = TARGET_LAYERS, monkeypatch=None, kind: str | None = None):
    """A stand-in for a target whose class, of vLLM's name ``kind``, gives states of its layers, or does not."""
    target.get_total_num_hidden_layers = lambda: layers
    name = kind or ("LlamaForCausalLM" if gives else "OtherForCausalLM")
    monkeypatch.setattr("vllm.model_executor.model_loader.utils.get_model_cls", lambda _: type(name, (), {}))
    monkeypatch.setattr("vllm.model_executor.models.interfaces.supports_eagle3", lambda _: gives)
    return target


def measurement(off=(10.0, 10.0), idle=(10.1, 10.2), one=(10.3, 30.0)) -> dict:
    def times(pair):
        return {"1": [pair[0] + 5, pair[0], pair[0]], "2": [pair[1], pair[1] + 50]}

    return {
        "off_ms": times(off),
        "on_ms": {"0": times(idle), "1": times(one)},
        "drafts": 200,
        "accepted": [100],
        "runner": "V1",
        "seconds": 1.0,
    }


def rewritten(spec: dict, target=None, parallel=PARALLEL, load_format: str = "dummy") -> dict:
    """vLLM's speculative config for what a user wrote, without an engine."""
    from vllm_gumiho.request import resolve

    return resolve(spec, target or fake_target(), parallel, load_format).for_vllm()


def refusal(spec: dict, target) -> str:
    """Why a request is refused: one line."""
    with pytest.raises(CheckpointError) as error:
        rewritten(spec, target)
    assert "\n" not in str(error.value)
    return str(error.value)

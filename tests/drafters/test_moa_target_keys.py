"""Keys and values of all target layers as the input: what vLLM's engine makes of them drafts what the equations draft.

The equations get the keys and values that transformers caches.  The checkpoint has the published names and shapes.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import tiny_moa
import torch
from engines import CORES, case, generate, greedy, run, step, tokens
from safetensors.torch import load_file, save_file
from tiny_moa import Wanted
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm_gumiho.drafters.moa import target_keys
from vllm_gumiho.drafters.moa.features import LayerFeatures
from vllm_gumiho.drafters.moa.layout import LayerShape
from vllm_gumiho.drafters.moa.target_keys import TargetKeys
from vllm_gumiho.drafters.target_layers import chunk_bytes
from vllm_gumiho.errors import DraftModelError

SCALED = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
SCALED |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
# A scaled rotary embedding; biases of projections; norms of queries and keys.
TARGETS = {
    "llama": {"rope_parameters": SCALED},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 128},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
}
PROMPTS = [[3 + (start * 31 + i * 7 + i // 5) % 150 for i in range(n)] for start, n in enumerate((53, 9, 20))]
CHUNKS = {"max_num_seqs": 4, "block_size": 32, "max_num_batched_tokens": 48, "enable_prefix_caching": True}
# float32 sums in another order, after two layers and a layer attention of random weights.
TOLERANCE = 1e-4


def write_target(folder: Path, kind: str) -> Path:
    """Random in its biases and norms too, so that each shows in keys and values."""
    tiny.write_target(folder, num_hidden_layers=3, **TARGETS[kind])
    weights = load_file(folder / "model.safetensors")
    for tensor in weights.values():
        if tensor.ndim == 1:
            tensor.add_(0.3 * torch.randn_like(tensor))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Target and checkpoint of each kind."""
    base, found = tmp_path_factory.mktemp("keys"), {}
    for kind, changes in TARGETS.items():
        target = write_target(base / kind, kind)
        width = changes.get("hidden_size", tiny.HIDDEN)
        found[kind] = target, tiny_moa.write_published(base / f"moa of {kind}", target, hidden_size=width)
    return found


STEPS = {"chunks": generate(PROMPTS, greedy(8, detokenize=False))}


def recorded(folders, kind: str, **llm) -> dict:
    target, checkpoint = folders[kind]
    asked = {"model": str(checkpoint), "num_speculative_tokens": 3}
    settings = {"model": str(target), "skip_tokenizer_init": True, "speculative_config": asked, **CHUNKS, **llm}
    return {"llm": settings, "steps": STEPS, "record features": True}


@pytest.fixture(scope="module")
def results(tmp_path_factory, folders):
    of_kind = {kind: recorded(folders, kind) for kind in TARGETS}
    plain = {f"{kind} off": case(target, None, **CHUNKS) | {"steps": STEPS} for kind, (target, _) in folders.items()}
    # Operators write their inputs from here on, as a GPU's do.
    last = {"in place": recorded(folders, "llama") | {"plant": "gpu-like"}}
    found = run(tmp_path_factory.mktemp("v1"), of_kind | plain | last)
    workers = {"workers": recorded(folders, "qwen3", tensor_parallel_size=2, max_num_batched_tokens=75)}
    found |= run(tmp_path_factory.mktemp("workers"), workers, env=CORES)
    return found


@pytest.fixture(scope="module")
def results_of_v2(tmp_path_factory, folders):
    return run(tmp_path_factory.mktemp("v2"), {"v2": recorded(folders, "llama")}, "v2")


CASES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "workers": "qwen3", "in place": "llama"}


def assert_drafts_are_those_of_the_cache(found: dict, target: Path, checkpoint: Path) -> list[list[list[float]]]:
    """What each draft came from, for further looks; empty where it is in another process."""
    assert "error" not in found, found.get("error")
    cache = tiny_moa.TargetCache(target)
    reference = tiny_moa.reference(target, checkpoint, layers=(), hidden_size=cache.model.config.hidden_size)
    reference.self_frequencies = cache.model.model.rotary_emb.inv_freq.tolist()
    wanted = Wanted(reference, cache)
    drafts, features = found["drafts"], found["draft features"]
    assert len({tuple(drafted) for _, drafted in drafts}) > 10, "drafts hardly differ"
    for number, (text, drafted) in enumerate(drafts):
        ids, hidden = wanted.after(text, len(drafted))
        assert drafted == ids, f"after {len(text)} tokens"
        if features:
            torch.testing.assert_close(torch.tensor(features[number]), hidden, atol=TOLERANCE, rtol=TOLERANCE)
    return features


@pytest.mark.engine
@pytest.mark.parametrize("name", CASES)
def test_keys_and_values_made_again_draft_what_those_of_the_cache_draft(results, folders, name):
    features = assert_drafts_are_those_of_the_cache(results[name], *folders[CASES[name]])
    assert (features == []) == (name == "workers")
    assert name != "in place" or results[name]["facts"]["gpu-like"]["fused norms"] > 0
    plain = step(results, f"{CASES[name]} off", "chunks")
    assert tokens(step(results, name, "chunks")) == tokens(plain)


@pytest.mark.engine
@pytest.mark.long
def test_keys_and_values_made_again_in_v2(results_of_v2, folders):
    assert results_of_v2["v2"]["facts"]["runner"] == "v2"
    assert assert_drafts_are_those_of_the_cache(results_of_v2["v2"], *folders["llama"])


class Made(TorchDispatchMode):
    """Counts the bytes of everything that is made."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.total += sum(x.numel() * x.element_size() for x in tree_leaves(out) if isinstance(x, Tensor))
        return out


def meta_layer(hidden: int, heads: int, kv_heads: int, size: int) -> SimpleNamespace:
    """A layer of a Llama target, as far as it is read."""
    projection = nn.Linear(hidden, (heads + 2 * kv_heads) * size, bias=False, device="meta", dtype=torch.bfloat16)
    return SimpleNamespace(
        input_layernorm=nn.RMSNorm(hidden, device="meta", dtype=torch.bfloat16),
        self_attn=SimpleNamespace(
            qkv_proj=lambda x: (projection(x), None),
            rotary_emb=lambda positions, key, _: (key * 1, None),
            hidden_size=hidden,
            q_size=heads * size,
            kv_size=kv_heads * size,
            head_dim=size,
            total_num_kv_heads=kv_heads,
        ),
    )


def test_a_chunk_of_the_8b_shape_holds_little(monkeypatch):
    """Even if nothing that a chunk makes were freed before its end; shapes alone, no memory is taken."""
    monkeypatch.setattr(target_keys, "get_tensor_model_parallel_world_size", lambda: 1)
    layers = [meta_layer(4096, 32, 8, 128) for _ in range(32)]
    keys = TargetKeys(SimpleNamespace(model=SimpleNamespace(layers=layers)))
    with torch.device("meta"):
        features = LayerFeatures(LayerShape(2048, 3072, 32, 8, 64, ()), 4096, 5e5, 1e-5, num_layers=32).bfloat16()
        rows = features.chunk(keys.elements_of_token, 2, ranks=1)
        assert 16 <= rows < 8192, "neither a token at a time nor a whole prefill"
        with Made() as made:
            held = keys([torch.empty(rows, 4096, dtype=torch.bfloat16)] * 32, torch.empty(rows, dtype=torch.long))
            assert held.shape == (rows, 32, 2048)
            assert features(held).shape == (rows, 4096)
    assert made.total < 8 * chunk_bytes(torch.device("meta")) == 4 << 30


def test_adapters_of_the_target_are_refused(monkeypatch):
    monkeypatch.setattr(target_keys, "get_tensor_model_parallel_world_size", lambda: 1)
    layer = meta_layer(64, 4, 2, 32)
    layer.self_attn.qkv_proj = SimpleNamespace(base_layer=layer.self_attn.qkv_proj)
    with pytest.raises(DraftModelError, match="which differ with each LoRA adapter; serve without enable_lora"):
        TargetKeys(SimpleNamespace(model=SimpleNamespace(layers=[layer])))


def test_weights_that_offloading_moves_about_are_refused(monkeypatch):
    """vLLM's offloaders give such a layer a forward of its own, which no other module of it has."""
    monkeypatch.setattr(target_keys, "get_tensor_model_parallel_world_size", lambda: 1)
    layer = meta_layer(64, 4, 2, 32)
    layer.forward = lambda *args, **kwargs: None
    with pytest.raises(DraftModelError, match="serve without offload_group_size and cpu_offload_gb"):
        TargetKeys(SimpleNamespace(model=SimpleNamespace(layers=[layer])))

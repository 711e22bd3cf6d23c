"""The published Mixture of Attentions checkpoint's shapes, random weights: loaded by an engine, and drafted from.

The drafter is whole, 264 M weights.  The target has the width, heads and rotary embedding of Llama 3 8B, but two
layers, a small MLP and a small vocabulary: what the drafter reads of a layer has the shape that it has there.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import tiny_moa
import torch
from engines import case, generate, greedy, run, step, tokens
from safetensors.torch import load_file
from tiny_moa import Wanted

from vllm_gumiho.drafters.moa.layout import LayerShape
from vllm_gumiho.drafters.moa.trainable import MoaConfig, MoaDrafter
from vllm_gumiho.drafters.trainable_layers import DrafterConfig

pytestmark = [pytest.mark.engine, pytest.mark.long]
THETA = 500000.0
TARGET = {
    "hidden_size": 4096,
    "intermediate_size": 512,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
}
DRAFT = DrafterConfig(4096, 6144, 32, 4, 128, THETA, 1e-5, tiny.VOCAB, num_layers=2, num_serial_steps=1, num_heads=0)
SHAPE = MoaConfig(DRAFT, LayerShape(2048, 3072, 32, 8, 64, ()))
PROMPTS = [[3 + (start * 31 + i * 7 + i // 5) % 150 for i in range(n)] for start, n in enumerate((19, 5))]
# float32 sums of 4,096 and 6,144 products in another order, through three layers.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """Weights of such a size that a layer's output is about as large as its input."""
    folder = tmp_path_factory.mktemp("8b")
    target = tiny.write_target(folder / "target", std=0.02, **TARGET)
    torch.manual_seed(1)
    made = MoaDrafter(SHAPE)
    with torch.no_grad():
        for parameter in made.parameters():
            matrix = parameter.ndim == 2
            parameter.normal_(std=1.2 * parameter.shape[1] ** -0.5) if matrix else parameter.normal_(1.0, 0.2)
    tensors = {name: tensor.detach() for name, tensor in made.state_dict().items()}
    assert round(sum(tensor.numel() for tensor in tensors.values()) / 1e6, 1) == 264.3
    config = json.loads((target / "config.json").read_text()) | {"architectures": ["MOASpecLlamaForCausalLM"]}
    return target, tiny.write_released(folder / "moa", tensors, config, "safetensors")


def test_the_8b_shape_drafts_what_the_equations_draft(tmp_path, models):
    target, checkpoint = models
    steps = {"plain": generate(PROMPTS, greedy(6, detokenize=False))}
    asked = {"model": str(checkpoint), "num_speculative_tokens": 3}
    llm = {"model": str(target), "skip_tokenizer_init": True, "speculative_config": asked}
    cases = {"on": {"llm": llm, "steps": steps, "record features": True}, "off": case(target, None) | {"steps": steps}}
    found = run(tmp_path, cases)
    assert found["on"]["facts"]["draft"] == ["Eagle3MoaForCausalLM"]
    assert tokens(step(found, "on", "plain")) == tokens(step(found, "off", "plain"))

    cache = tiny_moa.TargetCache(target)
    embed, lm_head = (
        cache.model.get_parameter(f"{name}.weight").detach() for name in ("model.embed_tokens", "lm_head")
    )
    weights = load_file(checkpoint / "model.safetensors")
    wanted = Wanted(tiny_moa.equations(SHAPE, weights, embed, lm_head), cache)
    drafts, features = found["on"]["drafts"], found["on"]["draft features"]
    assert len({tuple(drafted) for _, drafted in drafts}) > 5, "drafts hardly differ"
    for (text, drafted), ours in zip(drafts, features, strict=True):
        ids, hidden = wanted.after(text, len(drafted))
        assert drafted == ids, f"after {len(text)} tokens"
        torch.testing.assert_close(torch.tensor(ours), hidden, atol=TOLERANCE, rtol=TOLERANCE)

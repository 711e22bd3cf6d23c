"""Mixture of Attentions in engine configs: what does not fit is refused before an engine starts, by vLLM's classes."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import tiny
import tiny_moa
from engines import engine_configs

from vllm_gumiho.drafters.moa.layout import MoaSizes, tensor_shapes

# Each class of vLLM is looked at in a process of its own.
pytestmark = [pytest.mark.engine, pytest.mark.long]
# Meta-Llama-3-8B-Instruct, and the drafter published for it as its code makes it.
LLAMA = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
PUBLISHED = MoaSizes(4096, 6144, 4096, 512, 2048, 3072, 2048, 512, (), None)
GEMMA = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "num_hidden_layers": 4}
MIXTRAL = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4, "head_dim": 32}


def write_config(folder: Path, **changes) -> str:
    """A target of which nothing but its config is there."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny.target_config(**changes)))
    return str(folder)


def write_empty(folder: Path, config: dict) -> str:
    """The published drafter at its own size: names and shapes, and a hole for the weights."""
    header, end = {}, 0
    for name, shape in tensor_shapes(PUBLISHED).items():
        size = 2
        for dimension in shape:
            size *= dimension
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    folder.mkdir()
    content = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(8 + len(content) + end)
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["MOASpecLlamaForCausalLM"]}))
    return str(folder)


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moa")
    target = tiny.write_target(folder / "target", num_hidden_layers=tiny_moa.TARGET_LAYERS)
    states = {"model": str(tiny_moa.write(folder / "states", str(target))), "method": "moa"}
    keys = {"model": str(tiny_moa.write_published(folder / "keys", target))}
    wide = {"model": str(tiny_moa.write(folder / "wide", str(target), hidden_size=128)), "method": "moa"}
    big = write_config(folder / "8b", **LLAMA)
    published = {"model": write_empty(folder / "published", tiny.target_config(**LLAMA))}
    cases = {
        "states": {"speculative_config": states},
        "keys": {"speculative_config": keys},
        "8B": {"model": big, "speculative_config": published, "load_format": "dummy"},
        "another width": {"speculative_config": wide},
        "missing layers": {"model": write_config(folder / "short", num_hidden_layers=3), "speculative_config": states},
        "no states": {"model": write_config(folder / "gemma", **GEMMA), "speculative_config": states},
        "other keys": {"model": write_config(folder / "heads", num_key_value_heads=4), "speculative_config": keys},
        "unknown keys": {"model": write_config(folder / "moe", **MIXTRAL), "speculative_config": keys},
        "8B for a tiny one": {"speculative_config": published, "load_format": "dummy"},
    }
    return engine_configs(folder, target, cases)


@pytest.mark.parametrize(("name", "layers"), [("states", [0, 2, 4]), ("keys", [0, 1, 2, 3]), ("8B", [*range(32)])])
def test_the_target_is_asked_for_the_layers_that_are_read(configs, name, layers):
    assert "error" not in configs[name], configs[name]
    assert configs[name]["layers read"] == layers
    assert configs[name]["k"] == 7


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("another width", "hidden size 128 does not fit target"),
        ("missing layers", "reads states of layer 4, and target"),
        ("no states", "which vLLM's class Gemma2ForCausalLM of target"),
        ("other keys", "reads keys and values of 128 numbers a token and layer, and target"),
        ("unknown keys", "which cannot be made again for vLLM's class Qwen3MoeForCausalLM of target"),
        ("8B for a tiny one", "hidden size 4096 does not fit target"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_error(configs, name, said):
    error = configs[name]["error"]
    assert said in error
    assert error.count("; use a ") == 1
    assert "\n" not in error.split("CheckpointError", 1)[-1].strip().split("[type=")[0].strip()

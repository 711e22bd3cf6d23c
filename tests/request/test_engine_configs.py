"""Engine configs that need no engine: targets in formats for GPUs, and what makes vLLM take model runner V1."""

from __future__ import annotations

import json

import predictable
import pytest
from engines import engine_configs, gumiho

FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
FORMATS = {
    "FP8": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "Fp8Config"),
    "FP8 in blocks": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, "Fp8Config",
    ),
    "FP8 by compressed-tensors": (
        {
            "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
            "ignore": ["lm_head"], "config_groups": {"group_0": {
                "targets": ["Linear"], "weights": FLOAT8 | {"strategy": "channel", "dynamic": False},
                "input_activations": FLOAT8 | {"strategy": "token", "dynamic": True},
            }},
        },
        "CompressedTensorsConfig",
    ),
    "NVFP4": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "exclude_modules": []},
        "ModelOptNvFp4Config",
    ),
    "MXFP4": ({"quant_method": "mxfp4"}, "Mxfp4Config"),
}  # fmt: skip

# A checkpoint's own, each made for fewer positions than the 256 that the target is served with.
ROPES = {
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 64},
    "dynamic": {"factor": 1.5},
    "longrope": {
        "short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "original_max_position_embeddings": 64, "factor": 2.0,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    target, checkpoint = predictable.write_target(folder / "target"), predictable.write_checkpoint(folder / "gumiho")
    common = {"dtype": "bfloat16", "speculative_config": gumiho(checkpoint)}
    three = predictable.tiny.drafter_tensors(
        hidden_size=predictable.HIDDEN, vocab_size=predictable.VOCAB, num_serial_steps=3
    )
    deep = gumiho(predictable.tiny.write_released(folder / "deep", three))
    cases = {
        "online": common | {"quantization": "fp8"},
        "plain": common,
        "lora": common | {"enable_lora": True},
        "lora off": {"enable_lora": True},
        "three serial steps": common | {"speculative_config": deep},
    }
    for kind, rope in ROPES.items():
        own = {"rope_parameters": rope | {"rope_type": kind, "rope_theta": 10000.0}, "max_position_embeddings": 128}
        other = predictable.write_checkpoint(folder / f"gumiho with {kind}", config=own)
        cases[kind] = common | {"speculative_config": gumiho(other)}
    for name, (quantization, _) in FORMATS.items():
        quantised = folder / name
        quantised.mkdir()
        config = json.loads((target / "config.json").read_text()) | {"quantization_config": quantization}
        (quantised / "config.json").write_text(json.dumps(config))
        cases[name] = common | {"model": str(quantised)}
    return engine_configs(folder, target, cases)


@pytest.mark.engine
@pytest.mark.parametrize("name", [*FORMATS, "online"])
def test_a_quantised_target_leaves_the_draft_as_it_is(configs, name):
    wanted = "OnlineQuantizationConfig" if name == "online" else FORMATS[name][1]
    assert {key: configs[name][key] for key in ("target quantised by", "draft by")} == {
        "target quantised by": wanted,
        "draft by": None,
    }


@pytest.mark.engine
@pytest.mark.feature("LoRA adapters on the target", "V1")
def test_runner_v1_is_taken_for_what_v2_lacks(configs):
    lacks = {name: set(configs[name]["V2 lacks"]) - set(configs["plain"]["V2 lacks"]) for name in configs}
    assert lacks["lora"] == {"LoRA adapters with Gumiho (V1 does: VLLM_USE_V2_MODEL_RUNNER=0)"}
    assert lacks["three serial steps"] == {"Gumiho with 3 serial steps (V1 does: VLLM_USE_V2_MODEL_RUNNER=0)"}
    assert lacks["lora off"] == set()
    assert {name: configs[name]["V2"] for name in lacks.keys() - FORMATS.keys() - ROPES.keys()} == {
        "plain": True,
        "online": True,
        "lora off": True,
        "lora": False,
        "three serial steps": False,
    }


@pytest.mark.engine
@pytest.mark.parametrize("kind", [*ROPES, "plain"])
def test_a_checkpoints_own_rope_shortens_nothing(configs, kind):
    """In V2, vLLM 0.33 lowers the target's ``max_model_len`` to that of a draft of another rope than the target's."""
    assert configs[kind]["V2"]
    assert configs[kind]["positions"] == 256
    assert configs[kind]["draft positions"] >= 256

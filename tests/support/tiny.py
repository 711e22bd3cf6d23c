"""Tiny random targets and Gumiho checkpoints of every format, written by the tests that use them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from vllm_gumiho.drafters.gumiho.trainable import GumihoDrafter, LayeredGumihoDrafter
from vllm_gumiho.drafters.trainable_layers import DrafterConfig

VOCAB, HIDDEN = 160, 64


def target_config(**changes) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    } | changes


def write_target(folder: Path, seed: int = 0, std: float = 0.08, **changes) -> Path:
    """A random Llama with peaked enough logits that greedy decoding is not a run of ties; ``std`` of its matrices."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(target_config(**changes)))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=std)
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    return folder


def drafter_config(**changes) -> DrafterConfig:
    base = {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB,
    }
    return DrafterConfig(**(base | changes))


def drafter_tensors(seed: int = 0, **changes) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    drafter = GumihoDrafter(drafter_config(**changes))
    drafter.init_weights(1.0, 1.0)
    with torch.no_grad():
        drafter.fc.bias.normal_(std=0.1)
    return {name: tensor.detach().contiguous() for name, tensor in drafter.state_dict().items()}


# Of a target of four layers: its embedding, an inner state, and the last one before the final norm.
LAYERS, TARGET_LAYERS = (0, 2, 4), 4


def layered_tensors(seed: int = 0, layers: tuple[int, ...] = LAYERS, **changes) -> dict[str, Tensor]:
    """Of a drafter whose first serial step reads states; each layer's weighs as much as another's."""
    torch.manual_seed(seed)
    drafter = LayeredGumihoDrafter(drafter_config(target_layers=layers, **changes))
    drafter.init_weights(1.0, 1.0)
    with torch.no_grad():
        for parameter in (drafter.fc.bias, drafter.combine.bias):
            parameter.normal_(std=0.1)
        drafter.combine.weight.normal_(std=drafter.combine.in_features**-0.5)
        for norm in drafter.state_norms.values():
            norm.weight.normal_(1.0, 0.3)
    return {name: tensor.detach().contiguous() for name, tensor in drafter.state_dict().items()}


def write_released(folder: Path, tensors: dict[str, Tensor], config: dict | None = None, suffix: str = "bin") -> Path:
    """The layout of the published checkpoints: one weight file, perhaps a plain Llama config."""
    folder.mkdir(parents=True, exist_ok=True)
    if suffix == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder

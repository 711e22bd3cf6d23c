"""The zoo: a tiny random target of each kind that people serve, in the Hugging Face layout, and a checkpoint for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VOCAB, HIDDEN, LAYERS, WINDOW = 256, 64, 2, 32
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 128,
}
# What every config is given, as far as its class has such a field.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"
BOTH_ROPES = {"rope_parameters": {SLIDING: ROPE, FULL: {"rope_type": "default", "rope_theta": 50000.0}}}


@dataclass(frozen=True)
class Kind:
    """One target.

    model_type: transformers' name.  config: what differs from `COMMON`.  window: of its sliding layers, 0 for none.
    divided: its last hidden state is divided by that before the LM head reads it.  wider: by so many tokens its windows
    are wider in vLLM than in transformers.
    """

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    window: int = 0
    divided: float = 1.0
    wider: int = 0


def _layers(*kinds: str, **more: Any) -> dict[str, Any]:
    return {"layer_types": list(kinds), "num_hidden_layers": len(kinds), "sliding_window": WINDOW, **more}


# Where the width of a head is not a setting of its own: 32, which the CPU build has.
_WIDE: dict[str, Any] = {"head_dim": None, "num_attention_heads": 2, "num_key_value_heads": 2}
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
ZOO: dict[str, Kind] = {
    "llama": Kind("llama"),
    "llama3 rope": Kind("llama", {"rope_parameters": LLAMA3_ROPE}),
    "padded vocabulary": Kind("llama", {"vocab_size": VOCAB + 8}),
    "one token more": Kind("llama", {"vocab_size": VOCAB + 1}),
    "qwen2": Kind("qwen2", {"tie_word_embeddings": True, **_WIDE}),
    "qwen3": Kind("qwen3"),
    "qwen3_moe": Kind("qwen3_moe", {**_MOE, "head_dim": 32, "norm_topk_prob": True}),
    "mistral": Kind("mistral", {"sliding_window": WINDOW}, WINDOW),
    "mixtral": Kind("mixtral", _MOE),
    "gemma2": Kind("gemma2", {
        **_layers(SLIDING, FULL), "tie_word_embeddings": True, "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 32,
    }, WINDOW),
    "gemma3 full": Kind("gemma3_text", {**_layers(FULL, FULL), **BOTH_ROPES, "tie_word_embeddings": True}),
    "gemma3 in turn": Kind("gemma3_text", {
        **_layers(SLIDING, FULL, SLIDING, FULL), **BOTH_ROPES, "tie_word_embeddings": True}, WINDOW),
    "gemma3 5:1": Kind("gemma3_text", {
        **_layers(*[SLIDING] * 5, FULL), **BOTH_ROPES, "tie_word_embeddings": True}, WINDOW),
    "gemma3 sliding": Kind("gemma3_text", {**_layers(SLIDING, SLIDING), **BOTH_ROPES, "tie_word_embeddings": True},
                           WINDOW),
    "cohere2": Kind("cohere2", {**_layers(SLIDING, FULL), "logit_scale": 0.25, "tie_word_embeddings": True}, WINDOW,
                    wider=1),
    "phi": Kind("phi", {"partial_rotary_factor": 0.5, **_WIDE}),
    "phi3": Kind("phi3", {"sliding_window": WINDOW, **_WIDE}, WINDOW),
    "granite": Kind("granite", {
        "logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1,
        **_WIDE,
    }),
    "olmo2": Kind("olmo2", {**_WIDE}),
    "smollm3": Kind("smollm3", {**_WIDE, "no_rope_layer_interval": 2}),
    "stablelm": Kind("stablelm", {**_WIDE}),
    "starcoder2": Kind("starcoder2", {"sliding_window": WINDOW, **_WIDE}, WINDOW),
    "exaone4": Kind("exaone4", {**_layers(SLIDING, FULL), "sliding_window_pattern": 2, **_WIDE}, WINDOW),
    "glm4": Kind("glm4"),
    "gpt2": Kind("gpt2", {
        "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 2, "n_positions": 512, "tie_word_embeddings": True}),
    "opt": Kind("opt", {**_WIDE, "ffn_dim": 96, "word_embed_proj_dim": HIDDEN}),
    "gpt_neox": Kind("gpt_neox", {**_WIDE}),
    "gpt_oss": Kind("gpt_oss", {
        **_layers(SLIDING, FULL), **_MOE, "head_dim": 32, "intermediate_size": 64, "rope_parameters": YARN}, WINDOW),
    "minicpm3": Kind("minicpm3", {
        "scale_emb": 2.0, "dim_model_base": 16, "scale_depth": 1.4, "q_lora_rank": 32, "kv_lora_rank": 32,
        "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, **_WIDE,
    }, divided=4.0),
    "qwen2_vl": Kind("qwen2_vl"),
}  # fmt: skip


def config_of(kind: Kind) -> Any:
    """Its Hugging Face config."""
    from transformers import AutoConfig

    if kind.model_type == "qwen2_vl":
        return _vision_config()
    wanted = {**COMMON, **kind.config}
    known = set(AutoConfig.for_model(kind.model_type).to_dict()) | set(kind.config)
    given = {key: value for key, value in wanted.items() if key in known and value is not None}
    if "rope_parameters" in known and "rope_parameters" not in given:
        given["rope_parameters"] = dict(ROPE)
        if "partial_rotary_factor" in given:
            given["rope_parameters"]["partial_rotary_factor"] = given.pop("partial_rotary_factor")
    return AutoConfig.for_model(kind.model_type, **given)


def _vision_config() -> Any:
    from transformers import AutoConfig

    text = {key: value for key, value in (COMMON | _WIDE).items() if key not in ("head_dim", "pad_token_id")}
    text["rope_parameters"] = {**ROPE, "mrope_section": [4, 6, 6]}
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": HIDDEN, "patch_size": 14, "mlp_ratio": 2}
    tokens = {"vision_start_token_id": 250, "vision_end_token_id": 251, "image_token_id": 252, "video_token_id": 253}
    return AutoConfig.for_model("qwen2_vl", text_config=text, vision_config=vision, **tokens)


def new_model(kind: Kind, seed: int = 0) -> torch.nn.Module:
    """Random, of logits peaked enough that greedy decoding is not a run of ties; biases and norms are random too."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(seed)
    config = config_of(kind)
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    model = (AutoModelForCausalLM if causal else AutoModelForImageTextToText).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.12)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def write(folder: Path, kind: Kind, seed: int = 0) -> Path:
    """The target's folder."""
    new_model(kind, seed).save_pretrained(folder)
    return folder


def write_checkpoint(folder: Path, target: Path, seed: int = 0) -> Path:
    """A random Gumiho checkpoint for a target's folder, as training writes it: sizes by its config alone."""
    from transformers import AutoConfig

    from vllm_gumiho.drafters.gumiho.trainable import GumihoDrafter

    torch.manual_seed(seed)
    text = AutoConfig.from_pretrained(target).get_text_config()
    drafter = GumihoDrafter(GumihoDrafter.config_for(text, 2, 2, 5))
    drafter.init_weights(1.0, 1.0)
    with torch.no_grad():
        drafter.fc.bias.normal_(std=0.1)
    tensors = {name: tensor.detach().contiguous() for name, tensor in drafter.state_dict().items()}
    drafter.save(folder, tensors, str(target), None)
    return folder

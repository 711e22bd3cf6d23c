"""Mixture of Attentions (ICLR 2025, arXiv 2410.03804): drafted tokens attend to features of verified tokens alone.

layout: its tensors.  features: from the target's layers to a feature.  context, model: serving.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_gumiho.drafters.target_layers import LAYERS_KEY, check_layers
from vllm_gumiho.errors import CheckpointError

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig

    from vllm_gumiho.checkpoint.files import TensorInfo
    from vllm_gumiho.drafters.moa.layout import MoaSizes
    from vllm_gumiho.drafters.protocol import RoundBytes


# vLLM's classes whose layers have input_layernorm, self_attn.qkv_proj, at times k_norm, and one rotary embedding.
_GIVE_KEYS = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_OF_TARGET_LAYERS = ("num_key_value_heads", "intermediate_size", "num_hidden_layers", "architectures")


class Moa:
    """The entry of Mixture of Attentions in the registry; see `vllm_gumiho.drafters.protocol.Drafter`."""

    name = "moa"
    title = "MoA"
    architecture = "Eagle3MoaForCausalLM"
    vllm_method = "eagle3"
    model = "vllm_gumiho.drafters.moa.model:MoaForCausalLM"
    trainable = "vllm_gumiho.drafters.moa.trainable:MoaDrafter"
    runners = {
        "vllm.v1.spec_decode.eagle:EagleProposer": "vllm_gumiho.runners.moa_v1:MoaProposer",
        "vllm.v1.worker.gpu.spec_decode.eagle.speculator:EagleSpeculator": "vllm_gumiho.runners.moa_v2:MoaSpeculator",
    }
    reads = "the input states of some of the target's layers, or the keys and values of all"
    drafts = "a token a pass, each from features of verified tokens"
    released: Mapping[str, str] = {
        "meta-llama/Meta-Llama-3-8B-Instruct": "huawei-noah/MOASpec-Llama-3-8B-Instruct",
    }
    hub_prefix = "huawei-noah/moaspec-"
    also_named: Collection[str] = ()
    takes_eight_bits = False
    config_keys = (LAYERS_KEY, "layer_attention")

    def round_bytes(self, sizes: Any, vocab_size: int, weights: str) -> RoundBytes:
        """Not asked: its matrices have the engine's dtype."""
        raise NotImplementedError

    def has_tensors(self, names: Collection[str]) -> bool:
        """By the cross-attention or the layer self-attention."""
        from vllm_gumiho.drafters.moa.layout import has_tensors

        return has_tensors(names)

    def read_sizes(self, where: Path, infos: dict[str, TensorInfo], config: Mapping[str, Any] | None) -> MoaSizes:
        """See `layout.read_sizes`."""
        from vllm_gumiho.drafters.moa.layout import read_sizes

        return read_sizes(where, infos, config)

    def config_fields(self, sizes: MoaSizes, num_attention_heads: int) -> dict[str, Any]:
        """The layers whose states vLLM is to give, and the layer self-attention."""
        values = (list(sizes.target_layers), asdict(sizes.layer_shape(num_attention_heads)))
        return dict(zip(self.config_keys, values, strict=True))

    def layer_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The published config.json is the target's own, of which draft layers have other key heads and MLPs."""
        return {key: value for key, value in config.items() if key not in _OF_TARGET_LAYERS}

    def fit(self, where: Path, sizes: MoaSizes, target: ModelConfig, parallel: ParallelConfig | None) -> dict[str, Any]:
        """All layers of the target, where the checkpoint reads keys and values; else it names its layers itself.

        Raises: CheckpointError where the target does not have or does not give what is read, and for split contexts.
        """
        kind = check_layers(where, sizes.target_layers, target)
        if parallel is not None and parallel.decode_context_parallel_size > 1:
            raise CheckpointError(
                f"{where}: attends to verified tokens alone, whose lengths vLLM does not split over ranks; use "
                f"decode_context_parallel_size=1 (not {parallel.decode_context_parallel_size})"
            )
        if sizes.target_layers:
            return {}
        if kind not in _GIVE_KEYS:
            raise CheckpointError(
                f"{where}: reads the keys and values of all layers, which cannot be made again for vLLM's class "
                f"{kind} of target {target.model} (for {', '.join(_GIVE_KEYS)}); use a checkpoint that reads "
                "states (it has state_norms)"
            )
        heads, size = target.get_total_num_kv_heads(), target.get_head_size()
        if sizes.layer_width != 2 * heads * size:
            raise CheckpointError(
                f"{where}: reads keys and values of {sizes.layer_width} numbers a token and layer, and target "
                f"{target.model} has {2 * heads * size} ({heads} heads of {size}); use a checkpoint trained for this "
                "target"
            )
        return {LAYERS_KEY: list(range(target.get_total_num_hidden_layers()))}

    def lacking_in_v2(self, vllm_config: Any) -> list[str]:
        """LoRA adapters, as with every draft model of vLLM 0.32's V2."""
        lora = vllm_config.lora_config is not None
        return ["LoRA adapters with MoA (V1 does: VLLM_USE_V2_MODEL_RUNNER=0)"] if lora else []


MOA = Moa()

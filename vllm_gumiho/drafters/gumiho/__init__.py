"""Gumiho (ICML 2025, arXiv 2503.10135): two serial Transformer steps, then MLP heads that draft the rest at once.

layout: its tensors.  model, heads, layered_model: serving.  trainable: training.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_gumiho.drafters.target_layers import LAYERS_KEY, check_layers
from vllm_gumiho.errors import CheckpointError

if TYPE_CHECKING:
    from vllm_gumiho.checkpoint.files import TensorInfo
    from vllm_gumiho.drafters.gumiho.layout import GumihoSizes
    from vllm_gumiho.drafters.protocol import RoundBytes

_OWN_KEYS = ("num_serial_steps", "num_parallel_heads", "fc_bias")
# Model runner V2 records its serial decode step together with the heads, for so many serial steps.
V2_SERIAL_STEPS = 2


def _is_gumiho(names: Collection[str]) -> bool:
    from vllm_gumiho.drafters.gumiho.layout import STAGE

    return "fc.weight" in names and any(STAGE.fullmatch(name) for name in names)


def _reads_layers(names: Collection[str]) -> bool:
    from vllm_gumiho.drafters.gumiho.layout import COMBINE, STATE_NORM

    return any(name.startswith(f"{COMBINE}.") or STATE_NORM.fullmatch(name) for name in names)


class Gumiho:
    """The entry of Gumiho in the registry; see `vllm_gumiho.drafters.protocol.Drafter`."""

    name = "gumiho"
    title = "Gumiho"
    architecture = "EagleGumihoForCausalLM"
    vllm_method = "eagle"
    model = "vllm_gumiho.drafters.gumiho.model:GumihoForCausalLM"
    trainable = "vllm_gumiho.drafters.gumiho.trainable:GumihoDrafter"
    runners = {
        "vllm.v1.spec_decode.eagle:EagleProposer": "vllm_gumiho.runners.v1:GumihoProposer",
        "vllm.v1.worker.gpu.spec_decode.eagle.speculator:EagleSpeculator": "vllm_gumiho.runners.v2:GumihoSpeculator",
    }
    reads = "the target's last hidden state, after its final norm"
    drafts = "a token a serial pass, then one from each head in one pass"
    released: Mapping[str, str] = {
        "lmsys/vicuna-7b-v1.3": "amd/Gumiho-vicuna-7b",
        "lmsys/vicuna-13b-v1.3": "amd/Gumiho-vicuna-13b",
        "meta-llama/Llama-2-7b-chat-hf": "amd/Gumiho-llama2-7b",
        "meta-llama/Llama-2-13b-chat-hf": "amd/Gumiho-llama2-13b",
        "meta-llama/Llama-2-70b-chat-hf": "amd/Gumiho-llama2-70b",
        "meta-llama/Meta-Llama-3-8B-Instruct": "amd/Gumiho-llama3-8b",
        "meta-llama/Meta-Llama-3-70B-Instruct": "amd/Gumiho-llama3-70b",
    }
    hub_prefix = "amd/gumiho-"
    also_named: Collection[str] = ()
    reads_layers = False
    takes_eight_bits = True
    config_keys: tuple[str, ...] = _OWN_KEYS

    def round_bytes(self, sizes: GumihoSizes, vocab_size: int, weights: str) -> RoundBytes:
        """See `round_bytes.round_bytes`."""
        from vllm_gumiho.drafters.gumiho.round_bytes import round_bytes

        return round_bytes(sizes, vocab_size, weights)

    def has_tensors(self, names: Collection[str]) -> bool:
        """By ``fc`` and any stage of a head, where nothing reads inner layers."""
        return _is_gumiho(names) and not _reads_layers(names)

    def read_sizes(self, where: Path, infos: dict[str, TensorInfo], config: Mapping[str, Any] | None) -> GumihoSizes:
        """See `layout.read_sizes`; the tensors tell everything."""
        from vllm_gumiho.drafters.gumiho.layout import read_sizes

        sizes = read_sizes(where, infos)
        if bool(sizes.target_layers) != self.reads_layers:
            found = "with" if sizes.target_layers else "without"
            raise CheckpointError(
                f"{where}: config.json says {self.name!r}, and its tensors are of another drafter ({found} "
                "state_norms); fetch it again, or convert the tensors without this config.json"
            )
        return sizes

    def layer_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """All of it: a Llama config of the draft layers."""
        return config

    def fit(self, where: Path, sizes: GumihoSizes, target: Any, parallel: Any) -> dict[str, Any]:
        """Any target has a last hidden state."""
        return {}

    def config_fields(self, sizes: GumihoSizes, num_attention_heads: int) -> dict[str, Any]:
        """Serial steps, heads, and whether ``fc`` has a bias."""
        return dict(zip(_OWN_KEYS, (sizes.num_serial_steps, sizes.num_heads, sizes.fc_bias), strict=True))

    def lacking_in_v2(self, vllm_config: Any) -> list[str]:
        """LoRA adapters, and other numbers of serial steps than two.

        V2 of vLLM 0.32 maps LoRA adapters to one row of logits a request, where verification has K + 1: an adapter of
        the LM head would change the text.
        """
        serial = vllm_config.speculative_config.draft_model_config.hf_config.num_serial_steps
        lacking = [
            *(["LoRA adapters with Gumiho"] if vllm_config.lora_config is not None else ()),
            *([f"Gumiho with {serial} serial steps"] if serial != V2_SERIAL_STEPS else ()),
        ]
        return [f"{feature} (V1 does: VLLM_USE_V2_MODEL_RUNNER=0)" for feature in lacking]


class LayeredGumiho(Gumiho):
    """Gumiho whose first serial step reads several of the target's layers; all else is Gumiho's.

    Served as vLLM's ``eagle3``, which gives the states.  A request for ``gumiho`` takes such a checkpoint too.
    """

    name = "gumiho-layers"
    title = "Layered Gumiho"
    architecture = "Eagle3GumihoForCausalLM"
    vllm_method = "eagle3"
    model = "vllm_gumiho.drafters.gumiho.layered_model:LayeredGumihoForCausalLM"
    trainable = "vllm_gumiho.drafters.gumiho.trainable:LayeredGumihoDrafter"
    runners = {
        **Gumiho.runners,
        "vllm.v1.spec_decode.eagle:EagleProposer": "vllm_gumiho.runners.v1:LayeredGumihoProposer",
    }
    reads = "the input states of some of the target's layers"
    released: Mapping[str, str] = {}
    # None is published.
    hub_prefix = "gumiho-layers:"
    also_named = (Gumiho.name,)
    reads_layers = True
    config_keys = (*_OWN_KEYS, LAYERS_KEY)

    def has_tensors(self, names: Collection[str]) -> bool:
        """By Gumiho's, and what reads inner layers."""
        return _is_gumiho(names) and _reads_layers(names)

    def fit(self, where: Path, sizes: GumihoSizes, target: Any, parallel: Any) -> dict[str, Any]:
        """The checkpoint names its layers itself.  Raises: CheckpointError where the target does not give them."""
        check_layers(where, sizes.target_layers, target)
        return {}

    def config_fields(self, sizes: GumihoSizes, num_attention_heads: int) -> dict[str, Any]:
        """Gumiho's, and the layers whose states vLLM is to give."""
        return super().config_fields(sizes, num_attention_heads) | {LAYERS_KEY: list(sizes.target_layers)}


GUMIHO = Gumiho()
LAYERED_GUMIHO = LayeredGumiho()

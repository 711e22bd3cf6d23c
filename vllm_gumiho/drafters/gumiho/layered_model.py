"""Gumiho whose first serial step reads several of the target's layers, as a vLLM model.

A feature is made of the target's states once a token is verified; from there on all is Gumiho's, and later serial steps
go on from the drafter's own features.

Shapes: N tokens, m target layers read, H hidden size.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from vllm_gumiho.drafters.gumiho.layout import COMBINE
from vllm_gumiho.drafters.gumiho.model import GumihoForCausalLM, layer_quant_config
from vllm_gumiho.drafters.target_layers import LAYERS_KEY, chunk_bytes


class FirstStep(nn.Module):
    """``state_norms`` and ``combine``, under their checkpoint names."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = vllm_config.speculative_config.draft_model_config.hf_config
        layers, hidden = getattr(config, LAYERS_KEY), config.hidden_size
        self.num_states, self.hidden_size = len(layers), hidden
        self.state_norms = nn.ModuleDict({str(layer): RMSNorm(hidden, eps=config.rms_norm_eps) for layer in layers})
        self.combine = ReplicatedLinear(
            self.num_states * hidden,
            hidden,
            bias=True,
            params_dtype=vllm_config.model_config.dtype,
            quant_config=layer_quant_config(vllm_config),
            prefix=maybe_prefix(prefix, COMBINE),
            return_bias=False,
        )

    def forward(self, states: Tensor) -> Tensor:
        """States ``[N, m * H]``, layer by layer -> features ``[N, H]``."""
        size = max(1, chunk_bytes(states.device) // (states.shape[1] * states.element_size()))
        if states.shape[0] <= size:
            return self._combined(states)
        features = states.new_empty(states.shape[0], self.hidden_size)
        for first in range(0, states.shape[0], size):
            features[first : first + size] = self._combined(states[first : first + size])
        return features

    def _combined(self, states: Tensor) -> Tensor:
        norms, parts = self.state_norms.values(), states.unflatten(-1, (self.num_states, -1)).unbind(1)
        normed = [norm(part.contiguous()) for norm, part in zip(norms, parts, strict=True)]
        return self.combine(torch.cat(normed, dim=-1))


class LayeredGumihoForCausalLM(GumihoForCausalLM, Eagle3LlamaForCausalLM):
    """Gumiho's draft model behind `FirstStep`.

    One of vLLM's EAGLE-3 models by class, as its runners ask, and by nothing else.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.first_step = FirstStep(vllm_config, prefix)
        self.weight_bytes += self._bytes_of(self.first_step)

    def combine_hidden_states(self, hidden_states: Tensor) -> Tensor:
        """vLLM's hook: states ``[N, m * H]`` of verified tokens -> the features ``[N, H]`` that are drafted from."""
        return self.first_step(hidden_states)

    def finish_loading(self) -> str:
        """As the base class, with the layers for the log."""
        named = ", ".join(self.first_step.state_norms)
        return f"features of layers {named}, {super().finish_loading()}"

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors under their checkpoint names; returns the names of the parameters filled."""
        own: list[tuple[str, Tensor]] = []

        def others() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name.startswith((f"{COMBINE}.", "state_norms.")):
                    own.append((name, tensor))
                else:
                    yield name, tensor

        loaded = super().load_weights(others())
        return loaded | {f"first_step.{name}" for name in AutoWeightsLoader(self.first_step).load_weights(own)}

"""The Gumiho draft model as a vLLM model.

Source: Gumiho (arXiv 2503.10135) section 3; tensor facts from the released checkpoints.  The embedding and the LM
head are the target's: vLLM's EAGLE loading puts the target's modules in place after the weights are loaded.

Annotations are real types here, not strings: vLLM's torch.compile support reads them.
"""

import os
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.llama_eagle import LlamaDecoderLayer, LlamaModel
from vllm.model_executor.models.utils import AutoWeightsLoader, get_draft_quant_config, maybe_prefix

from vllm_gumiho.kernels.lm_head_argmax import lm_head_argmax
from vllm_gumiho.kernels.parallel_heads import (
    HEAD_STAGES,
    HeadsPath,
    HeadWeights,
    choose_path,
    new_counters,
    parallel_heads,
)

KERNELS_VARIABLE = "VLLM_GUMIHO_KERNELS"
logger = init_logger("vllm.vllm_gumiho")

_STAGE = re.compile(r"mlp\.(\d+)\.(\d+)\.linear\.(weight|bias)")


def use_kernels() -> bool:
    """Whether the Triton kernels are asked for; off until they have been proven on GPUs."""
    return os.environ.get(KERNELS_VARIABLE, "0") == "1"


class TargetOwned(nn.Module):
    """Stands where a module of the target will be put; has the weight's shape and no memory."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = torch.empty(*shape, device="meta")


class ParallelHeads(nn.Module):
    """Weights of all heads, stacked so that one batched product a stage serves them."""

    def __init__(self, num_heads: int, num_serial_steps: int, hidden_size: int, dtype: torch.dtype):
        super().__init__()

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)

        self.first_weight = parameter(num_heads, hidden_size, num_serial_steps * hidden_size)
        self.first_bias = parameter(num_heads, hidden_size)
        self.weight = parameter(num_heads, HEAD_STAGES - 1, hidden_size, hidden_size)
        self.bias = parameter(num_heads, HEAD_STAGES - 1, hidden_size)
        self.path: HeadsPath | None = None if use_kernels() else HeadsPath.BATCHED
        self.counters = new_counters(self.bias.device)

    def destination(self, head: int, stage: int, kind: str) -> Tensor:
        """View that holds the tensor ``mlp.{head}.{stage}.linear.{kind}``."""
        if stage == 0:
            return (self.first_weight if kind == "weight" else self.first_bias)[head]
        return (self.weight if kind == "weight" else self.bias)[head, stage - 1]

    def forward(self, m: Tensor, count: int) -> Tensor:
        """``m [B, S*H]`` -> ``[count, B, H]``, the first ``count`` heads."""
        return parallel_heads(m, self.weights.take(count), path=self.path, counters=self.counters)

    @property
    def weights(self) -> HeadWeights:
        return HeadWeights(self.first_weight, self.first_bias, self.weight, self.bias)

    def describe_path(self) -> str:
        """How the heads will be computed, and why, for the log."""
        if self.path is not None:
            return f"{self.path.value} (set {KERNELS_VARIABLE}=1 for the Triton kernels)"
        path, reason = choose_path(self.first_bias.new_empty(1, self.first_weight.shape[-1]), self.weights)
        return f"{path.value} ({reason})"


@support_torch_compile
class GumihoModel(nn.Module):
    """Embedding, ``fc`` and the serial decoder layers."""

    hf_to_vllm_mapper = LlamaModel.hf_to_vllm_mapper

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", start_layer_id: int = 0):
        super().__init__()
        config = vllm_config.speculative_config.draft_model_config.hf_config
        self.config = config
        self.embed_tokens = TargetOwned(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(
                vllm_config, i == 0, prefix=maybe_prefix(prefix, f"layers.{i + start_layer_id}"), config=config
            )
            for i in range(config.num_hidden_layers)
        )
        self.fc = ReplicatedLinear(
            2 * config.hidden_size,
            config.hidden_size,
            bias=config.fc_bias,
            params_dtype=vllm_config.model_config.dtype,
            quant_config=get_draft_quant_config(vllm_config),
            prefix=maybe_prefix(prefix, "fc"),
            return_bias=False,
        )

    def fuse(self, input_ids: Tensor, hidden_states: Tensor) -> Tensor:
        """``o = fc(cat[E[x], h])``: ids ``[N]``, features ``[N, H]`` -> ``[N, H]``."""
        return self.fc(torch.cat((self.embed_tokens(input_ids), hidden_states), dim=-1))

    def forward(self, input_ids: Tensor, positions: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Draft features h and fused inputs o, both ``[N, H]``."""
        fused = self.fuse(input_ids, hidden_states)
        hidden_states, residual = fused, None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return hidden_states + residual, fused

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


class GumihoForCausalLM(LlamaForCausalLM):
    """Draft model: serial Transformer, parallel heads, the target's embedding and LM head.

    ``fused`` ``[max_num_seqs, H]`` holds the o vectors of the last pass's first rows, which the heads read again; a
    buffer of its own, so that replaying a CUDA graph of the pass fills it too.
    """

    has_own_embed_tokens = False
    has_own_lm_head = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        nn.Module.__init__(self)
        config = vllm_config.speculative_config.draft_model_config.hf_config
        self.config = config
        config.draft_vocab_size = config.vocab_size
        self.model = GumihoModel(
            vllm_config=vllm_config,
            prefix=maybe_prefix(prefix, "model"),
            start_layer_id=vllm_config.model_config.get_num_layers(vllm_config.parallel_config),
        )
        self.heads = ParallelHeads(
            config.num_parallel_heads, config.num_serial_steps, config.hidden_size, vllm_config.model_config.dtype
        )
        self.lm_head = TargetOwned(config.vocab_size, config.hidden_size)
        self.logits_processor = LogitsProcessor(config.vocab_size, scale=getattr(config, "logit_scale", 1.0))
        self.argmax_kernel = use_kernels() and get_tensor_model_parallel_world_size() == 1
        rows = vllm_config.scheduler_config.max_num_seqs
        self.fused = torch.zeros(rows, config.hidden_size, dtype=vllm_config.model_config.dtype)

    @property
    def num_serial_steps(self) -> int:
        return self.config.num_serial_steps

    def forward(
        self, input_ids: Tensor, positions: Tensor, hidden_states: Tensor, inputs_embeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """ids ``[N]``, positions ``[N]``, features ``[N, H]`` -> draft features ``[N, H]``, twice as EAGLE's do."""
        if inputs_embeds is not None:
            raise NotImplementedError("Gumiho drafts text only; inputs_embeds is not supported")
        hidden_states, fused = self.model(input_ids, positions, hidden_states)
        rows = min(fused.shape[0], self.fused.shape[0])
        self.fused[:rows].copy_(fused[:rows])
        return hidden_states, hidden_states

    def head_features(self, fused: list[Tensor], count: int) -> Tensor:
        """Features of the first ``count`` heads, request-major ``[B * count, H]``.

        fused: the S vectors o_1..o_S, each ``[B, H]``.
        """
        z = self.heads(torch.cat(fused, dim=-1), count)
        return z.transpose(0, 1).flatten(0, 1)

    def log_start(self, num_speculative_tokens: int, runner: str) -> None:
        """One line that says which checkpoint drafts, how many tokens, in which runner and by which kernels."""
        logger.info(
            "Gumiho drafts with %s: K=%d, model runner %s, heads by %s",
            self.config.gumiho_checkpoint, num_speculative_tokens, runner, self.heads.describe_path(),
        )  # fmt: skip

    def greedy_tokens(self, hidden_states: Tensor) -> Tensor | None:
        """Greedy draft tokens of ``[N, H]`` by the argmax kernel, ``[N]`` int64; None where it does not apply.

        The kernel compares logits in float32 and writes none.  It takes a whole, unquantised LM head.
        """
        weight = getattr(self.lm_head, "weight", None)
        if not self.argmax_kernel or weight is None or weight.dtype != hidden_states.dtype:
            return None
        return lm_head_argmax(hidden_states, weight, vocab_size=self.config.vocab_size).ids

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors under their checkpoint names; returns the names of the parameters filled."""
        loaded: set[str] = set()

        def serial_part() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                if match := _STAGE.fullmatch(name):
                    self.heads.destination(int(match[1]), int(match[2]), match[3]).copy_(tensor)
                    loaded.add(name)
                else:
                    yield name, tensor

        loaded |= {f"model.{name}" for name in self.model.load_weights(serial_part())}
        return loaded

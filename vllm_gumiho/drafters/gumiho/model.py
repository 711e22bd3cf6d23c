"""The Gumiho draft model as a vLLM model.

Source: Gumiho (arXiv 2503.10135) section 3; tensor facts from the released checkpoints.  The embedding and the LM
head are the target's: vLLM's EAGLE loading puts the target's modules in place after the weights are loaded.

Annotations are real types here, not strings: vLLM's torch.compile support reads them.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from vllm import envs
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.llama_eagle import LlamaDecoderLayer, LlamaModel
from vllm.model_executor.models.utils import AutoWeightsLoader, get_draft_quant_config, maybe_prefix

from vllm_gumiho.checkpoint.tensors import D2T, SCALE
from vllm_gumiho.drafters.draft_weights import DraftWeights
from vllm_gumiho.drafters.eight_bit import EightBitConfig, RowsScheme
from vllm_gumiho.drafters.gumiho.heads import ParallelHeads
from vllm_gumiho.drafters.gumiho.layout import STAGE
from vllm_gumiho.drafters.kernel_choice import Shapes, choose_kernels, products_by_kernel
from vllm_gumiho.drafters.target_owned import TargetHead, TargetOwned, whole_attention
from vllm_gumiho.env import BREAKABLE_GRAPHS
from vllm_gumiho.kernels.eight_bit import EightBitRows
from vllm_gumiho.kernels.parallel_heads import HeadsPath


def layer_quant_config(vllm_config: VllmConfig) -> QuantizationConfig | None:
    """Of the layers, and of what makes a feature of several: 8-bit rows by ``draft_weights``, else vLLM's own."""
    dtype = DraftWeights.of(vllm_config.speculative_config.draft_model_config.hf_config).dtype
    return get_draft_quant_config(vllm_config) if dtype is None else EightBitConfig(dtype)


def fc_quant_config(vllm_config: VllmConfig) -> QuantizationConfig | None:
    """Of ``fc``, which is wide beside 8-bit rows (`vllm_gumiho.checkpoint.tensors.UNROUNDED`)."""
    config = layer_quant_config(vllm_config)
    return None if isinstance(config, EightBitConfig) else config


class Layer(LlamaDecoderLayer):
    """Of vLLM, with weights as ``draft_weights`` says."""

    def get_quant_config(self, vllm_config: VllmConfig) -> QuantizationConfig | None:
        return layer_quant_config(vllm_config)


class FirstLayer(Layer):
    """The layer without an input norm, whose input the heads read once more.

    vLLM's own forward would give its input to the fused add-norm as the residual, which a GPU's operators, and the
    all-reduce fused with them, write in place.  Here the residual is a tensor of its own.
    """

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = self.self_attn(positions=positions, hidden_states=hidden_states) + hidden_states
        return self.mlp(self.post_attention_layernorm(residual)), residual


@support_torch_compile
class GumihoModel(nn.Module):
    """Embedding, ``fc`` and the serial decoder layers."""

    hf_to_vllm_mapper = LlamaModel.hf_to_vllm_mapper

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", start_layer_id: int = 0):
        super().__init__()
        config = vllm_config.speculative_config.draft_model_config.hf_config
        vllm_config = whole_attention(vllm_config)
        self.config = config
        self.embed_tokens = TargetOwned(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            (Layer if i else FirstLayer)(
                vllm_config, i == 0, prefix=maybe_prefix(prefix, f"layers.{i + start_layer_id}"), config=config
            )
            for i in range(config.num_hidden_layers)
        )
        self.fc = ReplicatedLinear(
            2 * config.hidden_size,
            config.hidden_size,
            bias=config.fc_bias,
            params_dtype=vllm_config.model_config.dtype,
            quant_config=fc_quant_config(vllm_config),
            prefix=maybe_prefix(prefix, "fc"),
            return_bias=False,
        )

    def fuse(self, input_ids: Tensor, hidden_states: Tensor) -> Tensor:
        """``o = fc(cat[E[x], h])``: ids ``[N]``, features ``[N, H]`` -> ``[N, H]``."""
        # With LoRA the target's embedding comes wrapped: the adapters' rows of a target pass do not fit a draft's.
        embed: nn.Module = getattr(self.embed_tokens, "base_layer", self.embed_tokens)
        return self.fc(torch.cat((embed(input_ids), hidden_states), dim=-1))

    def forward(self, input_ids: Tensor, positions: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Draft features h and fused inputs o, both ``[N, H]``."""
        fused = self.fuse(input_ids, hidden_states)
        hidden_states, residual = fused, None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        return hidden_states + residual, fused

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


class GumihoForCausalLM(TargetHead, LlamaForCausalLM):
    """Draft model: serial Transformer, parallel heads, the target's embedding and LM head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        nn.Module.__init__(self)
        config = vllm_config.speculative_config.draft_model_config.hf_config
        self.borrow_head(vllm_config, config)
        self.model = GumihoModel(
            vllm_config=vllm_config,
            prefix=maybe_prefix(prefix, "model"),
            start_layer_id=vllm_config.model_config.get_num_layers(vllm_config.parallel_config),
        )
        self.heads = ParallelHeads(
            config.num_parallel_heads,
            config.num_serial_steps,
            config.hidden_size,
            vllm_config.model_config.dtype,
            asked_for=vllm_config.speculative_config.num_speculative_tokens - config.num_serial_steps,
            weights=self.draft_weights.dtype,
        )
        self.weight_bytes = self._bytes_of(self.model.fc, self.model.layers, self.heads)
        # Breakable CUDA graphs replay this whole forward without its Python: only a buffer tells its o vectors then.
        self.copies_fused = bool(getattr(envs, BREAKABLE_GRAPHS.name, False))
        copies = self.max_batch if self.copies_fused else 0
        self._fused = torch.zeros(copies, config.hidden_size, dtype=self.draft_dtype)

    @staticmethod
    def _bytes_of(*modules: nn.Module) -> int:
        return sum(tensor.nbytes for module in modules for tensor in module.parameters())

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
        if self.copies_fused:
            rows = min(fused.shape[0], self._fused.shape[0])
            self._fused[:rows].copy_(fused[:rows])
        else:
            self._fused = fused
        return hidden_states, hidden_states

    def last_fused(self, rows: int) -> Tensor:
        """The o vectors of the last pass's first rows, ``[rows, H]``; the next pass may overwrite them."""
        return self._fused[:rows]

    def head_features(self, fused: list[Tensor], count: int) -> Tensor:
        """Features of the first ``count`` heads, request-major ``[B * count, H]``.

        fused: the S vectors o_1..o_S, each ``[B, H]``.  The kernels read them where they lie and, where the
        heads are whole, write the features in this order; the batched products copy both.
        """
        return self.heads(fused, count).transpose(0, 1).flatten(0, 1)

    def finish_loading(self) -> str:
        """Choose the kernels, now that the target's LM head is in place; which, for the log."""
        self.heads.finish_loading()
        tokens, refused = self.argmax_of_head()
        counts = {length - self.num_serial_steps for length in self.draft_lengths}
        shapes = Shapes({count: self.heads.own(count) for count in counts if count > 0}, self.max_batch)
        choice = choose_kernels(shapes, self.heads, tokens, refused, self.greedy_drafts)
        self.heads.paths = choice.heads
        self.take_argmax(tokens, choice.argmax)
        self._choose_products()
        packed, ranks = self.heads.pack(), self.heads.ranks
        heads = choice.describe()
        if packed:
            heads = heads.replace(HeadsPath.BATCHED.value, "vLLM's int8 products", 1)
        shared = f", heads shared by {ranks} ranks" if ranks > 1 else ""
        return f"{heads}{shared}, {self._describe_weights()}"

    def _choose_products(self) -> None:
        """Whether our kernel multiplies with those 8-bit rows that nothing of vLLM's takes."""
        layers = [one for one in self.modules() if type(getattr(one, "scheme", None)) is RowsScheme]
        matrices = [one for one in (self.head_matrix,) if one is not None and not one.packed]
        rows = [EightBitRows(one.weight, one.weight_scale) for one in layers] + [one.rows for one in matrices]
        kernel = bool(rows) and products_by_kernel(rows, self.draft_dtype)
        for one in (*(layer.scheme for layer in layers), *matrices):
            one.kernel = kernel

    def _describe_weights(self) -> str:
        """For the log."""
        weights, dtype = self.draft_weights, str(self.draft_dtype).removeprefix("torch.")
        kind = weights.matrices if weights.dtype else dtype
        return f"weights in {kind} ({self.weight_bytes / 1e6:.2f} MB){self.describe_head()}"

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors under their checkpoint names; returns the names of the parameters filled."""
        loaded: set[str] = set()

        def serial_part() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                if match := STAGE.fullmatch(name.removesuffix(SCALE)):
                    kind = match[3] + name[match.end() :]
                    place = self.heads.destination(int(match[1]), int(match[2]), kind)
                    if place is not None:
                        place.copy_(tensor)
                    loaded.add(name)
                elif name == D2T:
                    self.take_draft_vocabulary(tensor)
                    loaded.add(name)
                else:
                    yield name, tensor

        loaded |= {f"model.{name}" for name in self.model.load_weights(serial_part())}
        return loaded

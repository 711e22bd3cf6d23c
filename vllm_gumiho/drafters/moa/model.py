"""The Mixture of Attentions draft model as a vLLM model.

Source: Mixture of Attentions for Speculative Decoding (arXiv 2410.03804); shapes from the released code.  A row p of a
pass holds token x[p+1], as EAGLE's do: its self-attention writes slot p, and its cross-attention sees features of
positions up to p, each in the slot of its own position.

Annotations are real types here, not strings: vLLM's torch.compile support reads them.

Shapes: N rows of a pass, H hidden size, m target layers read.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.llama_eagle import LlamaDecoderLayer
from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix

from vllm_gumiho.checkpoint.tensors import D2T
from vllm_gumiho.drafters.kernel_choice import choose_argmax
from vllm_gumiho.drafters.moa.context import VerifiedAttention
from vllm_gumiho.drafters.moa.features import LayerFeatures
from vllm_gumiho.drafters.moa.layout import CROSS, LAYER_KEY, SELF, LayerShape
from vllm_gumiho.drafters.moa.target_keys import TargetKeys
from vllm_gumiho.drafters.ranks import on_shares
from vllm_gumiho.drafters.target_owned import TargetHead, TargetOwned, whole_attention


class CrossAttention(nn.Module):
    """Queries from the drafted tokens' stream, keys and values from features of verified tokens; one norm for both."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = vllm_config.speculative_config.draft_model_config.hf_config
        size, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        hidden, ranks = config.hidden_size, get_tensor_model_parallel_world_size()
        self.input_layernorm = RMSNorm(hidden, eps=config.rms_norm_eps)
        at = f"{prefix}.self_attn"
        self.q_proj = ColumnParallelLinear(hidden, heads * size, bias=False, prefix=f"{at}.q_proj", return_bias=False)
        # Without queries: the shards of keys and values alone, and copies of heads where ranks are more.
        self.kv_proj = QKVParallelLinear(
            hidden, size, 0, kv_heads, bias=False, prefix=f"{at}.kv_proj", return_bias=False
        )
        self.o_proj = RowParallelLinear(heads * size, hidden, bias=False, prefix=f"{at}.o_proj", return_bias=False)
        # As released: the base of the target's rotary embedding without its scaling.
        theta = config.rope_parameters["rope_theta"]
        self.last_position = config.max_position_embeddings - 1
        self.rotary_emb = get_rope(
            size, config.max_position_embeddings, rope_parameters={"rope_type": "default", "rope_theta": theta}
        )
        self.attn = VerifiedAttention(
            heads // ranks, size, max(1, kv_heads // ranks), vllm_config.cache_config, f"{at}.attn"
        )
        self.post_attention_layernorm = RMSNorm(hidden, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(hidden, config.intermediate_size, "silu", prefix=f"{prefix}.mlp")

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Rows of tokens at ``positions + 1``: ``[N]``, ``[N, H]`` -> ``[N, H]``."""
        query = self.q_proj(self.input_layernorm(hidden_states))
        # A row at the last position drafts beyond the longest text: wrong there, and in the table.
        query, _ = self.rotary_emb((positions + 1).clamp(max=self.last_position), query, None)
        mixed = self.o_proj(self.attn.read(query))
        mixed, residual = self.post_attention_layernorm(mixed, hidden_states)
        return self.mlp(mixed) + residual

    def write(self, features: Tensor, positions: Tensor, slots: Tensor) -> None:
        """Features ``[N, H]`` of tokens at positions ``[N]`` into the cache, at slots ``[N]``; -1 is none."""
        key, value = self.kv_proj(self.input_layernorm(features)).chunk(2, dim=-1)
        key, _ = self.rotary_emb(positions, key.contiguous(), None)
        self.attn.write(key, value.contiguous(), slots)


@support_torch_compile
class MoaModel(nn.Module):
    """Embedding, self-attention over tokens, cross-attention to features."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            f"{SELF}.self_attn.q_proj": (f"{SELF}.self_attn.qkv_proj", "q"),
            f"{SELF}.self_attn.k_proj": (f"{SELF}.self_attn.qkv_proj", "k"),
            f"{SELF}.self_attn.v_proj": (f"{SELF}.self_attn.qkv_proj", "v"),
            f"{CROSS}.self_attn.k_proj": (f"{CROSS}.kv_proj", "k"),
            f"{CROSS}.self_attn.v_proj": (f"{CROSS}.kv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        },
        orig_to_new_prefix={
            f"{CROSS}.self_attn.q_proj": f"{CROSS}.q_proj",
            f"{CROSS}.self_attn.o_proj": f"{CROSS}.o_proj",
        },
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", start_layer_id: int = 0):
        super().__init__()
        config = vllm_config.speculative_config.draft_model_config.hf_config
        vllm_config = whole_attention(vllm_config)
        self.config = config
        self.embed_tokens = TargetOwned(config.vocab_size, config.hidden_size)
        at = maybe_prefix(prefix, f"layers.{start_layer_id}")
        self.self_attention = LlamaDecoderLayer(vllm_config, False, prefix=at, config=config)
        self.cross_attention = CrossAttention(vllm_config, maybe_prefix(prefix, f"layers.{start_layer_id + 1}"))

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """What the LM head drafts from, ``[N, H]``; row p holds token x[p+1]."""
        # With LoRA the target's embedding comes wrapped: the adapters' rows of a target pass do not fit a draft's.
        embed: nn.Module = getattr(self.embed_tokens, "base_layer", self.embed_tokens)
        hidden_states, residual = self.self_attention(positions, embed(input_ids), None)
        return self.cross_attention(positions, hidden_states + residual)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


class MoaForCausalLM(TargetHead, Eagle3LlamaForCausalLM):
    """Draft model: layer self-attention, self-attention, cross-attention, the target's embedding and LM head.

    One of vLLM's EAGLE-3 models by class, as its runners ask, and by nothing else: the target gives the states of the
    layers that `features_of` makes features of.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        nn.Module.__init__(self)
        config = vllm_config.speculative_config.draft_model_config.hf_config
        self.borrow_head(vllm_config, config)
        self.model = MoaModel(
            vllm_config=vllm_config,
            prefix=maybe_prefix(prefix, "model"),
            start_layer_id=vllm_config.model_config.get_num_layers(vllm_config.parallel_config),
        )
        self.num_states = len(config.eagle_aux_hidden_state_layer_ids)
        shape = LayerShape(**getattr(config, LAYER_KEY))
        theta, eps = config.rope_parameters["rope_theta"], config.rms_norm_eps
        features = LayerFeatures(shape, config.hidden_size, theta, eps, self.num_states)
        self.features = features.requires_grad_(False)
        # Of the target whose keys and values are read, once it is known.
        self.target_keys: TargetKeys | None = None

    def forward(
        self, input_ids: Tensor, positions: Tensor, hidden_states: Tensor, inputs_embeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """ids ``[N]``, positions ``[N]`` -> what is drafted from, ``[N, H]``, twice as EAGLE's do.

        ``hidden_states``, the features, are read from the cache that `write_features` fills.
        """
        if inputs_embeds is not None:
            raise NotImplementedError("MoA drafts text only; inputs_embeds is not supported")
        hidden_states = self.model(input_ids, positions)
        return hidden_states, hidden_states

    def read_target(self, target: nn.Module) -> None:
        """The loaded target, whose modules make keys and values where these are what the features come from."""
        if not self.features.target_layers:
            self.target_keys = TargetKeys(target)

    def features_of(self, states: Sequence[Tensor], positions: Tensor) -> Tensor:
        """States ``[N, H]`` of each of m target layers, of tokens at positions ``[N]`` -> features ``[N, H]``.

        A chunk at a time, whose tokens the ranks share out.
        """
        elements = 0 if self.target_keys is None else self.target_keys.elements_of_token
        ranks = get_tensor_model_parallel_world_size()
        size = self.features.chunk(elements, states[0].element_size(), ranks)
        features = torch.empty_like(states[0])
        for first in range(0, features.shape[0], size):
            rows = slice(first, first + size)
            parts = [state[rows] for state in states]
            held = torch.stack(parts, 1) if self.target_keys is None else self.target_keys(parts, positions[rows])
            features[rows] = on_shares(self.features, held)
        return features

    def combine_hidden_states(self, hidden_states: Tensor) -> Tensor:
        """As they are: the runners give features, which `features_of` makes from states and their positions."""
        return hidden_states

    @property
    def features_layer(self) -> str:
        """Name of the attention layer whose cache `write_features` fills."""
        return self.model.cross_attention.attn.layer_name

    def write_features(self, features: Tensor, positions: Tensor, slots: Tensor) -> None:
        """Keys and values of features ``[N, H]`` at positions ``[N]`` into cache slots ``[N]``; -1 is none."""
        self.model.cross_attention.write(features, positions, slots)

    def finish_loading(self) -> str:
        """Choose how greedy tokens are found, now that the target's LM head is in place; how, for the log."""
        tokens, refused = self.argmax_of_head()
        device = self.features.Ekv2E.bias.device
        tiles, argmax = choose_argmax(self.max_batch, tokens, refused, self.greedy_drafts, device, self.draft_dtype)
        self.take_argmax(tokens, tiles)
        named = ", ".join(map(str, self.features.target_layers))
        read = f"layers {named}" if named else f"keys and values of {self.num_states} layers"
        return f"features of {read}, {argmax}"

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors under their checkpoint names; returns the names of the parameters filled."""
        places, loaded = dict(self.features.named_parameters()), set()

        def attentions() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name in places:
                    places[name].copy_(tensor)
                    loaded.add(f"features.{name}")
                elif name == D2T:
                    self.take_draft_vocabulary(tensor)
                else:
                    yield name, tensor

        return loaded | {f"model.{name}" for name in self.model.load_weights(attentions())}

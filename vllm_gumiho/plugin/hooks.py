"""The one table of vLLM internals that this package touches, with what must hold for each.

`check` compares it with the source of a vLLM, installed or in a wheel, without importing it.  A test derives the names
that the package imports from vLLM, and the attributes that it takes from vLLM's classes, and holds the table to them.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_gumiho.plugin.vllm_source import Source

WORKING_VERSIONS = "0.32 and 0.33"


@dataclass(frozen=True)
class Hook:
    """A name in vLLM and what must hold for it.

    use: ``patched`` (replaced or wrapped), ``registered`` (a public registry is given an entry), ``inherited``
    (subclassed or overridden) or ``called``.  needs: parameters a function must have; of a class its bases, names of
    its body, or attributes its ``__init__`` sets.
    """

    module: str
    name: str
    use: str
    why: str
    needs: tuple[str, ...] = ()
    variable: bool = False


_V1, _V2 = "vllm.v1.spec_decode", "vllm.v1.worker.gpu.spec_decode"
_LAYERS, _MODELS = "vllm.model_executor.layers", "vllm.model_executor.models"
_SCHEMES = f"{_LAYERS}.quantization.compressed_tensors.schemes"
_KERNELS = "vllm.model_executor.kernels.linear"
_DECODE = ("num_reqs", "num_speculative_steps")
_DRAFT = ("num_reqs", "num_tokens_padded", "attn_metadata", "slot_mappings", "num_tokens_across_dp")
# Of an attention layer whose keys and values are made again.
_KEYS = ("qkv_proj", "q_size", "kv_size", "head_dim", "hidden_size", "total_num_kv_heads")
_PROPOSER = f"{_V1}.llm_base_proposer", "SpecDecodeBaseProposer"
_SPECULATOR = f"{_V2}.target_dependent_ar.speculator", "TargetDependentARSpeculator"

SERVING: tuple[Hook, ...] = (
    Hook("vllm.engine.arg_utils", "EngineArgs.create_speculative_config", "patched",
         "a request for one of our drafters becomes vLLM's config", ("target_model_config", "target_parallel_config")),
    Hook("vllm.engine.arg_utils", "EngineArgs.add_cli_args", "patched", "offers --speculative-model", ("parser",)),
    Hook("vllm.engine.arg_utils", "EngineArgs", "patched", "takes speculative_model=",
         ("speculative_config", "spec_method", "spec_model", "spec_tokens", "load_format",
          "disable_hybrid_kv_cache_manager")),
    Hook("vllm.engine.arg_utils", "AsyncEngineArgs", "patched", "takes speculative_model="),
    Hook("vllm.config.vllm", "VllmConfig._get_v2_model_runner_unsupported_features", "patched",
         "model runner V1 is the default where V2 would not draft right"),
    Hook(f"{_V1}.eagle", "EagleProposer", "patched", "model runner V1 makes a GumihoProposer for a Gumiho draft",
         ("SpecDecodeBaseProposer",)),
    Hook(f"{_V2}.eagle.speculator", "EagleSpeculator", "patched",
         "model runner V2 makes a GumihoSpeculator for a Gumiho draft", ("TargetDependentARSpeculator",)),
    Hook("vllm.v1.sample.rejection_sampler", "expand_batch_to_tokens", "patched",
         "CPU build only, and only while Gumiho drafts: temperatures reach the drafts' tokens",
         ("x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to")),
    Hook("vllm.v1.sample.rejection_sampler", "apply_sampling_constraints", "patched",
         "CPU build only, and only while Gumiho drafts: top_k in a step without drafts", ("logits",)),
    Hook(f"{_MODELS}.registry", "_ModelRegistry.register_model", "registered", "the draft model",
         ("model_arch", "model_cls")),
    Hook(f"{_MODELS}.registry", "_ModelRegistry.get_supported_archs", "called",
         "check: vLLM's classes by architecture"),
    Hook(f"{_MODELS}.registry", "_BaseRegisteredModel.load_model_cls", "called", "check: a target's class"),
    Hook(f"{_MODELS}.registry", "_ModelRegistry", "called", "check: a target's class", ("models",)),
    Hook("vllm.transformers_utils.configs.speculators.algos", "register_speculator", "registered",
         "config.json of the speculators format", ("name",)),
    Hook("vllm.model_executor.model_loader", "register_model_loader", "registered", "strict reading of checkpoints",
         ("load_format",)),
    Hook(_PROPOSER[0], _PROPOSER[1], "inherited", "what a draft is made of and kept in, runner V1",
         ("vllm_config", "draft_model_config", "input_ids", "hidden_states", "max_batch_size", "_last_draft_probs",
          "use_local_argmax_reduction")),
    Hook(_PROPOSER[0], f"{_PROPOSER[1]}.propose", "inherited", "serial steps, runner V1",
         ("num_speculative_tokens", "sampling_metadata")),
    Hook(_PROPOSER[0], f"{_PROPOSER[1]}._sample_draft_tokens", "inherited", "what each serial step drafted from",
         ("hidden_states", "sampling_metadata")),
    Hook(_PROPOSER[0], f"{_PROPOSER[1]}.dummy_run", "inherited", "runs the serial steps only"),
    Hook(_PROPOSER[0], f"{_PROPOSER[1]}._greedy_sample", "inherited", "greedy tokens, and how likely they are",
         ("hidden_states",)),
    Hook(_PROPOSER[0], f"{_PROPOSER[1]}.prepare_next_token_ids_padded", "inherited",
         "the batch whose prompts go on", ("sampled_token_ids", "requests", "gpu_input_batch")),
    Hook(_PROPOSER[0], f"{_PROPOSER[1]}.set_inputs_first_pass", "inherited",
         "the token after a part of a prompt; MoA: features are cached before the first pass",
         ("next_token_ids", "cad")),
    Hook("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "called",
         "which steps draft, runner V1: those past the draft's max_model_len do not",
         ("effective_drafter_max_model_len",)),
    Hook("vllm.v1.worker.gpu_input_batch", "InputBatch", "called", "the token after a part of a prompt",
         ("token_ids_cpu", "num_tokens_no_spec")),
    Hook(_PROPOSER[0], f"{_PROPOSER[1]}.load_model", "inherited", "the line in the log", ("target_model",)),
    Hook(f"{_V2}.speculator", "DraftModelSpeculator.load_model", "inherited", "the line in the log",
         ("target_model",)),
    Hook(_PROPOSER[0], f"{_PROPOSER[1]}.validate_same_kv_cache_group", "inherited",
         "names the remedy where draft layers are torn apart", ("kv_cache_config",)),
    Hook(_PROPOSER[0], f"{_PROPOSER[1]}.take_last_draft_probs", "inherited", "draft distribution of the heads"),
    Hook(_SPECULATOR[0], f"{_SPECULATOR[1]}.propose", "inherited", "looks whether the heads' single launch gave up"),
    Hook("vllm.v1.worker.gpu.cudagraph_utils", "CudaGraphManager.release_graphs", "called",
         "drops graphs whose single launch gave up"),
    Hook(f"{_V2}.speculator", "DraftModelSpeculator", "inherited", "what a draft is made of and kept in, runner V2",
         ("vllm_config", "num_speculative_steps", "idx_mapping", "temperature", "seeds", "draft_tokens", "draft_logits",
          "acceptance_estimator", "draft_watermarker", "use_local_argmax_reduction")),
    Hook(*_SPECULATOR, "inherited", "positions that tokens are drawn by, runner V2",
         ("DraftModelSpeculator", "sample_src_positions", "decode_cudagraph_manager")),
    Hook(_SPECULATOR[0], f"{_SPECULATOR[1]}._run_model", "inherited", "features of the last serial step"),
    Hook(_SPECULATOR[0], f"{_SPECULATOR[1]}._prefill", "inherited",
         "MoA: features of verified tokens are cached before the first pass",
         ("num_reqs", "num_tokens", "attn_metadata", "slot_mappings")),
    Hook(_SPECULATOR[0], f"{_SPECULATOR[1]}.on_multi_step_decode_begin", "inherited",
         "MoA: verified lengths, before drafted tokens lengthen the sequences", ("num_reqs",)),
    Hook(f"{_V2}.speculator", "DraftModelSpeculator.set_attn", "inherited",
         "MoA: attention metadata learns where the verified lengths are"),
    Hook(_SPECULATOR[0], f"{_SPECULATOR[1]}._multi_step_decode", "inherited", "stops after the second serial token",
         _DECODE),
    Hook(_SPECULATOR[0], f"{_SPECULATOR[1]}._generate_fused_drafts", "inherited",
         "serial step and heads in one CUDA graph", (*_DRAFT, *_DECODE)),
    Hook(_SPECULATOR[0], f"{_SPECULATOR[1]}._generate_draft", "inherited",
         "serial step and heads in one CUDA graph", (*_DRAFT, *_DECODE)),
    Hook(f"{_V2}.speculator", "DraftModelSpeculator.get_draft_top_tokens", "called", "asks for greedy drafts",
         ("hidden_states",)),
    Hook(f"{_V2}.speculator", "DraftModelSpeculator.sample_draft", "called", "tokens of the heads",
         ("hidden_states", "sample_src_positions", "idx_mapping", "temperature", "seeds", "draft_step",
          "draft_logits")),
    Hook(f"{_MODELS}.llama_eagle", "LlamaDecoderLayer", "inherited", "draft layers"),
    Hook(f"{_MODELS}.llama_eagle", "LlamaModel", "called", "names of stacked projections", ("hf_to_vllm_mapper",)),
    Hook(f"{_MODELS}.llama", "LlamaForCausalLM.compute_logits", "inherited", "the target's LM head",
         ("hidden_states",)),
    Hook(f"{_MODELS}.llama", "LlamaMLP", "called", "MoA: the cross-attention layer's MLP"),
    Hook(f"{_MODELS}.llama_eagle3", "Eagle3LlamaForCausalLM.combine_hidden_states", "inherited",
         "features of several layers' states", ("hidden_states",)),
    Hook(f"{_MODELS}.llama", "LlamaAttention", "called", "MoA: keys and values of a target made again", _KEYS),
    Hook(f"{_MODELS}.qwen2", "Qwen2Attention", "called", "MoA: keys and values of a target made again", _KEYS),
    Hook(f"{_MODELS}.qwen3", "Qwen3Attention", "called", "MoA: keys and values of a target made again",
         (*_KEYS, "k_norm")),
    Hook("vllm.v1.worker.gpu.input_batch", "InputBatch", "called", "MoA: positions of states, runner V2",
         ("positions",)),
    Hook(f"{_MODELS}.interfaces", "supports_eagle3", "called", "whether a target gives states of its layers",
         ("model",)),
    Hook(f"{_MODELS}.interfaces", "EagleModelMixin", "called", "whose first layer is to leave state 0 as it is",
         ("aux_hidden_state_layers",)),
    Hook(f"{_MODELS}.llama", "LlamaDecoderLayer.forward", "called", "a layer that is to leave state 0 as it is",
         ("hidden_states",)),
    Hook("vllm.model_executor.model_loader.utils", "get_model_cls", "called", "the target's class", ("model_config",)),
    Hook(f"{_MODELS}.utils", "WeightsMapper", "called", "names of stacked projections", ("orig_to_new_stacked",)),
    Hook(f"{_MODELS}.utils", "AutoWeightsLoader.load_weights", "called", "fills fc and layers", ("weights", "mapper")),
    Hook(f"{_MODELS}.utils", "get_draft_quant_config", "called", "a quantised target keeps the draft plain",
         ("vllm_config",)),
    Hook(f"{_MODELS}.utils", "maybe_prefix", "called", "names of the draft's layers", ("prefix", "name")),
    Hook(f"{_LAYERS}.linear", "LinearBase", "called", "8-bit draft weights: layers that have them"),
    Hook(f"{_LAYERS}.linear", "LinearMethodBase", "inherited", "8-bit draft weights: the linear method",
         ("create_weights", "apply")),
    Hook(f"{_LAYERS}.linear", "register_weight_loader_v2_supported_method", "called",
         "8-bit draft weights: vLLM's weight loaders"),
    Hook(f"{_LAYERS}.quantization.base_config", "QuantizationConfig.get_quant_method", "inherited",
         "8-bit draft weights: the config of the layers", ("layer", "prefix")),
    Hook(f"{_SCHEMES}.compressed_tensors_w8a8_int8", "CompressedTensorsW8A8Int8", "called",
         "8-bit draft weights: int8 on a CPU", ("strategy", "is_static_input_scheme", "input_symmetric")),
    Hook(f"{_SCHEMES}.compressed_tensors_w8a16_fp8", "CompressedTensorsW8A16Fp8", "called",
         "8-bit draft weights: fp8 on a GPU", ("weight_quant", "is_static_input_scheme")),
    Hook(_KERNELS, "init_int8_linear_kernel", "called", "8-bit draft weights: int8 products on a CPU",
         ("is_channelwise", "is_static_input_scheme", "input_symmetric", "module_name")),
    Hook(_KERNELS, "choose_mp_linear_kernel", "called", "8-bit draft weights: int8 on a GPU", ("config",)),
    Hook(f"{_KERNELS}.mixed_precision.MPLinearKernel", "MPLinearLayerConfig", "called",
         "8-bit draft weights: int8 on a GPU", ("weight_type", "act_type", "group_size", "zero_points")),
    Hook(f"{_KERNELS}.mixed_precision.MPLinearKernel", "MPLinearKernel.apply_weights", "called",
         "8-bit draft weights: int8 on a GPU", ("layer", "x", "bias")),
    Hook("vllm.model_executor.parameter", "ModelWeightParameter", "called", "8-bit draft weights: codes"),
    Hook("vllm.model_executor.parameter", "ChannelQuantScaleParameter", "called", "8-bit draft weights: scales"),
    Hook("vllm.model_executor.parameter", "PackedvLLMParameter", "called", "8-bit draft weights: int8 on a GPU",
         ("packed_factor", "packed_dim")),
    Hook("vllm.scalar_type", "scalar_types", "called", "8-bit draft weights: int8 on a GPU", ("uint8b128",)),
    Hook("vllm.utils.torch_utils", "set_default_torch_dtype", "called", "8-bit draft weights: int8 on a CPU",
         ("dtype",)),
    Hook("vllm.utils.torch_utils", "async_tensor_h2d", "called", "the token after a part of a prompt, without a wait",
         ("data", "device", "dtype")),
    Hook("vllm.compilation.decorators", "support_torch_compile", "called", "compiles the serial pass"),
    Hook(f"{_LAYERS}.linear", "ReplicatedLinear", "called", "fc"),
    Hook(f"{_LAYERS}.linear", "ColumnParallelLinear", "called", "MoA: queries of the cross-attention"),
    Hook(f"{_LAYERS}.linear", "QKVParallelLinear", "called", "MoA: keys and values of the cross-attention",
         ("hidden_size", "head_size", "total_num_heads", "total_num_kv_heads")),
    Hook(f"{_LAYERS}.linear", "RowParallelLinear", "called", "MoA: output of the cross-attention"),
    Hook(f"{_LAYERS}.layernorm", "RMSNorm", "called", "norms of states, and of MoA's cross-attention layer"),
    Hook(f"{_LAYERS}.rotary_embedding", "get_rope", "called", "MoA: rotary embedding of the cross-attention",
         ("head_size", "max_position", "rope_parameters")),
    Hook(f"{_LAYERS}.attention.attention", "Attention", "inherited", "MoA: attention to verified tokens alone"),
    Hook("vllm.v1.attention.selector", "get_attn_backend", "called", "MoA: the backend whose metadata ends earlier",
         ("head_size", "dtype", "kv_cache_dtype")),
    Hook("vllm.v1.attention.backend", "AttentionBackend", "called", "MoA: the backend whose metadata ends earlier",
         ("forward_includes_kv_cache_update", "get_builder_cls")),
    Hook("vllm.v1.attention.backend", "AttentionMetadataBuilder.build_for_drafting", "inherited",
         "MoA: metadata that ends at the verified tokens, runner V1", ("common_attn_metadata", "draft_index")),
    Hook("vllm.v1.attention.backend", "AttentionMetadataBuilder.build", "inherited",
         "MoA: metadata that ends at the verified tokens, runner V2", ("common_prefix_len", "common_attn_metadata")),
    Hook("vllm.v1.attention.backends.flash_attn", "FlashAttentionImpl.do_kv_cache_update", "called",
         "MoA: writes keys and values of features; each backend's own", ("layer", "key", "value", "slot_mapping")),
    Hook("vllm.v1.attention.backend", "CommonAttentionMetadata", "called", "MoA: lengths of sequences",
         ("seq_lens", "num_reqs", "_num_computed_tokens_cache")),
    Hook("vllm.v1.attention.backend", "subclass_attention_backend", "called", "MoA: metadata that ends earlier",
         ("name_prefix", "attention_backend_cls", "builder_cls")),
    Hook(f"{_LAYERS}.linear", "UnquantizedLinearMethod", "called", "an LM head that the argmax kernel may read"),
    Hook(f"{_LAYERS}.logits_processor", "LogitsProcessor", "called", "the target's logits"),
    Hook(f"{_LAYERS}.logits_processor", "LogitsProcessor.get_top_tokens", "called", "greedy tokens of LM head shards",
         ("lm_head", "hidden_states", "embedding_bias")),
    Hook(f"{_LAYERS}.vocab_parallel_embedding", "VocabParallelEmbedding", "called",
         "finds the target's embedding under any name", ("org_vocab_size",)),
    Hook(f"{_LAYERS}.vocab_parallel_embedding", "ParallelLMHead", "called", "which is no embedding"),
    Hook(f"{_LAYERS}.vocab_parallel_embedding", "VocabParallelEmbeddingShardIndices", "called",
         "tokens of an LM head's shard, for the argmax kernel",
         ("org_vocab_start_index", "org_vocab_end_index", "num_added_elements")),
    Hook(f"{_LAYERS}.vocab_parallel_embedding", "UnquantizedEmbeddingMethod.apply", "called",
         "checks the argmax kernel", ("layer", "x", "bias")),
    Hook("vllm.distributed.communication_op", "tensor_model_parallel_all_gather", "called",
         "best tokens of all shards of an LM head; features of shared heads", ("input_", "dim")),
    Hook("vllm.distributed.communication_op", "tensor_model_parallel_all_reduce", "called",
         "gathers the LM head's rows of a draft vocabulary", ("input_",)),
    Hook("vllm.distributed.parallel_state", "get_tensor_model_parallel_world_size", "called",
         "MoA: heads of a rank"),
    Hook("vllm.distributed.parallel_state", "get_tp_group", "called", "the ranks that share heads and kernel choice"),
    Hook("vllm.model_executor.model_loader.base_loader", "BaseModelLoader.load_weights", "inherited",
         "strict reading of checkpoints", ("model", "model_config")),
    Hook("vllm.config.load", "LoadConfig", "called", "names our loader for the draft", ("load_format",)),
    Hook("vllm.config.compilation", "CUDAGraphMode", "called", "types of runner V2's functions"),
    Hook("vllm.config.vllm", "VllmConfig", "called", "the engine's config", ("speculative_config", "lora_config")),
    Hook("vllm.config.model", "ModelConfig", "called", "the target's config", ("model", "dtype", "hf_text_config")),
    Hook("vllm.config.parallel", "ParallelConfig", "called", "parallel sizes",
         ("pipeline_parallel_size", "data_parallel_size")),
    Hook("vllm.v1.worker.gpu.cudagraph_utils", "BatchExecutionDescriptor", "called", "types of runner V2's functions"),
    Hook("vllm.v1.worker.gpu.model_states", "resolve_model_state_cls", "called",
         "seeded text: the state that a target would have", ("vllm_config", "model")),
    Hook("vllm.v1.worker.gpu.model_states.interface", "ModelState.custom_sampler", "inherited",
         "seeded text: verifies drafts by sample and walk", ("sampler",)),
    Hook(f"{_V2}.rejection_sampler", "RejectionSampler._verify", "inherited", "seeded text: sample and walk",
         ("logits", "draft_sampled", "pos", "cu_num_logits", "expanded_local_pos", "verify_draft_sampled")),
    Hook("vllm.v1.worker.gpu.sample.gumbel", "gumbel_sample", "called", "seeded text: the sampler's own noise",
         ("logits", "expanded_idx_mapping", "temperature", "seed", "pos", "apply_temperature", "is_drafting",
          "use_fp64")),
    Hook("vllm.v1.worker.gpu.sample.sampler", "Sampler.apply_sampling_params", "called",
         "seeded text: the distribution that a request samples from",
         ("logits", "expanded_idx_mapping", "pos", "input_ids", "expanded_local_pos")),
    Hook("vllm.v1.sample.metadata", "SamplingMetadata", "called", "types of runner V1's functions"),
    Hook("vllm.v1.spec_decode.dynamic.utils", "validate_and_normalize_dynamic_sd_schedule", "called",
         "vLLM's own rules for schedules of K"),
    Hook("vllm.envs", "environment_variables", "registered", "those of ours that are set", variable=True),
    Hook("vllm.envs", "__getattr__", "called", "vLLM's cache folder; breakable CUDA graphs", ("name",)),
    Hook("vllm.platforms", "__getattr__", "called", "current_platform", ("name",)),
)  # fmt: skip

# What only the tools need: without one of these a tool fails in one line, and serving goes on.
MEASURING: tuple[Hook, ...] = (
    Hook("vllm.v1.core.sched.scheduler", "Scheduler", "called", "tune: another K from step to step",
         ("dynamic_sd_lookup",)),
    Hook("vllm.utils.ompmultiprocessing", "OMPProcessManager.configure_omp_envs", "called",
         "tune: a server's threads for an engine in one process"),
    Hook("vllm.entrypoints.cli.main", "main", "called", "tune, eval and bench: vllm serve"),
    Hook("vllm.utils.torch_utils", "set_random_seed", "called", "eval: a set's draws", ("seed",)),
    Hook("vllm.utils.argparse_utils", "FlexibleArgumentParser", "called", "bench: arguments of vLLM's commands"),
    Hook("vllm.benchmarks.serve", "add_cli_args", "called", "bench: arguments of vllm bench serve", ("parser",)),
    Hook("vllm.benchmarks.serve", "main", "called", "bench: vLLM's own client"),
    Hook("vllm.benchmarks.datasets.datasets", "get_samples", "called", "bench: the client's own requests"),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """A hook and what is wrong with it in some vLLM, None where it holds."""

    hook: Hook
    problem: str | None


def check(source: Source, hooks: tuple[Hook, ...] = SERVING) -> list[Finding]:
    """Each hook with what is wrong with it in that vLLM source."""
    return [Finding(hook, source.problem(hook.module, hook.name, hook.needs, hook.variable)) for hook in hooks]


def mismatch_message(findings: list[Finding], version: str | None) -> str | None:
    """The one message that refuses Gumiho, None where all hooks hold.  version: of vLLM, None where there is none."""
    broken = [f"{f.hook.module}.{f.hook.name}: {f.problem}" for f in findings if f.problem]
    if not broken:
        return None
    if version is None:
        return f"vLLM is not installed.  Gumiho is a plugin for vLLM {WORKING_VERSIONS}: pip install 'vllm-gumiho[gpu]'"
    return (
        f"Gumiho cannot run on vLLM {version}: {'; '.join(broken)}.  It works with vLLM {WORKING_VERSIONS}; "
        "install one of these, or a newer vllm-gumiho.  vLLM without Gumiho is not affected."
    )

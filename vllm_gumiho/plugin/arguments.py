"""The engine's arguments: a request for one of our drafters, in any of its forms, becomes vLLM's own config."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_gumiho.drafters.speculators_config import check_verifier
from vllm_gumiho.errors import HookError
from vllm_gumiho.plugin.variables import register_variables

if TYPE_CHECKING:
    from vllm_gumiho.request.resolve import Request

ONE_GROUP = (
    "%s: draft layers would fall into several KV cache groups beside the layers of target %s; its windows save no KV "
    "cache then (disable_hybrid_kv_cache_manager)"
)
SYNCHRONOUS = (
    "Gumiho: async scheduling is off, as drafts end by request; --async-scheduling would keep their full length"
)
logger = logging.getLogger("vllm.vllm_gumiho")
_FLAGS = {"spec_method": "method", "spec_model": "model", "spec_tokens": "num_speculative_tokens"}


def patch_arguments(arg_utils: Any, refusal: str | None) -> None:
    """Watch the engine's arguments; with a ``refusal`` only to say it to whoever asks for Gumiho."""
    engine_args = arg_utils.EngineArgs
    if not hasattr(engine_args, "create_speculative_config"):
        return
    engine_args.create_speculative_config = _create_speculative_config(engine_args.create_speculative_config, refusal)
    if refusal:
        return
    engine_args.add_cli_args = staticmethod(_add_cli_args(engine_args.add_cli_args))
    for cls in (engine_args, arg_utils.AsyncEngineArgs):
        cls.__init__ = _take_speculative_model(cls.__init__)


def asked_of(engine: Any) -> dict[str, Any] | None:
    """The speculative config that an engine's arguments make together, keys with underscores.

    None where it is not ours to read: no dict of texts, or a flag and a key that say the same.
    """
    written = engine.speculative_config or {}
    if not isinstance(written, dict) or not all(isinstance(key, str) for key in written):
        return None
    written = {key.replace("-", "_"): value for key, value in written.items()}
    given = {key: getattr(engine, flag) for flag, key in _FLAGS.items() if getattr(engine, flag) is not None}
    return None if given.keys() & written.keys() else {**written, **given}


def _create_speculative_config(original: Callable[..., Any], refusal: str | None) -> Callable[..., Any]:
    @functools.wraps(original)
    def create(self: Any, target_model_config: Any, target_parallel_config: Any) -> Any:
        from vllm_gumiho.request import asks_for_ours, resolve

        spec = asked_of(self)
        if spec is None or not asks_for_ours(spec):
            return original(self, target_model_config, target_parallel_config)
        if refusal:
            raise HookError(refusal)
        kept = {name: getattr(self, name) for name in ("speculative_config", *_FLAGS)}
        try:
            for flag in _FLAGS:
                setattr(self, flag, None)
            request = resolve(spec, target_model_config, target_parallel_config, str(self.load_format))
            if request.is_confident:
                from vllm_gumiho.tuning.auto import with_measured_row_cost

                request = with_measured_row_cost(request, self, target_model_config)
            if request.needs_one_kv_group(target_model_config) and not self.disable_hybrid_kv_cache_manager:
                logger.info(ONE_GROUP, request.drafter.title, target_model_config.model)
                self.disable_hybrid_kv_cache_manager = True
            settled: Request | None = request
            if request.is_auto:
                from vllm_gumiho.tuning.auto import settle

                settled = settle(request, self, target_model_config, target_parallel_config)
            if settled and settled.ends_by_request and self.async_scheduling is None:
                logger.info(SYNCHRONOUS)
                self.async_scheduling = False
            self.speculative_config = settled and settled.for_vllm()
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
        _offer_auto(parser._option_string_actions.get("--spec-tokens"))
        return parser

    return add_cli_args


def _offer_auto(action: Any) -> None:
    """Let ``--spec-tokens`` take the word for a measured K beside a number."""
    from vllm_gumiho.request.lengths import AUTO

    number = getattr(action, "type", None)
    if number is not None:
        action.type = lambda text: AUTO if text.lower() == AUTO else number(text)


def _take_speculative_model(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def initialise(self: Any, *args: Any, speculative_model: str | None = None, **kwargs: Any) -> None:
        if speculative_model is not None:
            if kwargs.get("spec_model") is not None:
                raise ValueError("speculative_model= and spec_model= say the same; give one of them")
            kwargs["spec_model"] = speculative_model
        original(self, *args, **kwargs)
        # Some may have been set since vLLM was imported.
        register_variables(importlib.import_module("vllm.envs"))
        check_verifier(str(getattr(self, "model", "")))

    return initialise

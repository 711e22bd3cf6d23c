"""Every patch and registration, each put in place when its vLLM module is imported; nothing heavy is imported here."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

from vllm_gumiho.drafters import DRAFTERS, drafter_of, lacking_in_v2
from vllm_gumiho.engines.facts import vllm_version
from vllm_gumiho.plugin.arguments import patch_arguments
from vllm_gumiho.plugin.import_watch import when_imported
from vllm_gumiho.plugin.variables import register_variables
from vllm_gumiho.plugin.verdict import refusal_of
from vllm_gumiho.plugin.vllm_source import Source

logger = logging.getLogger("vllm.vllm_gumiho")


@functools.cache
def refusal() -> str | None:
    """Why the installed vLLM cannot draft with us, None where every hook holds."""
    return refusal_of(Source.installed(), vllm_version())


@functools.cache
def install() -> None:
    """Prepare vLLM, once a process.  Where a hook does not hold, only arguments are watched, to refuse Gumiho there."""
    for place in sorted({place for drafter in DRAFTERS.values() for place in drafter.runners}):
        module, name = place.split(":")
        when_imported(module, functools.partial(_unless_refused, functools.partial(_choose_runner, name, place)))
    for module, action in (
        ("vllm.envs", register_variables),
        ("vllm.config.vllm", _prefer_v1),
        ("vllm.model_executor.models.registry", _register_models),
        ("vllm.transformers_utils.configs.speculators.algos", _register_speculators),
        ("vllm.model_executor.model_loader", _register_loader),
    ):
        when_imported(module, functools.partial(_unless_refused, action))
    when_imported("vllm.engine.arg_utils", functools.partial(_safely, lambda m: patch_arguments(m, refusal())))


def _unless_refused(action: Callable[[Any], None], module: Any) -> None:
    _safely(lambda m: action(m) if refusal() is None else None, module)


def _safely(action: Callable[[Any], None], module: Any) -> None:
    """Act on a module just imported.  An error must not stop vLLM from importing it: it goes to the log."""
    try:
        action(module)
    except Exception:
        logger.exception("vllm-gumiho could not prepare %s; vLLM goes on without Gumiho", module.__name__)


def _register_models(registry: Any) -> None:
    for drafter in DRAFTERS.values():
        registry.ModelRegistry.register_model(drafter.architecture, drafter.model)


def _register_speculators(algos: Any) -> None:
    from vllm_gumiho.drafters.speculators_config import update_draft_config

    for drafter in DRAFTERS.values():
        algos.register_speculator(drafter.name)(functools.partial(update_draft_config, drafter))


def _register_loader(model_loader: Any) -> None:
    from vllm_gumiho.drafters.checkpoints import LOAD_FORMAT
    from vllm_gumiho.plugin.loader import CheckpointLoader

    model_loader.register_model_loader(LOAD_FORMAT)(CheckpointLoader)


def _choose_runner(name: str, place: str, module: Any) -> None:
    """Make ``name(vllm_config, ...)`` give the subclass of the draft's own drafter, else what it always gave.

    A subclass instance from ``__new__`` keeps every ``isinstance(x, base)`` in vLLM true.
    """
    base = getattr(module, name)

    def choose(cls: type, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        drafter = drafter_of(vllm_config) if cls is base else None
        if drafter is not None and place in drafter.runners:
            ours, _, class_name = drafter.runners[place].partition(":")
            cls = getattr(importlib.import_module(ours), class_name)
            _correct_sampling()
        return object.__new__(cls)

    base.__new__ = choose


def _correct_sampling() -> None:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm_gumiho.plugin.cpu_sampling import correct_expansion

        correct_expansion()


def _prefer_v1(module: Any) -> None:
    """Name what V2 lacks for a drafter among the reasons for which vLLM takes V1 by default."""
    config = module.VllmConfig
    original = config._get_v2_model_runner_unsupported_features

    @functools.wraps(original)
    def unsupported(self: Any) -> list[str]:
        return [*original(self), *lacking_in_v2(self)]

    config._get_v2_model_runner_unsupported_features = unsupported

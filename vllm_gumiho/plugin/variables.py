"""Environment variables of this package, known to vLLM where they are set."""

from __future__ import annotations

from typing import Any

from vllm_gumiho.env import KERNELS, OURS


def register_variables(envs: Any) -> None:
    """Make those of our environment variables that are set now known to vLLM.  envs: its module of that name.

    It warns of others that begin like its own, or refuses them (``--fail-on-environ-validation``).  Known ones enter
    the key of compiled graphs: one that decides nothing there, or is in the draft's config, without its value, and one
    that is not set not at all.
    """
    for variable in OURS:
        if variable.get() is not None:
            envs.environment_variables[variable.name] = variable.get if variable == KERNELS else lambda: None

"""Gumiho speculative decoding for vLLM.

vLLM loads `register` through its plugin entry point in each of its processes.  Importing this package does the same,
for ``LLM(..., speculative_model="gumiho")``; vLLM itself is imported by neither.
"""

import logging

from vllm_gumiho.version import __version__

__all__ = ["__version__", "register"]


def register() -> None:
    """Make Gumiho available to vLLM.  May be called any number of times; never raises."""
    try:
        from vllm_gumiho.plugin.install import install

        install()
    except Exception:
        logging.getLogger("vllm.vllm_gumiho").exception("vllm-gumiho could not be set up; vLLM goes on without it")


register()

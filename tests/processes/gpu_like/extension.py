"""For workers in processes of their own: ``worker_extension_cls="gpu_like.extension.Extension"``, a seam of vLLM's."""

from __future__ import annotations

from gpu_like import operators

operators.turn_on()


class Extension:
    """What a worker gets beside its own methods."""

    def gpu_like_calls(self) -> dict[str, int]:
        return dict(operators.CALLS)

"""A user's request for a drafter, resolved once."""

from vllm_gumiho.request.resolve import Request, asks_for_ours, resolve

__all__ = ["Request", "asks_for_ours", "resolve"]

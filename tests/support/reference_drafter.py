"""The plain torch reference that drafts are compared with; `vllm-gumiho gpu-check` compares with it too."""

from vllm_gumiho.drafters.gumiho.reference import ReferenceDrafter

__all__ = ["ReferenceDrafter"]

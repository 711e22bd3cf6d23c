"""A loaded target as vLLM's EAGLE loading looks for it: an embedding, an LM head, and what follows that.

vLLM asks for ``model.embed_tokens`` and ``lm_head``, which not every class has: logits by the embedding (Gemma-2,
Cohere), other names (GPT-2, OPT), a language model within one for images.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from vllm_gumiho.errors import DraftModelError


def language_model(target: nn.Module) -> Any:
    """The part of a target that writes text."""
    return target.get_language_model() if hasattr(target, "get_language_model") else target


def view_of(target: nn.Module, name: str, vocab_size: int) -> Any:
    """What vLLM's loading of an EAGLE draft reads of its target.  name: of the target.

    Raises: DraftModelError for a target whose embedding cannot be told.
    """
    inner = language_model(target)
    embedding = _embedding(inner, vocab_size)
    if embedding is None:
        raise DraftModelError(
            f"target {name}: vLLM's class {type(target).__name__} has no one embedding of its {vocab_size} tokens "
            "that a draft could read; serve it without speculation"
        )
    head = getattr(inner, "lm_head", None) or getattr(target, "lm_head", None)
    return SimpleNamespace(model=SimpleNamespace(embed_tokens=embedding), lm_head=head or embedding)


def _embedding(inner: Any, vocab_size: int) -> Any:
    """By the names that vLLM knows, else the one module that embeds the whole vocabulary."""
    model = getattr(inner, "model", None)
    named = getattr(model, "embed_tokens", None) or getattr(model, "embedding", None)
    if named is not None:
        return named
    found = [
        module
        for module in inner.modules()
        if isinstance(module, VocabParallelEmbedding)
        and not isinstance(module, ParallelLMHead)
        and module.org_vocab_size >= vocab_size
    ]
    return found[0] if len(found) == 1 else None

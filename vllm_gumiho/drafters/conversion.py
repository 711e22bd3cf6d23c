"""Checkpoints into the speculators format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_gumiho.checkpoint.tensors import D2T
from vllm_gumiho.drafters.checkpoints import Checkpoint, open_checkpoint, save_speculators
from vllm_gumiho.drafters.target_config import head_dim_of, norm_eps_of, rope_of
from vllm_gumiho.errors import CheckpointError
from vllm_gumiho.kernels.eight_bit import EIGHT_BIT

_FROM_TARGET = ("max_position_embeddings", "vocab_size")


def convert_checkpoint(
    source: Path,
    destination: Path,
    target: str | None = None,
    int8: bool = False,
    draft_vocab: int = 0,
    count_answers: Callable[[int], Tensor] | None = None,
) -> Checkpoint:
    """Write ``source`` as a speculators checkpoint at ``destination``, tensors bit for bit unless ``int8``.

    target: whose config fills in what the source's lacks (head counts, RoPE, vocabulary); by default the verifier
    that the source names.
    draft_vocab: draft only that many of the target's tokens, the most frequent ones of the answers that
    ``count_answers`` counts: it gives ``[V]`` for a vocabulary of V.  0 leaves the vocabulary as it is.

    Raises: CheckpointError when the source is unusable, ``destination`` exists and is not empty, head counts are
    known from neither the source nor a target, or the draft vocabulary cannot be made.
    """
    if bool(draft_vocab) != (count_answers is not None):
        raise CheckpointError(
            f"--draft-vocab {draft_vocab} with{'' if count_answers else 'out'} --answers: a draft vocabulary needs "
            "both, its size and the answers whose most frequent tokens it takes"
        )
    opened = open_checkpoint(source)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(f"{destination}: exists and is not empty; give a new folder")
    opened.verify()
    target = target or opened.verifier
    layer = dict(opened.layer_config)
    if target is None and not layer.get("num_attention_heads"):
        raise CheckpointError(f"{source}: has no config.json with num_attention_heads; name the target with --target")
    if target is not None:
        layer = _fill(layer, target, opened)
    tensors = dict(opened.tensors(keep=None if int8 else EIGHT_BIT.get(opened.eight_bit or "")))
    if count_answers is not None:
        tensors[D2T] = _draft_vocabulary(opened, draft_vocab, count_answers, layer.get("vocab_size"))
    return save_speculators(destination, tensors, target or "unknown", layer, int8, opened.drafter, opened.config)


def _draft_vocabulary(
    opened: Checkpoint, size: int, count_answers: Callable[[int], Tensor], vocab_size: int | None
) -> Tensor:
    """``d2t``: target token id less draft token id, ``[size]`` int64."""
    if opened.sizes.draft_vocab_size:
        raise CheckpointError(
            f"{opened.path}: drafts over {opened.sizes.draft_vocab_size} tokens already; give a head of the whole "
            "vocabulary"
        )
    vocab_size = vocab_size or opened.sizes.vocab_size
    if vocab_size is None:
        raise CheckpointError(f"{opened.path}: does not tell its vocabulary; name the target with --target")
    counts = count_answers(vocab_size)
    found = int((counts > 0).sum())
    if not 1 <= size <= found:
        raise CheckpointError(f"--draft-vocab {size}: these answers have {found} different tokens; give 1 to {found}")
    ids = counts.argsort(descending=True, stable=True)[:size].sort().values
    return ids - torch.arange(size)


def _fill(layer: dict[str, Any], target: str, opened: Checkpoint) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(target).get_text_config()
    except (OSError, ValueError) as error:
        if layer.get("num_attention_heads"):
            return layer
        raise CheckpointError(
            f"target {target}: its config cannot be read ({type(error).__name__}: {error})"
        ) from error
    head_dim = head_dim_of(config)
    from_target = {key: getattr(config, key) for key in _FROM_TARGET if getattr(config, key, None) is not None}
    from_target["rms_norm_eps"] = norm_eps_of(config)
    if "rope_theta" not in layer and "rope_parameters" not in layer:
        from_target["rope_parameters"] = rope_of(config)
    heads = {
        "num_attention_heads": opened.sizes.query_size // head_dim,
        "num_key_value_heads": opened.sizes.key_size // head_dim,
    }
    return {**heads, **from_target, **layer}

"""Bytes that a draft round of a checkpoint reads, by ``draft_weights``."""

from __future__ import annotations

from vllm_gumiho.drafters.checkpoints import open_checkpoint
from vllm_gumiho.drafters.draft_weights import CHOICES
from vllm_gumiho.drafters.protocol import RoundBytes
from vllm_gumiho.errors import CheckpointError
from vllm_gumiho.request.catalogue import local_path


def of_checkpoint(where: str) -> dict[str, RoundBytes]:
    """By every ``draft_weights`` but auto, over the checkpoint's draft vocabulary, else its whole one.

    Raises: CheckpointError where it is no Gumiho checkpoint, or does not tell its vocabulary.
    """
    opened = open_checkpoint(local_path(where))
    vocabulary = opened.sizes.draft_vocab_size or opened.sizes.vocab_size or opened.layer_config.get("vocab_size")
    if not opened.drafter.takes_eight_bits or not vocabulary:
        raise CheckpointError(
            f"{where}: bytes of a round are known for Gumiho checkpoints that tell their vocabulary; convert it with "
            "--target"
        )
    return {kind: opened.drafter.round_bytes(opened.sizes, vocabulary, kind) for kind in CHOICES[1:]}

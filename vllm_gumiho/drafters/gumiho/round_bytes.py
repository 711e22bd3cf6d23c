"""Bytes that a draft round reads, by ``draft_weights``: each weight as often as a round reads it.

A round of s serial steps and heads reads ``fc`` s + 1 times, the layers s times, every head once and the LM head's rows
s + 1 times; and once what makes a feature of several of the target's layers, where it reads them.  KV caches and
activations, some percent at small batches, are left out.  ``fc`` is wide whatever the others are.
"""

from __future__ import annotations

from vllm_gumiho.checkpoint.tensors import UNROUNDED
from vllm_gumiho.drafters.gumiho.layout import COMBINE, GumihoSizes, tensor_shapes
from vllm_gumiho.drafters.protocol import RoundBytes

# Of fp8 and int8 also a float32 scale a row.
_SCALE_BYTES = 4


def round_bytes(sizes: GumihoSizes, vocab_size: int, weights: str) -> RoundBytes:
    """Of a drafter of these sizes over ``vocab_size`` drafted tokens; weights: ``bf16``, ``fp8`` or ``int8``."""

    def matrix(shape: tuple[int | None, ...], wide: bool = False) -> int:
        rows, columns = (size or 0 for size in shape)
        return 2 * rows * columns if wide or weights == "bf16" else rows * (columns + _SCALE_BYTES)

    parts = {"fc": 0, "layers": 0, "mlp": 0, COMBINE: 0, "state_norms": 0}
    for name, shape in tensor_shapes(sizes).items():
        parts[name.split(".")[0]] += matrix(shape, name in UNROUNDED) if len(shape) == 2 else 2 * (shape[0] or 0)
    lm_head = matrix((vocab_size, sizes.hidden_size))
    serial = parts["fc"] + parts["layers"] + lm_head
    heads = parts["fc"] + parts["mlp"] + lm_head
    first = parts[COMBINE] + parts["state_norms"]
    return RoundBytes(serial, heads, first + sizes.num_serial_steps * serial + heads)

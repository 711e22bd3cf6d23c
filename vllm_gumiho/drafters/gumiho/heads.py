"""The parallel heads as a module: whole on every tensor-parallel rank, or shared out among the ranks by head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import get_tp_group, tensor_model_parallel_all_gather
from vllm.platforms import current_platform

from vllm_gumiho.drafters.eight_bit import for_device, packed_for_cpu
from vllm_gumiho.drafters.ranks import lowest_of_all_ranks
from vllm_gumiho.env import SPLIT_HEADS
from vllm_gumiho.errors import SplitHeadsError
from vllm_gumiho.kernels.eight_bit import EightBitRows
from vllm_gumiho.kernels.parallel_heads import (
    GAVE_UP,
    HEAD_STAGES,
    HeadScales,
    HeadsPath,
    HeadWeights,
    new_counters,
    parallel_heads,
)
from vllm_gumiho.kernels.parallel_heads.tiling import BATCH_TILES, batch_tile

# Weights that a rank must be spared, a draft, for an all-gather of the features to pay.  On the CPU: less than half of
# the smallest case that was measured to pay (docs/results/kernels.md).  On a data-centre GPU: reading these takes 28 us
# at 4.8 TB/s and more on slower ones, about what a small all-gather takes; arithmetic, not measured.
CPU_SPLIT_BYTES, SPLIT_BYTES = 8 << 20, 128 << 20

# Drafts from one look at the counters' flag to the next: a look waits for the device.
FLAG_EVERY = 1024


def split_heads(num_heads: int, head_bytes: int, ranks: int, on_cpu: bool) -> bool:
    """Whether ranks share the heads out: ``VLLM_GUMIHO_SPLIT_HEADS`` 1 or 0, else where it spares enough reading.

    num_heads: those that the largest K asks for.
    Raises: SplitHeadsError for another value of the variable.
    """
    value = SPLIT_HEADS.get()
    if value not in (None, "auto", "0", "1"):
        raise SplitHeadsError(
            f"{SPLIT_HEADS.name}={value!r} is not a choice; set it to auto (the default: tensor-parallel ranks share "
            "the heads where that spares enough reading), 1 (they always do) or 0 (every rank has all heads)"
        )
    if ranks == 1 or value == "0":
        return False
    spared = (num_heads - -(-num_heads // ranks)) * head_bytes
    return value == "1" or spared >= (CPU_SPLIT_BYTES if on_cpu else SPLIT_BYTES)


class ParallelHeads(nn.Module):
    """Weights of this rank's heads that some K asks for, stacked so that one batched product a stage serves them.

    Where ranks share the heads out, rank r of R has heads r, r + R, ...: the first heads, all that a small K asks for,
    then lie on different ranks.
    """

    def __init__(
        self,
        num_heads: int,
        num_serial_steps: int,
        hidden_size: int,
        dtype: torch.dtype,
        asked_for: int | None = None,
        weights: torch.dtype | None = None,
    ):
        """asked_for: how many of the heads the largest K asks for, None for all of them; the rest take no memory.

        weights: an 8-bit dtype, whose rows have scales; None for ``dtype``.
        """
        super().__init__()
        parameters_of_head = hidden_size * ((num_serial_steps + HEAD_STAGES - 1) * hidden_size + HEAD_STAGES)
        group = get_tp_group()
        head_bytes = parameters_of_head * (weights or dtype).itemsize
        used = num_heads if asked_for is None else max(0, min(num_heads, asked_for))
        split = split_heads(used, head_bytes, group.world_size, current_platform.is_cpu())
        split = bool(lowest_of_all_ranks([int(split)])[0])
        self.ranks: int = group.world_size if split else 1
        self.rank: int = group.rank_in_group if split else 0
        self.used = used
        own = len(range(self.rank, used, self.ranks))

        def parameter(*shape: int, kind: torch.dtype = dtype) -> nn.Parameter:
            # More ranks than heads: one of zeros, that is never asked, keeps every shape whole.
            make = torch.empty if own else torch.zeros
            return nn.Parameter(make(max(own, min(used, 1)), *shape, dtype=kind), requires_grad=False)

        self.first_weight = parameter(hidden_size, num_serial_steps * hidden_size, kind=weights or dtype)
        self.first_bias = parameter(hidden_size)
        self.weight = parameter(HEAD_STAGES - 1, hidden_size, hidden_size, kind=weights or dtype)
        self.bias = parameter(HEAD_STAGES - 1, hidden_size)
        self.first_scale = parameter(hidden_size, kind=torch.float32) if weights else None
        self.scale = parameter(HEAD_STAGES - 1, hidden_size, kind=torch.float32) if weights else None
        # vLLM's int8 products on a CPU, by head and stage, once `pack` has given them the weights.
        self._products: list[list[tuple[Any, nn.Module]]] = []
        # The kernel by heads asked for and batch tile, where one was chosen; the library's products for the rest.
        self.paths: dict[tuple[int, int], HeadsPath] = {}
        self._drafts = 0
        # A buffer, as vLLM's sleep keeps those alone.
        self.counters: Tensor
        self.register_buffer("counters", new_counters(self.bias.device), persistent=False)

    def own(self, count: int) -> int:
        """How many of the first ``count`` heads this rank has."""
        return len(range(self.rank, count, self.ranks))

    def destination(self, head: int, stage: int, kind: str) -> Tensor | None:
        """View that holds the tensor ``mlp.{head}.{stage}.linear.{kind}``; None where another rank has that head, or
        no K asks for it.

        kind: ``weight``, ``bias``, or ``weight_scale`` of 8-bit rows, ``[H, 1]``.
        """
        if head >= self.used or head % self.ranks != self.rank:
            return None
        own = head // self.ranks
        first, rest = {
            "weight": (self.first_weight, self.weight),
            "bias": (self.first_bias, self.bias),
            "weight_scale": (self.first_scale, self.scale),
        }[kind]
        place = first[own] if stage == 0 else rest[own, stage - 1]
        return place[:, None] if kind == "weight_scale" else place

    def forward(self, m: Sequence[Tensor], count: int) -> Tensor:
        """o_1..o_S, each ``[B, H]`` -> ``[count, B, H]``, the first ``count`` heads; the same on every rank."""
        if self.ranks == 1:
            return self._own(m, count)
        share, own = -(-count // self.ranks), self.own(count)
        features = self._own(m, count) if own else m[-1].new_empty(0, *m[-1].shape)
        whole = F.pad(features, (0, 0, 0, 0, 0, share - own)).contiguous()
        gathered = tensor_model_parallel_all_gather(whole, dim=0).unflatten(0, (self.ranks, share))
        # Laid out request by request, as the LM head reads them.
        return gathered.permute(2, 1, 0, 3).flatten(1, 2)[:, :count].transpose(0, 1)

    def _own(self, m: Sequence[Tensor], count: int) -> Tensor:
        """This rank's of the first ``count`` heads, by no kernel that was not checked for just this shape."""
        own = self.own(count)
        if self._products:
            return self._by_products(m, own)
        scales = self.scales.take(own) if self.scales else None
        tile = batch_tile(m[-1].shape[0])
        if scales:  # larger batches go in parts of the largest tile: the library would widen the weights at each call
            tile = min(tile, BATCH_TILES[-1])
        path = self.paths.get((count, tile), HeadsPath.BATCHED)
        return parallel_heads(m, self.weights.take(own), scales, path=path, counters=self.counters)

    def _by_products(self, m: Sequence[Tensor], own: int) -> Tensor:
        """By vLLM's int8 products on a CPU, which round each row of their input to int8."""
        whole = torch.cat(tuple(m), dim=-1)
        found = []
        for stages in self._products[:own]:
            (kernel, layer), *rest = stages
            z = F.silu(kernel.apply_weights(layer, whole, layer.bias))
            for kernel, layer in rest:
                z = z + F.silu(kernel.apply_weights(layer, z, layer.bias))
            found.append(z)
        return torch.stack(found)

    def finish_loading(self) -> None:
        """Bring loaded 8-bit rows into the format that their device converts."""
        if self.scale is None or self.first_scale is None:
            return
        for weight, scale in ((self.first_weight, self.first_scale), (self.weight, self.scale)):
            weight.data, scale.data = for_device(EightBitRows(weight.data, scale.data))

    def pack(self) -> bool:
        """On a CPU, let vLLM's int8 products have int8 weights where none of ours takes them; whether it was so."""
        if self.paths or self.weight.dtype != torch.int8 or self.weight.device.type != "cpu":
            return False
        assert self.first_scale is not None
        assert self.scale is not None
        for i in range(len(self.first_bias)):
            first = EightBitRows(self.first_weight[i], self.first_scale[i])
            rest = [EightBitRows(self.weight[i, j], self.scale[i, j]) for j in range(HEAD_STAGES - 1)]
            biases = [self.first_bias[i], *self.bias[i]]
            self._products.append(
                [packed_for_cpu(rows, b.dtype, b.data) for rows, b in zip([first, *rest], biases, strict=True)]
            )
        for name in ("first_weight", "weight", "first_scale", "scale"):
            setattr(self, name, None)
        return True

    def leave_single_launch(self) -> bool:
        """Take one launch per stage from now on where a wait of the single launch has given up; whether that is new.

        To be called once a draft, on every rank.  It waits for the device in one of `FLAG_EVERY` calls.
        """
        if HeadsPath.FUSED not in self.paths.values():
            return False
        self._drafts += 1
        if self._drafts % FLAG_EVERY:
            return False
        clean = lowest_of_all_ranks([int(not self.counters[GAVE_UP].item())])[0]
        if clean:
            return False
        self.paths = {
            shape: HeadsPath.STAGES if path is HeadsPath.FUSED else path for shape, path in self.paths.items()
        }
        self.counters.zero_()
        return True

    @property
    def scales(self) -> HeadScales | None:
        """Of 8-bit rows."""
        return None if self.scale is None else HeadScales(self.first_scale, self.scale)

    @property
    def weights(self) -> HeadWeights:
        return HeadWeights(self.first_weight, self.first_bias, self.weight, self.bias)

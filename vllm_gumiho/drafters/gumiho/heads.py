"""The parallel heads as a module: whole on every tensor-parallel rank, or shared out among the ranks by head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import get_tp_group, tensor_model_parallel_all_gather
from vllm.platforms import current_platform

from vllm_gumiho.drafters.ranks import lowest_of_all_ranks
from vllm_gumiho.env import SPLIT_HEADS
from vllm_gumiho.errors import SplitHeadsError
from vllm_gumiho.kernels.parallel_heads import (
    GAVE_UP,
    HEAD_STAGES,
    HeadsPath,
    HeadWeights,
    new_counters,
    parallel_heads,
)
from vllm_gumiho.kernels.parallel_heads.tiling import batch_tile

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
    """Weights of this rank's heads, stacked so that one batched product a stage serves them.

    Where ranks share the heads out, rank r of R has heads r, r + R, ...: the first heads, all that a small K asks for,
    then lie on different ranks.
    """

    def __init__(
        self, num_heads: int, num_serial_steps: int, hidden_size: int, dtype: torch.dtype, asked_for: int | None = None
    ):
        """asked_for: how many of the heads the largest K asks for; None is all of them."""
        super().__init__()
        parameters_of_head = hidden_size * ((num_serial_steps + HEAD_STAGES - 1) * hidden_size + HEAD_STAGES)
        group = get_tp_group()
        head_bytes = parameters_of_head * dtype.itemsize
        used = num_heads if asked_for is None else max(0, min(num_heads, asked_for))
        split = split_heads(used, head_bytes, group.world_size, current_platform.is_cpu())
        split = bool(lowest_of_all_ranks([int(split)])[0])
        self.ranks: int = group.world_size if split else 1
        self.rank: int = group.rank_in_group if split else 0
        own = len(range(self.rank, num_heads, self.ranks))

        def parameter(*shape: int) -> nn.Parameter:
            # More ranks than heads: one of zeros, that is never asked, keeps every shape whole.
            make = torch.empty if own else torch.zeros
            return nn.Parameter(make(max(1, own), *shape, dtype=dtype), requires_grad=False)

        self.first_weight = parameter(hidden_size, num_serial_steps * hidden_size)
        self.first_bias = parameter(hidden_size)
        self.weight = parameter(HEAD_STAGES - 1, hidden_size, hidden_size)
        self.bias = parameter(HEAD_STAGES - 1, hidden_size)
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
        """View that holds the tensor ``mlp.{head}.{stage}.linear.{kind}``; None where another rank has that head."""
        if head % self.ranks != self.rank:
            return None
        own = head // self.ranks
        if stage == 0:
            return (self.first_weight if kind == "weight" else self.first_bias)[own]
        return (self.weight if kind == "weight" else self.bias)[own, stage - 1]

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
        path = self.paths.get((count, batch_tile(m[-1].shape[0])), HeadsPath.BATCHED)
        return parallel_heads(m, self.weights.take(self.own(count)), path=path, counters=self.counters)

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
    def weights(self) -> HeadWeights:
        return HeadWeights(self.first_weight, self.first_bias, self.weight, self.bias)

"""Which kernels draft: the switch, and one decision for each shape that can be launched, when the model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from vllm_gumiho.drafters.kernel_check import random_rows, uncounted, wrong_heads, wrong_products, wrong_tokens
from vllm_gumiho.drafters.kernel_timing import Timer, graph_timer, pays
from vllm_gumiho.drafters.lm_head import GreedyArgmax
from vllm_gumiho.drafters.ranks import lowest_of_all_ranks
from vllm_gumiho.env import KERNELS
from vllm_gumiho.errors import KernelChoiceError
from vllm_gumiho.kernels.eight_bit import MAX_ROWS, EightBitRows
from vllm_gumiho.kernels.lm_head_argmax import lm_head_argmax, row_tiles
from vllm_gumiho.kernels.parallel_heads import (
    HeadScales,
    HeadsPath,
    HeadWeights,
    choose_path,
    offered_paths,
    parallel_heads,
)
from vllm_gumiho.kernels.parallel_heads.tiling import BATCH_TILES, batch_tile

# From the safest to the one that asks most of the device.
_PATHS = (HeadsPath.BATCHED, HeadsPath.STAGES, HeadsPath.DEPENDENT, HeadsPath.FUSED)
_ELSEWHERE = "left out on another rank"


class Switch(str, Enum):
    """Values of VLLM_GUMIHO_KERNELS: on a GPU with greedy drafting where they pay, wherever they run, nowhere."""

    AUTO = "auto"
    ON = "1"
    OFF = "0"


@dataclass(frozen=True)
class Shapes:
    """What an engine can launch.

    heads: how many of the first heads some K asks for, and how many of those this rank has.  max_batch: requests at
    once.
    """

    heads: dict[int, int]
    max_batch: int

    @property
    def batch_tiles(self) -> list[int]:
        """Padded batches that the heads' kernel takes."""
        return [tile for tile in BATCH_TILES if tile <= batch_tile(self.max_batch)]

    @property
    def of_heads(self) -> list[tuple[int, int]]:
        """Numbers of heads asked for, each with every batch tile: a kernel each."""
        return [(count, tile) for count in sorted(self.heads) for tile in self.batch_tiles]

    @property
    def rows(self) -> dict[int, int]:
        """Row tiles of the argmax kernel, with the most rows that each can get: a serial step's and the heads'."""
        most = self.max_batch * max([1, *self.heads])
        return {tile: min(tile, most) for tile in row_tiles(most)}


@dataclass(frozen=True)
class Choice:
    """How heads and greedy tokens are computed, shape by shape, and why, for the log.

    heads: the kernel's path by heads asked for and batch tile; what is not in it is the library's.  argmax: row tiles
    that the kernel takes.
    """

    shapes: Shapes
    heads: dict[tuple[int, int], HeadsPath] = field(default_factory=dict)
    heads_reason: str = ""
    argmax: frozenset[int] = frozenset()
    argmax_reason: str = ""

    def describe(self) -> str:
        """For the log line at start."""
        by_path: dict[HeadsPath, list[tuple[int, int]]] = {}
        for shape in self.shapes.of_heads:
            by_path.setdefault(self.heads.get(shape, HeadsPath.BATCHED), []).append(shape)
        most = next(iter(self.heads.values()), HeadsPath.BATCHED)
        heads = f"heads by {most.value} ({self.heads_reason})"
        for path in (path for path in reversed(_PATHS) if path is not most and self.heads):
            if shapes := by_path.get(path):
                some = ", ".join(f"{count} at batch {_range(tile)}" for count, tile in shapes)
                heads += f" and by {path.value} ({some})"
        return f"{heads}, {describe_argmax(self.shapes, self.argmax, self.argmax_reason)}"


def describe_argmax(shapes: Shapes, taken: frozenset[int], reason: str) -> str:
    """For the log line at start: row tiles that the argmax kernel takes, and why."""
    argmax = f"argmax by {'Triton kernel' if taken else 'logits'} ({reason})"
    tiles = [tile for tile in shapes.rows if tile not in taken] if taken else []
    return argmax + (f" and by logits ({', '.join(map(_range, tiles))} rows)" if tiles else "")


def _range(tile: int) -> str:
    return f"{tile // 2 + 1 if tile > 16 else 1} to {tile}"


def kernel_switch() -> Switch:
    """What VLLM_GUMIHO_KERNELS asks for; unset is auto.  Raises KernelChoiceError."""
    value = KERNELS.get()
    try:
        return Switch.AUTO if value is None else Switch(value)
    except ValueError:
        raise KernelChoiceError(
            f"{KERNELS.name}={value!r} is not a choice; set it to auto (the default: Triton kernels on a GPU with "
            "greedy drafting), 1 (wherever they run) or 0 (off)"
        ) from None


def refusal(switch: Switch, device: torch.device, greedy: bool) -> str | None:
    """Why no Triton kernel is to be used, None where they are asked for."""
    if switch is Switch.OFF:
        return f"{KERNELS.name}=0"
    if switch is Switch.AUTO and device.type != "cuda":  # ROCm devices too are "cuda" in torch
        return f"no GPU; {KERNELS.name}=1 asks for the Triton kernels all the same"
    if switch is Switch.AUTO and not greedy:
        return f"drafts are sampled; {KERNELS.name}=1 asks for the Triton kernels all the same"
    return None


class Heads(Protocol):
    """This rank's heads: weights, scales of 8-bit rows, and counters for the single launch."""

    counters: Tensor

    @property
    def weights(self) -> HeadWeights: ...
    @property
    def scales(self) -> HeadScales | None: ...


def choose_kernels(
    shapes: Shapes,
    of: Heads,
    tokens: GreedyArgmax | None,
    tokens_refused: str | None,
    greedy: bool,
    timer: Timer = graph_timer,
) -> Choice:
    """Decide once, when the model is loaded: every kernel asked for is checked at every shape, and timed.

    A kernel that is wrong anywhere is left out; at a shape where it does not pay, the library's way is taken.  Where
    the switch forces them, kernels are not timed.  8-bit heads take the kernel for sampled drafts too: the library has
    no product of theirs.  of: this rank's heads.  tokens: the argmax kernel on this LM
    head, None where ``tokens_refused`` says why it does not apply.  All ranks of a tensor-parallel group come to the
    same choice.

    Raises: KernelChoiceError where a kernel that is forced fails.
    """
    switch = kernel_switch()
    device, dtype = of.weights.bias.device, of.weights.bias.dtype
    refused = refusal(switch, device, greedy)
    heads_refused = refusal(switch, device, greedy or of.scales is not None)
    timed = timer if switch is Switch.AUTO else None
    with uncounted():
        paths, reason, failed = _right_paths(shapes, of, heads_refused, several=timed is not None)
        heads = dict.fromkeys(shapes.of_heads, paths[0]) if paths else {}
        if heads and timed:
            heads, reason = _paying_heads(paths, reason, shapes, of, timed)
        argmax, argmax_reason = _argmax_tiles(shapes, tokens, refused or tokens_refused, dtype, timed)
    if switch is Switch.ON:
        if failed:
            raise KernelChoiceError(f"{KERNELS.name}=1, but {reason}; unset it")
        if tokens is not None and not argmax:
            raise KernelChoiceError(f"{KERNELS.name}=1, but argmax: {argmax_reason}; unset it")
    agreed = lowest_of_all_ranks(
        [_PATHS.index(heads.get(shape, HeadsPath.BATCHED)) for shape in shapes.of_heads]
        + [int(tile in argmax) for tile in shapes.rows]
    )
    paths = [_PATHS[number] for number in agreed[: len(shapes.of_heads)]]
    common = {shape: one for shape, one in zip(shapes.of_heads, paths, strict=True) if one is not HeadsPath.BATCHED}
    kept = frozenset(t for t, yes in zip(shapes.rows, agreed[len(shapes.of_heads) :], strict=True) if yes)
    if common != heads:
        reason = f"{reason}; {_ELSEWHERE}"
    if kept != argmax:
        argmax_reason = f"{argmax_reason}; {_ELSEWHERE}"
    return Choice(shapes, common, reason, kept, argmax_reason)


def choose_argmax(
    max_batch: int,
    tokens: GreedyArgmax | None,
    tokens_refused: str | None,
    greedy: bool,
    device: torch.device,
    dtype: torch.dtype,
    timer: Timer = graph_timer,
) -> tuple[frozenset[int], str]:
    """`choose_kernels` for a drafter without parallel heads: row tiles that the kernel takes, and words for the log."""
    switch, shapes = kernel_switch(), Shapes({}, max_batch)
    refused = refusal(switch, device, greedy) or tokens_refused
    with uncounted():
        found, reason = _argmax_tiles(shapes, tokens, refused, dtype, timer if switch is Switch.AUTO else None)
    if switch is Switch.ON and tokens is not None and not found:
        raise KernelChoiceError(f"{KERNELS.name}=1, but argmax: {reason}; unset it")
    agreed = lowest_of_all_ranks([int(tile in found) for tile in shapes.rows])
    kept = frozenset(tile for tile, yes in zip(shapes.rows, agreed, strict=True) if yes)
    reason = reason if kept == found else f"{reason}; {_ELSEWHERE}"
    return kept, describe_argmax(shapes, kept, reason)


def _right_paths(shapes: Shapes, of: Heads, refused: str | None, several: bool) -> tuple[list[HeadsPath], str, bool]:
    """Kernels that are right at every shape, the most demanding first, why, and whether every kernel failed.

    several: to be timed against each other; a launch per stage only where no other is right.
    """
    if refused is not None:
        return [], refused, False
    one = of.weights.first_bias.new_empty(1, 0)
    best, reason = choose_path(one, of.weights, of.scales)
    if not shapes.heads:
        return [], "this K asks for none", False
    failed: list[str] = []
    right: list[HeadsPath] = []
    batches = sorted({1, *(min(tile, shapes.max_batch) for tile in shapes.batch_tiles)})
    counts = sorted({own for own in shapes.heads.values() if own})
    for path in offered_paths(one, best):
        if right and (not several or path is HeadsPath.STAGES):
            break
        problem = wrong_heads(of.weights, path, counts, batches, of.counters, of.scales) if counts else None
        if problem is None:
            right.append(path)
            continue
        of.counters.zero_()
        failed.append(f"{path.value} failed its check: {problem}")
    if not right:
        return [], "; ".join(failed) or reason, bool(failed)
    return right, "; ".join([*failed, "checked" if failed else f"{reason}; checked"]), False


def _paying_heads(
    paths: list[HeadsPath],
    reason: str,
    shapes: Shapes,
    of: Heads,
    timer: Timer,
) -> tuple[dict[tuple[int, int], HeadsPath], str]:
    """The fastest kernel at each shape where one pays, and the reason with its ratios.

    Timed at the largest batch of each tile.
    """
    weights, scales = of.weights, of.scales
    hidden, device, dtype = weights.first_bias.shape[1], weights.bias.device, weights.bias.dtype

    def ratio(count: int, tile: int, path: HeadsPath) -> float:
        own = shapes.heads[count]
        if not own:
            return 0.0  # of another rank's heads alone
        m = random_rows(min(tile, shapes.max_batch), weights.first_weight.shape[2], device, dtype)
        run = partial(
            parallel_heads, m.split(hidden, dim=1), weights.take(own), scales and scales.take(own), counters=of.counters
        )
        return _ratio(timer(partial(run, path=path), partial(run, path=HeadsPath.BATCHED)))

    ratios = {shape: {path: ratio(*shape, path) for path in paths} for shape in shapes.of_heads}
    # Of equals, and of ratios that are no numbers, the first.
    best = {shape: min(paths, key=of_shape.__getitem__) for shape, of_shape in ratios.items()}
    kept = {shape: path for shape, path in best.items() if pays(ratios[shape][path], 1)}
    return kept, _with_ratios(reason, [ratios[shape][path] for shape, path in best.items() if ratios[shape][path]])


def _argmax_tiles(
    shapes: Shapes, tokens: GreedyArgmax | None, refused: str | None, dtype: torch.dtype, timer: Timer | None
) -> tuple[frozenset[int], str]:
    """The row tiles that the argmax kernel is to take, and why so."""
    if tokens is None or refused is not None:
        return frozenset(), refused or ""
    rows, shard = shapes.rows, tokens.shard
    problem = wrong_tokens(tokens, sorted({1, *rows.values()}), dtype)
    if problem is not None:
        return frozenset(), f"the kernel failed its check: {problem}"
    if timer is None or not shard.size:
        return frozenset(rows), "checked"

    def ratio(count: int) -> float:
        x = random_rows(count, shard.weight.shape[1], shard.weight.device, dtype)
        run: Callable = partial(lm_head_argmax, x, shard.weight, shard.size, scale=shard.scale)
        return _ratio(timer(run, partial(run, kernel=False)))

    ratios = {tile: ratio(count) for tile, count in rows.items()}
    return frozenset(t for t in rows if pays(ratios[t], 1)), _with_ratios("checked", ratios.values())


def products_by_kernel(matrices: Sequence[EightBitRows], dtype: torch.dtype) -> bool:
    """Whether our kernel multiplies with these 8-bit rows: asked for, and right at every row tile, on every rank.

    Every tile can be launched: several heads' rows, and prompts, are more than there are requests.

    Raises: KernelChoiceError where the kernel is forced and fails.
    """
    switch = kernel_switch()
    asked = refusal(switch, matrices[0].weight.device, greedy=True) is None
    with uncounted():
        problem = wrong_products(matrices, (1, 16, 32, MAX_ROWS), dtype) if asked else None
    if asked and problem and switch is Switch.ON:
        raise KernelChoiceError(f"{KERNELS.name}=1, but products of 8-bit rows: {problem}; unset it")
    return bool(lowest_of_all_ranks([int(asked and problem is None)])[0])


def _ratio(times: tuple[float, float]) -> float:
    return times[0] / times[1]


def _with_ratios(reason: str, ratios: Iterable[float]) -> str:
    """The reason, and between what shares of the library's time the kernel takes."""
    found = sorted(ratios)
    if not found:
        return reason
    low, high = f"{found[0]:.2f}", f"{found[-1]:.2f}"
    return f"{reason}; the kernel takes {low if low == high else f'{low} to {high}'} of the library's time"

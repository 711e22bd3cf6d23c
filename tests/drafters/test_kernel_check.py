"""Which kernels draft: the switch, the reasons, the check and the timing at load."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_gumiho.drafters import kernel_check, kernel_choice
from vllm_gumiho.drafters.kernel_choice import Shapes, Switch, choose_kernels, kernel_switch, refusal
from vllm_gumiho.drafters.target_owned import draft_lengths
from vllm_gumiho.env import KERNELS
from vllm_gumiho.errors import KernelChoiceError
from vllm_gumiho.kernels.eight_bit import quantise_rows
from vllm_gumiho.kernels.eight_bit.triton import choose_linear_tiling
from vllm_gumiho.kernels.lm_head_argmax import MAX_ROWS
from vllm_gumiho.kernels.parallel_heads import (
    GAVE_UP,
    HeadsPath,
    HeadWeights,
    launches,
    new_counters,
    parallel_heads_reference,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")
# K = 3 and 4, eight requests at once.
SHAPES = Shapes({1: 1, 2: 2}, 8)


def even_timer(kernel, library):
    """Kernels pay everywhere, and both ways run."""
    kernel(), library()
    return 80.0, 100.0


@pytest.fixture
def weights() -> HeadWeights:
    torch.manual_seed(0)
    return HeadWeights(
        torch.randn(2, 16, 32) / 32**0.5, torch.randn(2, 16), torch.randn(2, 5, 16, 16) / 4, torch.randn(2, 5, 16)
    )


@pytest.fixture
def no_group(monkeypatch):
    """One rank, without vLLM's process groups."""
    monkeypatch.setattr(kernel_choice, "lowest_of_all_ranks", lambda values: values)


@pytest.mark.parametrize(("value", "switch"), [(None, Switch.AUTO), ("auto", "auto"), ("1", "1"), ("0", "0")])
def test_switch(monkeypatch, value, switch):
    monkeypatch.delenv(KERNELS.name, raising=False)
    if value is not None:
        monkeypatch.setenv(KERNELS.name, value)
    assert kernel_switch() is Switch(switch)


@pytest.mark.parametrize("value", ["yes", "", "2", "AUTO"])
def test_other_values_are_refused(monkeypatch, value):
    monkeypatch.setenv(KERNELS.name, value)
    with pytest.raises(KernelChoiceError, match=rf"{KERNELS.name}='{value}'.*auto.*1.*0"):
        kernel_switch()


@pytest.mark.parametrize(("switch", "device", "greedy", "reason"), [
    (Switch.AUTO, GPU, True, None), (Switch.AUTO, CPU, True, "no GPU"), (Switch.AUTO, GPU, False, "sampled"),
    (Switch.ON, CPU, True, None), (Switch.ON, GPU, False, None), (Switch.OFF, GPU, True, "=0"),
])  # fmt: skip
def test_where_the_kernels_are_asked_for(switch, device, greedy, reason):
    found = refusal(switch, device, greedy)
    assert found is None if reason is None else reason in found


def pretend(monkeypatch, **behaviour):
    """A device for one launch, where a path gives the reference or does what ``behaviour`` says by its name."""

    def run(m, weights, scales, path, counters):
        launches[path] += 1
        z = parallel_heads_reference(torch.cat(m, dim=-1), weights, scales)
        return behaviour.get(path.name, lambda z, counters: z)(z, counters)

    monkeypatch.setattr(kernel_choice, "choose_path", lambda m, weights, scales: (HeadsPath.FUSED, "it fits"))
    for module in (kernel_check, kernel_choice):
        monkeypatch.setattr(module, "parallel_heads", run)
    monkeypatch.setattr(kernel_choice, "refusal", lambda switch, device, greedy: None)
    monkeypatch.delenv(KERNELS.name, raising=False)


def choose(weights, shapes=SHAPES, tokens=None, refused="the LM head has a bias", timer=even_timer):
    return choose_kernels(shapes, module(weights), tokens, None if tokens else refused, True, timer)


def module(weights, counters=None):
    return SimpleNamespace(weights=weights, scales=None, counters=new_counters(CPU) if counters is None else counters)


def wrong(z, counters):
    return z + (z.abs().max() if z.shape[1] == 8 else 0)  # at one batch size only


def wrong_with_one_head(z, counters):
    return z + (z.abs().max() if len(z) == 1 else 0)


def nan(z, counters):
    return z * float("nan")


def stuck(z, counters):
    counters[GAVE_UP] = 1
    return z


def left(z, counters):
    counters[0] = 3
    return z


def fails(z, counters):
    raise RuntimeError("no kernel image\nand more")


CHECKS = [
    ({}, HeadsPath.FUSED, ["it fits; checked"]),
    ({"FUSED": wrong}, HeadsPath.STAGES, ["one Triton launch failed its check: off by", "at batch 8; checked"]),
    ({"FUSED": wrong_with_one_head}, HeadsPath.STAGES, ["off by", "with 1 heads at batch 1; checked"]),
    ({"FUSED": stuck}, HeadsPath.STAGES, ["its barrier gave up or left its counters with 1 heads at batch 1; checked"]),
    ({"FUSED": left}, HeadsPath.STAGES, ["its barrier gave up or left its counters with 1 heads at batch 1; checked"]),
    ({"FUSED": fails}, HeadsPath.STAGES, ["RuntimeError: no kernel image; checked"]),
    (
        {"FUSED": fails, "STAGES": nan},
        HeadsPath.BATCHED,
        ["no kernel image; one Triton launch per stage failed", "nan"],
    ),
]


@pytest.mark.parametrize(("behaviour", "path", "reasons"), CHECKS)
def test_a_path_that_fails_its_check_is_left(monkeypatch, no_group, weights, behaviour, path, reasons):
    pretend(monkeypatch, **behaviour)
    before = launches.copy()
    choice = choose(weights)
    assert choice.heads == ({} if path is HeadsPath.BATCHED else {(1, 16): path, (2, 16): path})
    assert all(reason in choice.heads_reason for reason in reasons)
    assert not choice.argmax
    assert f"heads by {path.value} (" in choice.describe()
    assert "argmax by logits (the LM head has a bias)" in choice.describe()
    assert launches == before


def test_counters_that_a_failed_check_left_are_zeroed(monkeypatch, no_group, weights):
    pretend(monkeypatch, FUSED=stuck)
    counters = new_counters(CPU)
    choose_kernels(SHAPES, module(weights, counters), None, "the LM head has a bias", True, even_timer)
    assert not counters.any()


def test_forced_kernels_that_fail_end_the_start(monkeypatch, no_group, weights, tokens):
    pretend(monkeypatch, FUSED=fails, STAGES=wrong)
    monkeypatch.setenv(KERNELS.name, "1")
    with pytest.raises(KernelChoiceError, match=r"no kernel image.*off by.*unset it"):
        choose(weights)
    pretend(monkeypatch)
    monkeypatch.setenv(KERNELS.name, "1")
    monkeypatch.setattr(kernel_choice, "wrong_tokens", lambda *a: "off by 3")
    with pytest.raises(KernelChoiceError, match="off by 3; unset it"):
        choose(weights, tokens=tokens)


SHAPES_THERE_ARE = [
    # K = 7 with 8 requests at once: five heads, up to 40 rows.
    (Shapes({5: 5}, 8), {(5, 16)}, [1, 8], {16: 16, 32: 32, 64: 40}),
    # A schedule of K up to 7, and 256 requests: each number of heads, both batch tiles, no row tile above 64.
    (
        Shapes({1: 1, 3: 3, 5: 5}, 256),
        {(1, 16), (1, 32), (3, 16), (3, 32), (5, 16), (5, 32)},
        [1, 16, 32],
        {16: 16, 32: 32, 64: 64},
    ),
    # The second of two ranks has no head of the first one, and one of the first two.
    (Shapes({1: 0, 2: 1}, 20), {(1, 16), (1, 32), (2, 16), (2, 32)}, [1, 16, 20], {16: 16, 32: 32, 64: 40}),
    # One request, two heads; and K = 2, where there are none.
    (Shapes({2: 2}, 1), {(2, 16)}, [1], {16: 2}),
    (Shapes({}, 32), set(), None, {16: 16, 32: 32}),
]


@pytest.mark.parametrize(("shapes", "of_heads", "batches", "rows"), SHAPES_THERE_ARE)
def test_every_shape_that_serving_launches_is_checked_and_timed(
    monkeypatch, no_group, weights, tokens, shapes, of_heads, batches, rows
):
    """Numbers of heads that a K asks for and that this rank has, batch tiles, and rows of a step and of the heads."""
    pretend(monkeypatch)
    checked, scanned, timed = [], [], []
    monkeypatch.setattr(kernel_choice, "wrong_heads", lambda w, path, *sizes: checked.append(sizes[:2]))
    monkeypatch.setattr(kernel_choice, "wrong_tokens", lambda tokens, counts, dtype: scanned.append(counts))
    monkeypatch.setattr(
        kernel_choice, "lm_head_argmax", lambda x, *a, kernel=True, scale: timed.append((len(x), kernel))
    )

    def run(m, weights, scales, path, counters):
        timed.append((len(weights.bias), len(m[0]), path.name))

    five = HeadWeights(*(t[:1].expand(5, *t.shape[1:]) for t in weights))
    monkeypatch.setattr(kernel_choice, "parallel_heads", run)
    choice = choose(five, shapes, tokens)
    own = sorted({count for count in shapes.heads.values() if count})
    assert checked == ([(own, batches)] if batches else [])
    assert scanned == [sorted({1, *rows.values()})]
    assert set(choice.heads) == of_heads
    assert choice.argmax == set(rows)
    expected = [
        (shapes.heads[count], min(tile, shapes.max_batch), path)
        for count, tile in sorted(of_heads)
        if shapes.heads[count]
        for path in ("FUSED", "BATCHED")
    ]
    assert timed == expected + [(count, kernel) for count in rows.values() for kernel in (True, False)]
    assert max(rows) <= MAX_ROWS


def test_the_lengths_of_a_schedule_are_all_there_are():
    fixed = SimpleNamespace(num_speculative_tokens=7, num_speculative_tokens_per_batch_size=None)
    assert draft_lengths(fixed) == {7}
    rows = [(1, 4, 7), (5, 16, 3), (17, 64, 0)]
    schedule = SimpleNamespace(num_speculative_tokens=7, num_speculative_tokens_per_batch_size=rows)
    assert draft_lengths(schedule) == {7, 3, 0}


def slow_above(limit):
    """The kernel takes 97 % of the library's time up to a number of rows or requests, and 97.1 % above."""

    def timer(kernel, library):
        first = kernel.args[0]
        rows = len(first if isinstance(first, torch.Tensor) else first[0])
        return (97.0 if rows <= limit else 97.1), 100.0

    return timer


def test_a_kernel_is_kept_only_where_it_gains(monkeypatch, no_group, weights, tokens):
    """3 % at least, shape by shape; the line at start says what was left to the library."""
    pretend(monkeypatch)
    shapes = Shapes({1: 1, 2: 2}, 64)
    choice = choose(weights, shapes, tokens, timer=slow_above(16))
    assert choice.heads == {(1, 16): HeadsPath.FUSED, (2, 16): HeadsPath.FUSED}
    assert choice.argmax == {16}
    assert choice.describe() == (
        "heads by one Triton launch (it fits; checked; the kernel takes 0.97 of the library's time) and by batched "
        "matrix products (1 at batch 17 to 32, 2 at batch 17 to 32), argmax by Triton kernel (checked; the kernel "
        "takes 0.97 of the library's time) and by logits (17 to 32, 33 to 64 rows)"
    )
    assert choose(weights, shapes, tokens, timer=slow_above(64)).argmax == {16, 32, 64}
    none = choose(weights, shapes, tokens, timer=slow_above(0))
    assert (none.heads, none.argmax) == ({}, frozenset())
    assert none.describe().startswith("heads by batched matrix products (it fits; checked; the kernel takes 0.97 of")
    assert "argmax by logits (checked; the kernel takes 0.97 of the library's time)" in none.describe()


def test_a_time_that_is_none_keeps_no_kernel(monkeypatch, no_group, weights, tokens):
    pretend(monkeypatch)
    choice = choose(weights, tokens=tokens, timer=lambda kernel, library: (float("nan"), 100.0))
    assert (choice.heads, choice.argmax) == ({}, frozenset())


def test_forced_kernels_are_not_timed(monkeypatch, no_group, weights, tokens):
    pretend(monkeypatch)
    monkeypatch.setenv(KERNELS.name, "1")
    choice = choose(weights, tokens=tokens, timer=lambda *a: pytest.fail("timed"))
    assert set(choice.heads) == {(1, 16), (2, 16)}
    assert choice.argmax == {16}


def test_ranks_take_what_all_of_them_have(monkeypatch, weights, tokens):
    """Another rank has one launch per stage, nothing for two heads, and no argmax kernel for 17 to 32 rows."""
    pretend(monkeypatch)
    asked: list[list[int]] = []
    monkeypatch.setattr(kernel_choice, "lowest_of_all_ranks", lambda values: asked.append(values) or [1, 0, 1, 0])
    choice = choose(weights, Shapes({1: 1, 2: 2}, 16), tokens)
    assert asked == [[3, 3, 1, 1]]
    assert choice.heads == {(1, 16): HeadsPath.STAGES}
    assert choice.argmax == {16}
    assert choice.heads_reason.endswith("; left out on another rank")
    assert choice.argmax_reason.endswith("; left out on another rank")


def test_nothing_is_launched_where_the_kernels_are_off(monkeypatch, no_group, weights, tokens):
    asked = kernel_choice.refusal
    pretend(monkeypatch, FUSED=fails, STAGES=fails)
    monkeypatch.setattr(kernel_choice, "refusal", asked)
    for value, reason in (("0", "VLLM_GUMIHO_KERNELS=0"), ("auto", "no GPU")):
        monkeypatch.setenv(KERNELS.name, value)
        choice = choose(weights, tokens=tokens, timer=lambda *a: pytest.fail("timed"))
        assert (choice.heads, choice.argmax) == ({}, frozenset())
        assert reason in choice.heads_reason
        assert reason in choice.argmax_reason


def test_products_of_8_bit_rows_are_checked_at_every_tile(monkeypatch, no_group):
    """Heads' rows and prompts are more than requests: whatever `--max-num-seqs` is, each tile can be launched."""
    monkeypatch.setenv(KERNELS.name, "1")
    checked = []
    monkeypatch.setattr(kernel_choice, "wrong_products", lambda matrices, batches, dtype: checked.extend(batches))
    assert kernel_choice.products_by_kernel([quantise_rows(torch.randn(4, 16), torch.int8)], torch.float32)
    served, tried = ({choose_linear_tiling(b, 4, 16, 2).block_b for b in rows} for rows in (range(1, 65), checked))
    assert tried == served

"""The Triton kernels of the heads against their references, under Triton's interpreter: see `interpreted`."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from interpreted import INTERPRETED, run_interpreted
from torch import Tensor

from vllm_gumiho.kernels import parallel_heads as heads
from vllm_gumiho.kernels.parallel_heads.dispatch import _INTERPRETED
from vllm_gumiho.kernels.parallel_heads.tiling import Tiling, choose_tiling

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def head_weights(n: int, hidden: int, steps: int, dtype: torch.dtype) -> heads.HeadWeights:
    """Random weights that keep the size of a vector, so that no stage drowns the others."""
    return heads.HeadWeights(
        (torch.randn(n, hidden, steps * hidden) / (steps * hidden) ** 0.5).to(dtype),
        (torch.randn(n, hidden) * 0.3).to(dtype),
        (torch.randn(n, 5, hidden, hidden) / hidden**0.5).to(dtype),
        (torch.randn(n, 5, hidden) * 0.3).to(dtype),
    )


def assert_heads(z: Tensor, m: Tensor, weights: heads.HeadWeights) -> None:
    """Equal to the float32 reference but for one rounding of z a stage, each carried on with a gain near one.

    float32: the sums' order instead, eight roundings being ample for K up to 3072.
    """
    exact = heads.parallel_heads_reference(m.float(), heads.HeadWeights(*(t.float() for t in weights)))
    assert z.shape == exact.shape
    assert z.dtype == m.dtype
    tolerance = heads.HEAD_STAGES * heads.SPACING[m.dtype] * exact.abs().max().item()
    torch.testing.assert_close(z.float(), exact, atol=tolerance, rtol=0)


class TestInNewProcess:
    __test__ = not INTERPRETED

    def test_under_interpreter(self, pytestconfig):
        run_interpreted(__file__, pytestconfig)


class TestParallelHeads:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        ("n", "hidden", "batch", "steps"), [(3, 80, 1, 2), (1, 80, 17, 1), (5, 80, 3, 2), (2, 48, 31, 3)]
    )
    def test_equals_reference(self, poisoned, dtype, n, hidden, batch, steps):
        weights, m = head_weights(n, hidden, steps, dtype), torch.randn(batch, steps * hidden).to(dtype)
        before = heads.launches[heads.HeadsPath.STAGES]
        assert_heads(heads.parallel_heads(m, weights), m, weights)
        assert heads.launches[heads.HeadsPath.STAGES] == before + 1

    @pytest.mark.parametrize(("n", "hidden", "batch", "dtype"), [
        (1, 576, 3, torch.bfloat16), (1, 576, 17, torch.float16), (1, 1536, 1, torch.bfloat16),
        pytest.param(1, 576, 1, torch.float32, marks=pytest.mark.long),
    ])  # fmt: skip
    def test_sizes_of_real_models(self, poisoned, n, hidden, batch, dtype):
        weights, m = head_weights(n, hidden, 2, dtype), torch.randn(batch, 2 * hidden).to(dtype)
        assert_heads(heads.parallel_heads(m, weights), m, weights)

    @pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8], ids=str)
    def test_8_bit_weights_at_the_size_of_a_real_model(self, poisoned, kind):
        weights, scales = heads.quantize_heads(head_weights(1, 576, 2, torch.bfloat16), kind)
        m = torch.randn(3, 1152).bfloat16()
        z = heads.parallel_heads(m, weights, scales)
        assert_heads(z, m, heads.dequantize_heads(weights, scales, torch.float32))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_one_launch_equals_launch_per_stage(self, poisoned, dtype):
        """The form with barriers, by the one program that the interpreter can run so, twice with the same counters."""
        weights, m = head_weights(2, 80, 2, dtype), torch.randn(3, 160).to(dtype)
        counters = heads.new_counters(m.device)
        before = heads.launches[heads.HeadsPath.FUSED]
        stages = heads.parallel_heads(m, weights, path=heads.HeadsPath.STAGES)
        for _ in range(2):
            fused = heads.parallel_heads(m, weights, path=heads.HeadsPath.FUSED, counters=counters)
            assert torch.equal(fused, stages)
            assert not counters[[0, heads.GAVE_UP]].any()
        assert heads.launches[heads.HeadsPath.FUSED] == before + 2

    @pytest.mark.parametrize("steps", [1, 2, 3])
    def test_inputs_are_read_where_they_lie(self, poisoned, monkeypatch, steps):
        """Column blocks with strides of their own give the very same z; one or two of them are never concatenated."""
        weights, wide = head_weights(2, 48, steps, torch.bfloat16), torch.randn(5, 200).bfloat16()
        blocks = [wide[:3, :48], torch.randn(3, 3, 48).bfloat16()[:, 1], torch.randn(3, 48).bfloat16()][:steps]
        whole = torch.cat(blocks, dim=-1)
        z = heads.parallel_heads(whole, weights)
        assert_heads(z, whole, weights)
        assert z.transpose(0, 1).is_contiguous()
        if steps < 3:
            monkeypatch.setattr(torch, "cat", lambda *a, **k: pytest.fail("a copy"))
            monkeypatch.setattr(Tensor, "contiguous", lambda *a, **k: pytest.fail("a copy"))
        assert torch.equal(heads.parallel_heads(blocks, weights), z)
        padded = torch.randn(3, steps * 48 + 7).bfloat16()
        padded[:, : steps * 48] = whole
        assert torch.equal(heads.parallel_heads(padded[:, : steps * 48], weights), z)

    @staticmethod
    def launch_two_programs(counters: Tensor, polls: int) -> None:
        """The interpreter runs them one after the other: the first waits for the second in vain and must end."""
        from vllm_gumiho.kernels.parallel_heads.triton import parallel_heads_kernel

        weights, m = head_weights(1, 32, 1, torch.float32), torch.randn(1, 32)
        z = torch.empty(2, 1, 1, 32)
        parallel_heads_kernel[(2,)](
            m, m, weights.first_weight, weights.first_bias, weights.weight, weights.bias, z, z, z, counters, z, z,
            32, 32, 1, 1, heads.HEAD_STAGES, True, True, False, False, False, 1, 32, 1, 16, 16, 32, 1, polls, 0, False,
        )  # fmt: skip

    @pytest.mark.parametrize(("set_before", "tries"), [(False, 50), (True, 0)])
    def test_a_barrier_in_vain_gives_up_once(self, monkeypatch, set_before, tries):
        """The flag stays set, and neither the later barriers of the launch nor the next launch are waited for."""
        from triton.runtime.interpreter import InterpreterBuilder

        atomics, add = [], InterpreterBuilder.create_atomic_rmw
        monkeypatch.setattr(InterpreterBuilder, "create_atomic_rmw", lambda *a, **k: atomics.append(1) or add(*a, **k))
        counters = heads.new_counters(torch.device("cpu"))
        counters[heads.GAVE_UP] = int(set_before)
        self.launch_two_programs(counters, polls=tries or 50)
        assert counters[heads.GAVE_UP] == 1
        # Beside the polls: each program adds, polls once and sets the flag at each barrier, and the first zeroes five.
        assert tries <= len(atomics) < tries + 2 * 5 * 3 + 5

    def test_a_wait_is_short(self):
        """Some tens of milliseconds, not a second, at a microsecond a poll."""
        from vllm_gumiho.kernels.parallel_heads.triton import MAX_POLLS

        assert MAX_POLLS == 1 << 15

    @pytest.mark.parametrize("left", [7, 8, 1 << 20])
    def test_counters_that_are_not_zero_heal(self, left):
        """Whatever a launch that was ended, or memory that was lost, has left in the barriers' counters."""
        weights, m = head_weights(1, 16, 2, torch.float32), torch.randn(3, 32)
        stages = heads.parallel_heads(m, weights, path=heads.HeadsPath.STAGES)
        counters = heads.new_counters(m.device)
        counters[: heads.GAVE_UP] = torch.arange(heads.GAVE_UP) + left
        for _ in range(2):
            fused = heads.parallel_heads(m, weights, path=heads.HeadsPath.FUSED, counters=counters)
            assert counters[[0, heads.GAVE_UP]].tolist() == [0, 0]
            assert counters.tolist() == [0, 1, 1, 1, 1, 0], "one program has arrived at each barrier"
        assert torch.equal(fused, stages)

    def test_barrier_under_interpreter_is_refused(self):
        from vllm_gumiho.kernels.parallel_heads.triton import parallel_heads_triton

        weights, m = head_weights(1, 16, 1, torch.float32), torch.randn(1, 16)
        tiling = choose_tiling(1, 1, 16, 4, 4, _INTERPRETED)
        assert tiling.programs > 1
        with pytest.raises(ValueError, match="only one"):
            parallel_heads_triton(m[:, :0], m, weights, None, tiling, heads.new_counters(m.device))

    @pytest.mark.parametrize("native", [True, False], ids=["converted", "decoded"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_fp8_weights(self, poisoned, dtype, native):
        from vllm_gumiho.kernels.parallel_heads.triton import parallel_heads_triton

        exact, m = head_weights(2, 80, 2, dtype), torch.randn(3, 160).to(dtype)
        weights, scales = heads.quantize_heads(exact)
        tiling = replace(choose_tiling(3, 2, 80, 1, 2, _INTERPRETED), native_fp8=native)
        z = parallel_heads_triton(m[:, :80], m[:, 80:], weights, scales, tiling, None)
        assert_heads(z, m, heads.dequantize_heads(weights, scales, torch.float32))

    def test_every_fp8_value_is_decoded(self, poisoned):
        """Weights that hold all 254 finite values of e4m3, subnormals too, against torch's own conversion."""
        from vllm_gumiho.kernels.parallel_heads.triton import parallel_heads_triton

        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
        values = torch.where(values.float().isnan(), 0, values.float()).view(16, 16)
        weights = heads.HeadWeights(
            values[None].to(torch.float8_e4m3fn), torch.zeros(1, 16), torch.zeros(1, 5, 16, 16).to(torch.float8_e4m3fn),
            torch.zeros(1, 5, 16),
        )  # fmt: skip
        scales = heads.HeadScales(torch.ones(1, 16), torch.ones(1, 5, 16))
        tiling = replace(choose_tiling(16, 1, 16, 1, 4, _INTERPRETED), native_fp8=False)
        z = parallel_heads_triton(torch.empty(16, 0), torch.eye(16), weights, scales, tiling, None)
        torch.testing.assert_close(z[0], torch.nn.functional.silu(values.T), rtol=1e-5, atol=0)

    def test_batch_above_the_tile(self):
        """Full-precision weights go to the library's products, 8-bit ones through the kernel in parts."""
        weights, m = head_weights(1, 16, 2, torch.float16), torch.randn(67, 32).half()
        assert heads.choose_path(m[:32], weights)[0] is heads.HeadsPath.STAGES
        assert heads.choose_path(m[:33], weights)[0] is heads.HeadsPath.BATCHED
        assert heads.choose_path(m, weights)[0] is heads.HeadsPath.BATCHED
        assert_heads(heads.parallel_heads(m, weights), m, weights)
        small, scales = heads.quantize_heads(weights)
        assert heads.choose_path(m, small, scales)[0] is heads.HeadsPath.STAGES
        assert_heads(heads.parallel_heads(m, small, scales), m, heads.dequantize_heads(small, scales, torch.float32))

    @staticmethod
    def spread(n, hidden, programs, m, weights, scales=None, tile=16, spread=True) -> Tensor:
        """z of a launch per stage whose last round's tiles are dealt out by K blocks of 32 columns."""
        from vllm_gumiho.kernels.parallel_heads.triton import parallel_heads_triton

        tiling = Tiling(tile, 16, 32, 2, 4, programs, spread=spread)
        last = m.shape[1] - hidden
        return parallel_heads_triton(m[:, :last], m[:, last:], weights, scales, tiling, None)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        # Tiles of 16 rows: 10, 9, 5 and 3; a run within a tile, over two, of whole tiles, and programs without any.
        ("n", "hidden", "steps", "programs"), [(2, 80, 2, 4), (1, 144, 1, 7), (1, 80, 2, 8), (1, 48, 3, 40)]
    )  # fmt: skip
    def test_the_last_round_is_spread(self, poisoned, dtype, n, hidden, steps, programs):
        weights, m = head_weights(n, hidden, steps, dtype), torch.randn(3, steps * hidden).to(dtype)
        assert_heads(self.spread(n, hidden, programs, m, weights), m, weights)

    @pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8], ids=str)
    def test_8_bit_tiles_are_spread(self, poisoned, kind):
        weights, scales = heads.quantize_heads(head_weights(2, 80, 2, torch.bfloat16), kind)
        m = torch.randn(3, 160).bfloat16()
        z = self.spread(2, 80, 3, m, weights, scales, tile=64)
        assert_heads(z, m, heads.dequantize_heads(weights, scales, torch.float32))

    @pytest.mark.parametrize("order", ["backwards", "shuffled"])
    def test_whoever_comes_last_sums_the_parts_in_their_order(self, poisoned, monkeypatch, order):
        """z is the same, to the bit, in whatever order programs run."""
        from triton.runtime.interpreter import InterpreterBuilder

        weights, m = head_weights(1, 80, 2, torch.float32), torch.randn(3, 160)
        forward = self.spread(1, 80, 8, m, weights)
        places = list(range(8))[::-1] if order == "backwards" else torch.randperm(8).tolist()
        assert places != sorted(places)
        place, seen = InterpreterBuilder.set_grid_idx, []

        def other(self, x, y, z):
            seen.append(places[x])
            place(self, places[x], y, z)

        monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", other)
        assert torch.equal(self.spread(1, 80, 8, m, weights), forward)
        assert seen[:8] == places
        assert not torch.equal(forward, self.spread(1, 80, 8, m, weights, spread=False)), "sums of whole tiles"

    @settings(max_examples=8, deadline=None, database=None)
    @given(st.integers(1, 3), st.integers(1, 8), st.integers(1, 16), st.integers(1, 3), st.integers(1, 30))
    def test_any_number_of_programs(self, n, sixteenths, batch, steps, programs):
        hidden = 16 * sixteenths
        weights, m = head_weights(n, hidden, steps, torch.float32), torch.randn(batch, steps * hidden)
        assert_heads(self.spread(n, hidden, programs, m, weights), m, weights)

    def test_first_heads_only(self, poisoned):
        weights, m = head_weights(3, 32, 2, torch.float32), torch.randn(2, 64)
        assert_heads(heads.parallel_heads(m, weights.take(2)), m, weights.take(2))

    @settings(max_examples=8, deadline=None, database=None)
    @given(
        st.integers(1, 8), st.integers(1, 6), st.integers(1, 32), st.integers(1, 3), st.sampled_from(DTYPES),
        st.sampled_from([None, torch.float8_e4m3fn, torch.int8]),
    )  # fmt: skip
    def test_any_shape(self, n, sixteenths, batch, steps, dtype, eight_bit):
        hidden = 16 * sixteenths
        weights, m = head_weights(n, hidden, steps, dtype), torch.randn(batch, steps * hidden).to(dtype)
        if eight_bit is None:
            assert_heads(heads.parallel_heads(m, weights), m, weights)
            return
        small, scales = heads.quantize_heads(weights, eight_bit)
        assert_heads(heads.parallel_heads(m, small, scales), m, heads.dequantize_heads(small, scales, torch.float32))

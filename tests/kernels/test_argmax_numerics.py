"""The Triton kernel of the LM head's argmax against its reference, under Triton's interpreter: see `interpreted`."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from interpreted import INTERPRETED, run_interpreted
from torch import Tensor

from vllm_gumiho.kernels import lm_head_argmax as argmax

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_tokens(found: argmax.TopToken, rows: Tensor, weight: Tensor, size: int, offset: int = 0) -> None:
    """The reference's tokens wherever its two best logits are further apart than the sums' rounding."""
    logits = rows.float() @ weight[:size].float().T
    # |error| of a float32 sum of H products is far below H * 2^-24 of the sum of their magnitudes.
    error = (rows.float().abs() @ weight[:size].float().abs().T).amax(-1) * rows.shape[1] * 2.0**-24
    best = logits.topk(min(2, size), dim=-1)
    clear = best.values[:, 0] - best.values[:, -1] > 2 * error if size > 1 else torch.ones(len(rows), dtype=torch.bool)
    assert clear.any()
    assert found.ids.dtype == torch.int64
    assert found.logits.dtype == torch.float32
    assert torch.equal(found.ids[clear], best.indices[:, 0][clear] + offset)
    assert ((found.logits - best.values[:, 0]).abs() <= error).all()
    assert ((found.ids >= offset) & (found.ids < offset + size)).all()


class TestInNewProcess:
    __test__ = not INTERPRETED

    def test_under_interpreter(self, pytestconfig):
        run_interpreted(__file__, pytestconfig)


class TestLmHeadArgmax:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("rows", "vocab", "hidden"), [(1, 1, 80), (17, 1003, 80), (5, 65, 576), (61, 333, 48)])
    def test_equals_reference(self, poisoned, dtype, rows, vocab, hidden):
        x, weight = torch.randn(rows, hidden).to(dtype), torch.randn(vocab, hidden).to(dtype)
        before = argmax.launches["triton"]
        assert_tokens(argmax.lm_head_argmax(x, weight), x, weight, vocab)
        assert argmax.launches["triton"] == before + 1

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_many_rows_take_logits_of_the_library(self, dtype):
        """Above 64 rows the kernel would read its rows through the L2 as often as the weights."""
        x, weight = torch.randn(65, 48).to(dtype), torch.randn(333, 48).to(dtype)
        before = argmax.launches.copy()
        at_most, above = argmax.lm_head_argmax(x[:64], weight, 300), argmax.lm_head_argmax(x, weight, 300, 7)
        found = argmax.launches - before
        assert dict(found) == {"triton": 1, "logits": 1}
        logits = x @ weight[:300].T
        assert torch.equal(above.ids, logits.argmax(-1) + 7)
        assert torch.equal(above.logits, logits.amax(-1).float())
        assert_tokens(at_most, x[:64], weight, 300)
        asked = argmax.lm_head_argmax(x[:5], weight, 300, kernel=False)
        assert torch.equal(asked.ids, logits[:5].argmax(-1))
        assert argmax.launches["logits"] == before["logits"] + 2

    def test_many_tiles(self, poisoned):
        """More tiles than the reduction takes in one step: the best in the last, then a tie of a first and a last."""
        from vllm_gumiho.kernels.lm_head_argmax.triton import reduce_argmax_kernel

        top, index = torch.rand(2, 2500), torch.arange(2500, dtype=torch.int32).repeat(2, 1) * 64
        top[0, 2499] = top[1, 5] = top[1, 2400] = 2
        ids, logits = torch.empty(2, dtype=torch.int64), torch.empty(2)
        reduce_argmax_kernel[(2,)](top, index, ids, logits, 2500, 7, 1024)
        assert ids.tolist() == [2499 * 64 + 7, 5 * 64 + 7]
        assert logits.tolist() == [2, 2]

    @pytest.mark.parametrize("equal", [(3, 5), (15, 16), (0, 199), (64, 128), (7, 100, 190)])
    def test_ties_go_to_the_lowest_id(self, poisoned, equal):
        weight = torch.zeros(200, 16)
        weight[list(equal)] = 1
        x = torch.ones(3, 16)
        found = argmax.lm_head_argmax(x, weight)
        assert torch.equal(found.ids, (x @ weight.T).argmax(-1))
        assert found.ids.tolist() == [equal[0]] * 3
        assert argmax.lm_head_argmax(x, torch.zeros(200, 16)).ids.tolist() == [0, 0, 0]

    def test_padding_never_wins(self, poisoned):
        weight = torch.full((96, 16), -1.0)
        weight[70:] = 9
        assert argmax.lm_head_argmax(torch.ones(2, 16), weight, vocab_size=70).ids.tolist() == [0, 0]
        weight[:70] = -torch.inf
        found = argmax.lm_head_argmax(torch.ones(2, 16), weight, vocab_size=70)
        assert found.ids.tolist() == [0, 0]
        assert found.logits.tolist() == [-torch.inf] * 2

    def test_nan_counts_as_infinity(self, poisoned):
        weight = torch.ones(100, 16)
        weight[42, 3] = float("nan")
        for function in (argmax.lm_head_argmax, argmax.lm_head_argmax_reference, argmax.lm_head_argmax_logits):
            found = function(torch.ones(2, 16), weight)
            assert found.ids.tolist() == [42, 42]
            assert found.logits.tolist() == [torch.inf] * 2

    @pytest.mark.parametrize("shards", [2, 3])
    def test_shards(self, poisoned, shards):
        """Padded shards of a vocabulary, ties across them, against the whole."""
        x, weight = torch.randn(6, 32), torch.randn(101, 32)
        weight[90] = weight[3]
        x[0] = 4 * weight[3]
        size = -(-101 // shards)
        found = []
        for start in range(0, 101, size):
            part = weight[start : start + size]
            padded = torch.full((size + 11, 32), 1e4)
            padded[: len(part)] = part
            found.append(argmax.lm_head_argmax(x, padded, vocab_size=len(part), index_offset=start))
        best = argmax.reduce_shards(torch.stack([f.ids for f in found]), torch.stack([f.logits for f in found]))
        assert_tokens(best, x, weight, 101)
        assert best.ids[0] == 3

    def test_strided_rows(self, poisoned):
        x, weight = torch.randn(4, 3, 32)[:, 1], torch.randn(70, 48)[:, :32]
        assert_tokens(argmax.lm_head_argmax(x, weight), x, weight, 70)

    @settings(max_examples=10, deadline=None, database=None)
    @given(
        st.integers(1, 64), st.integers(1, 300), st.integers(1, 90), st.integers(0, 40), st.sampled_from(DTYPES),
    )  # fmt: skip
    def test_any_shape(self, rows, vocab, hidden, padding, dtype):
        x, weight = torch.randn(rows, hidden).to(dtype), torch.randn(vocab + padding, hidden).to(dtype)
        assert_tokens(argmax.lm_head_argmax(x, weight, vocab, 1000), x, weight, vocab, 1000)

"""The argmax over a target's LM head: which heads it reads, padding, row tiles, and a head split over two processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from places import PROCESSES

from vllm_gumiho.drafters import kernel_check
from vllm_gumiho.drafters import lm_head as lm_head_module
from vllm_gumiho.drafters.lm_head import EightBitHead, GreedyArgmax, LmHeadShard, argmax_problem, plain_head_problem
from vllm_gumiho.kernels.eight_bit import EIGHT_BIT, MAX_ROWS, dequantise_rows


def test_lm_heads_that_need_logits(lm_head):
    def refused(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> str | None:
        return plain_head_problem(lm_head) or argmax_problem(LmHeadShard.of(lm_head, 100), scale, dtype)

    assert refused() is None
    assert refused(scale=0.0625) is None
    assert "logit_scale is -2.0" in refused(scale=-2.0)
    assert "logit_scale is 0.0" in refused(scale=0.0)
    assert "logit_scale is nan" in refused(scale=float("nan"))
    assert "torch.float32" in refused(dtype=torch.bfloat16)
    lm_head.bias = torch.nn.Parameter(torch.zeros(128))
    assert "bias" in refused()
    lm_head.bias, lm_head.quant_method = None, object()
    assert "quantised" in refused()


def test_padding_of_an_lm_head_never_wins(lm_head):
    """100 tokens, padded to 128 rows; and a drafter that knows the first 90 only."""
    lm_head.weight.data[100:] = 1e4
    lm_head.quant_method.process_weights_after_loading(lm_head)
    rows = torch.randn(9, 16).abs()
    for size in (100, 90):
        tokens = GreedyArgmax(LmHeadShard.of(lm_head, size))
        assert tokens.shard.size == size
        assert torch.equal(tokens(rows), (rows @ lm_head.weight[:size].T).argmax(-1))
        assert kernel_check.wrong_tokens(tokens, [1, 9], torch.float32) is None


def test_a_wrong_argmax_is_found(monkeypatch, lm_head):
    lm_head.quant_method.process_weights_after_loading(lm_head)
    tokens, right = GreedyArgmax(LmHeadShard.of(lm_head, 100)), kernel_check.lm_head_argmax

    def second_best(rows, weight, size, scale):
        top = (rows @ weight[:size].T).topk(2)
        return right(rows, weight, size)._replace(ids=top.indices[:, 1])

    monkeypatch.setattr(kernel_check, "lm_head_argmax", second_best)
    assert "off by" in kernel_check.wrong_tokens(tokens, [5], torch.float32)
    monkeypatch.setattr(
        kernel_check, "lm_head_argmax", lambda *a, scale: right(*a)._replace(ids=torch.tensor([100] * 5))
    )
    assert "outside of the 100 tokens" in kernel_check.wrong_tokens(tokens, [5], torch.float32)


def test_rows_of_other_tiles_take_the_library(lm_head):
    """What was not chosen at load is never launched: for some rows the kernel, for the rest the rank's own logits."""
    lm_head.quant_method.process_weights_after_loading(lm_head)
    asked = []
    tokens = GreedyArgmax(LmHeadShard.of(lm_head, 100), {32})
    with pytest.MonkeyPatch.context() as patch:
        right = lm_head_module.lm_head_argmax
        patch.setattr(
            lm_head_module, "lm_head_argmax", lambda *a, kernel, scale: asked.append((len(a[0]), kernel)) or right(*a)
        )
        for count in (1, 16, 17, 32, 33, 320):
            rows = torch.randn(count, 16)
            assert torch.equal(tokens(rows), (rows @ lm_head.weight[:100].T).argmax(-1))
    assert asked == [(1, False), (16, False), (17, True), (32, True), (33, False), (320, False)]


@pytest.mark.parametrize("kind", EIGHT_BIT.values(), ids=EIGHT_BIT)
def test_many_rows_read_the_targets_own_head_in_place_of_a_copy(lm_head, kind):
    """Two launches over 8-bit rows read what the head itself has, which rounds nothing."""
    lm_head.quant_method.process_weights_after_loading(lm_head)
    copy = EightBitHead(lm_head, kind)
    shard = copy.shard(90)
    tokens = GreedyArgmax(shard, {16})
    rounded = dequantise_rows(copy.matrix.rows)
    assert (rounded - lm_head.weight).abs().max() > 1e-3
    for count in (1, MAX_ROWS, MAX_ROWS + 1, 320):
        x = torch.randn(count, 16)
        logits = x @ (rounded if count <= MAX_ROWS else lm_head.weight).T
        for found in (shard.logits(x), copy.quant_method.apply(copy, x)):
            torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(tokens(x), logits[:, :90].argmax(-1))


def test_a_copy_that_vllms_product_on_a_cpu_has_is_read_for_any_rows(lm_head):
    lm_head.quant_method.process_weights_after_loading(lm_head)
    copy = EightBitHead(lm_head, torch.int8)
    copy.matrix.pack(torch.float32)
    x = torch.randn(70, 16)
    assert torch.equal(copy.logits(x), copy.matrix(x))
    assert not torch.equal(copy.logits(x), x @ lm_head.weight.T)


def test_lm_head_split_over_two_processes(tmp_path):
    """Real shards, gathered by vLLM's own collective: ties to the lowest id, padding and an empty shard never win."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    main = PROCESSES / "shards_main.py"
    outs = [tmp_path / f"{rank}.json" for rank in range(2)]
    logs = [out.with_suffix(".log").open("w+") for out in outs]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(main), str(rank), port, str(out)],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for rank, (out, log) in enumerate(zip(outs, logs, strict=True))
    ]
    try:
        codes = [process.wait(timeout=500) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for log in logs:
        log.seek(0)
    assert codes == [0, 0], "".join(log.read()[-3000:] for log in logs)
    results = [json.loads(out.read_text()) for out in outs]
    assert [r["20"]["shard"] for r in results] == [[0, 20], [20, 0]]
    assert [r["100"]["shard"] for r in results] == [[0, 64], [64, 36]]
    assert [r["20"]["launched"] for r in results] == [1, 0]
    for result in results:
        assert result["lowest"] == [0, 1]
        for vocab in ("128", "100", "20"):
            one = result[vocab]
            assert one["problem"] is None
            assert one["found"] == one["whole"] == one["logits"]
            assert one["found"][0] == 3

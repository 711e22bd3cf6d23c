"""Which kernels draft: the switch, the reasons, the check at load time, and an LM head split over two processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from places import PROCESSES
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from vllm_gumiho.drafters import kernel_check
from vllm_gumiho.drafters.kernel_check import Switch, choose_kernels, kernel_switch, refusal
from vllm_gumiho.drafters.lm_head import GreedyArgmax, LmHeadShard, argmax_problem, plain_head_problem
from vllm_gumiho.env import KERNELS
from vllm_gumiho.errors import KernelChoiceError
from vllm_gumiho.kernels.parallel_heads import HeadsPath, HeadWeights, launches, new_counters, parallel_heads_reference

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def weights() -> HeadWeights:
    torch.manual_seed(0)
    return HeadWeights(
        torch.randn(2, 16, 32) / 32**0.5, torch.randn(2, 16), torch.randn(2, 5, 16, 16) / 4, torch.randn(2, 5, 16)
    )


@pytest.fixture
def lm_head() -> ParallelLMHead:
    with set_current_vllm_config(VllmConfig()):
        head = ParallelLMHead(100, 16, params_dtype=torch.float32, disable_tp=True)
    head.weight_loader(head.weight, torch.randn(100, 16))
    return head


@pytest.fixture
def no_group(monkeypatch):
    """One rank, without vLLM's process groups."""
    monkeypatch.setattr(kernel_check, "lowest_of_all_ranks", lambda values: values)


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

    def second_best(rows, weight, size):
        top = (rows @ weight[:size].T).topk(2)
        return right(rows, weight, size)._replace(ids=top.indices[:, 1])

    monkeypatch.setattr(kernel_check, "lm_head_argmax", second_best)
    assert "off by" in kernel_check.wrong_tokens(tokens, [5], torch.float32)
    monkeypatch.setattr(kernel_check, "lm_head_argmax", lambda *a: right(*a)._replace(ids=torch.tensor([100] * 5)))
    assert "outside of the 100 tokens" in kernel_check.wrong_tokens(tokens, [5], torch.float32)


def pretend(monkeypatch, **behaviour):
    """A device for one launch, where a path gives the reference or does what ``behaviour`` says by its name."""

    def run(m, weights, path, counters):
        launches[path] += 1
        z = parallel_heads_reference(torch.cat(m, dim=-1), weights)
        return behaviour.get(path.name, lambda z, counters: z)(z, counters)

    monkeypatch.setattr(kernel_check, "choose_path", lambda m, weights: (HeadsPath.FUSED, "it fits"))
    monkeypatch.setattr(kernel_check, "parallel_heads", run)


def wrong(z, counters):
    return z + (z.abs().max() if len(z[0]) == 8 else 0)  # at one batch size only


def nan(z, counters):
    return z * float("nan")


def stuck(z, counters):
    counters[6] = 1
    return z


def fails(z, counters):
    raise RuntimeError("no kernel image\nand more")


CHECKS = [
    ({}, HeadsPath.FUSED, ["it fits; checked"]),
    ({"FUSED": wrong}, HeadsPath.STAGES, ["one Triton launch failed its check: off by", "at batch 8; checked"]),
    ({"FUSED": stuck}, HeadsPath.STAGES, ["its barrier gave up or left its counters at batch 1; checked"]),
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
    monkeypatch.setattr(kernel_check, "refusal", lambda *a: None)
    monkeypatch.delenv(KERNELS.name, raising=False)
    counters, before = new_counters(CPU), launches.copy()
    choice = choose_kernels(weights, counters, None, "the LM head has a bias", True, 8, 3)
    assert choice.heads is path
    assert all(reason in choice.heads_reason for reason in reasons)
    assert not choice.argmax
    assert f"heads by {path.value} (" in choice.describe()
    assert "argmax by logits (the LM head has a bias)" in choice.describe()
    assert not counters.any()
    assert launches == before


def test_forced_kernels_that_fail_end_the_start(monkeypatch, no_group, weights, lm_head):
    monkeypatch.setenv(KERNELS.name, "1")
    pretend(monkeypatch, FUSED=fails, STAGES=wrong)
    with pytest.raises(KernelChoiceError, match=r"no kernel image.*off by.*unset it"):
        choose_kernels(weights, new_counters(CPU), None, "the LM head has a bias", True, 8, 3)
    pretend(monkeypatch)
    monkeypatch.setattr(kernel_check, "wrong_tokens", lambda *a: "off by 3")
    with pytest.raises(KernelChoiceError, match="off by 3; unset it"):
        choose_kernels(weights, new_counters(CPU), GreedyArgmax(LmHeadShard.of(lm_head, 100)), None, True, 8, 3)


def test_the_argmax_is_checked_for_all_heads_not_this_ranks_alone(monkeypatch, no_group, weights, lm_head):
    monkeypatch.setattr(kernel_check, "refusal", lambda *a: None)
    monkeypatch.setenv(KERNELS.name, "auto")
    pretend(monkeypatch)
    asked: list[list[int]] = []
    monkeypatch.setattr(kernel_check, "wrong_tokens", lambda tokens, rows, dtype: asked.append(rows))
    own = weights.take(1)
    assert choose_kernels(own, new_counters(CPU), GreedyArgmax(LmHeadShard.of(lm_head, 100)), None, True, 8, 5).argmax
    assert asked == [[1, 8, 40]]


def test_nothing_is_launched_where_the_kernels_are_off(monkeypatch, no_group, weights, lm_head):
    pretend(monkeypatch, FUSED=fails, STAGES=fails)
    for value, reason in (("0", "VLLM_GUMIHO_KERNELS=0"), ("auto", "no GPU")):
        monkeypatch.setenv(KERNELS.name, value)
        choice = choose_kernels(
            weights, new_counters(CPU), GreedyArgmax(LmHeadShard.of(lm_head, 100)), None, True, 8, 3
        )
        assert (choice.heads, choice.argmax) == (HeadsPath.BATCHED, False)
        assert reason in choice.heads_reason
        assert reason in choice.argmax_reason


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

"""The kernels on a real GPU: every path against the float32 reference, again and again, and from CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from vllm_gumiho.kernels.bench.cases import ArgmaxCase, HeadsCase, heads_triton
from vllm_gumiho.kernels.bench.draft_round import RoundCase
from vllm_gumiho.kernels.lm_head_argmax import lm_head_argmax
from vllm_gumiho.kernels.parallel_heads import GAVE_UP, HeadsPath, launches, new_counters, parallel_heads

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PATHS = [HeadsPath.STAGES] if torch.version.hip else [HeadsPath.FUSED, HeadsPath.STAGES]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("hidden", "batch", "heads"), [
    (80, 1, 1), (80, 17, 3), (576, 3, 5), (1536, 17, 3), (2048, 64, 5), (4096, 1, 5), (4096, 32, 1),
    (4096, 1, 2), (4096, 17, 3), (4096, 32, 4),
])  # fmt: skip
def test_heads(path, dtype, hidden, batch, heads):
    case = HeadsCase(hidden, batch, heads, dtype)
    inputs = case.inputs(0)
    for fp8 in (False, True):
        before = launches[path]
        error, tolerance = case.check("fp8" if fp8 else "", heads_triton(inputs, fp8, path), inputs)
        assert error <= tolerance
        assert launches[path] == before + 1


@pytest.mark.skipif(HeadsPath.FUSED not in PATHS, reason="one launch per stage on this device")
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_the_barrier_serves_a_thousand_launches(batch):
    """The same bits each time, no wait given up and the first counter zero, one by one and from a CUDA graph."""
    case = HeadsCase(1024, batch, 5)
    inputs, counters = case.inputs(1), new_counters(torch.device("cuda"))

    def run() -> torch.Tensor:
        return parallel_heads(inputs.m, inputs.weights, path=HeadsPath.FUSED, counters=counters)

    first = run().clone()
    stages = parallel_heads(inputs.m, inputs.weights, path=HeadsPath.STAGES)
    torch.testing.assert_close(first, stages, rtol=0, atol=case.check("", first, inputs)[1])
    for _ in range(500):
        assert torch.equal(run(), first)
    assert not counters[[0, GAVE_UP]].any()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [run() for _ in range(5)]
    for _ in range(100):
        for z in captured:
            z.zero_()
        graph.replay()
        assert all(torch.equal(z, first) for z in captured)
    assert not counters[[0, GAVE_UP]].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("hidden", "rows", "vocab"), [(80, 1, 1003), (576, 17, 49152), (4096, 5, 128256), (64, 320, 65)]
)
def test_argmax(dtype, hidden, rows, vocab):
    case = ArgmaxCase(hidden, rows, vocab, dtype)
    inputs = case.inputs(0)
    error, tolerance = case.check("", lm_head_argmax(*inputs), inputs)
    assert error <= tolerance


@pytest.mark.parametrize("batch", [1, 5])
def test_draft_round(batch):
    case = RoundCase(batch, 512, 1024, 8, 2, vocab=5003, context=33)
    inputs = case.inputs(0)
    for run in case.methods().values():
        error, tolerance = case.check("", run(inputs), inputs)
        assert error <= tolerance

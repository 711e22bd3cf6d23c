"""Engines with each ``draft_weights``: the target's own text, and the drafts of the quantised reference.

`engines.run` holds every draft to the reference with the same 8-bit weights; here is what else must hold.
"""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from engines import CORES, GREEDY, UNEQUAL_PROMPTS, case, run_engines
from layouts import LAYER

from vllm_gumiho.checkpoint.tensors import D2T, EMBEDDING, SCALE
from vllm_gumiho.drafters.checkpoints import save_speculators
from vllm_gumiho.kernels.eight_bit import quantise_rows

pytestmark = pytest.mark.engine
CALLS = [{"prompts": UNEQUAL_PROMPTS[:3], "sampling": GREEDY | {"max_tokens": 12}}]
DRAWN = [{"prompts": UNEQUAL_PROMPTS[:3], "sampling": GREEDY | {"max_tokens": 12, "temperature": 1.0, "seed": 3}}]
TENSORS = tiny.drafter_tensors()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """The same head in floats, in int8 as it is shared, and with a draft vocabulary."""
    folder = tmp_path_factory.mktemp("heads")
    floats = tiny.write_released(folder / "floats", TENSORS)
    save_speculators(folder / "int8", TENSORS, "target", LAYER, int8=True)
    vocabulary = torch.arange(0, tiny.VOCAB, 2)
    some = tiny.write_released(folder / "some", TENSORS | {D2T: vocabulary - torch.arange(len(vocabulary))})
    # Codes and scales of float8 e4m3 in the file.
    rows = {}
    for name, tensor in TENSORS.items():
        if tensor.ndim == 2 and name != EMBEDDING:
            rows[name], rows[name + SCALE] = quantise_rows(tensor, torch.float8_e4m3fn)
        else:
            rows[name] = tensor
    fp8 = tiny.write_released(folder / "fp8", rows, suffix="safetensors")
    return {"floats": str(floats), "int8": str(folder / "int8"), "some": str(some), "fp8": str(fp8)}


def drafting(checkpoint: str, weights: str, **more) -> dict:
    return {"method": "gumiho", "model": checkpoint, "draft_weights": weights, **more}


def megabytes(log: str, checkpoint: str, kind: str) -> float:
    """Of the draft's weights, by the line at start."""
    return float(re.search(rf"drafts with {re.escape(checkpoint)}.*weights in {kind} \(([\d.]+) MB\)", log)[1])


@pytest.fixture(scope="module")
def v1(tmp_path_factory, tiny_target, checkpoints):
    cases = {
        "off": case(tiny_target, None, CALLS),
        "fp8": case(tiny_target, drafting(checkpoints["floats"], "fp8"), CALLS),
        "int8": case(tiny_target, drafting(checkpoints["floats"], "int8"), CALLS),
        "auto of int8": case(tiny_target, drafting(checkpoints["int8"], "auto"), CALLS),
        "auto of fp8": case(tiny_target, {"method": "gumiho", "model": checkpoints["fp8"]}, CALLS),
        "bf16 of int8": case(tiny_target, drafting(checkpoints["int8"], "bf16"), CALLS),
        "some tokens": case(tiny_target, drafting(checkpoints["some"], "int8"), CALLS),
        "drawn": case(tiny_target, drafting(checkpoints["floats"], "fp8", draft_sample_method="probabilistic"), DRAWN),
    }
    return run_engines(tmp_path_factory.mktemp("v1"), "v1", cases)


@pytest.mark.feature("8-bit draft weights", "V1")
@pytest.mark.parametrize("name", ["fp8", "int8", "auto of int8", "auto of fp8", "bf16 of int8", "some tokens"])
def test_the_text_is_the_targets_own(v1, name):
    assert v1[name]["tokens"] == v1["off"]["tokens"]
    assert v1[name]["drafts"] > 0
    assert v1[name]["drafted"] == 7 * v1[name]["drafts"]


def test_drafts_are_drawn_from_the_8_bit_head(v1):
    """`engines.run` has compared the distributions with the reference's; there were some."""
    assert v1["drawn"]["drafts"] > 0


def test_the_line_at_start_says_memory_and_what_multiplies(v1, checkpoints):
    log = v1["int8"]["log"]
    wide = megabytes(log, checkpoints["int8"], "float32")
    # One byte for four, and scales and biases: rows here have 48 to 128 weights.
    assert 0.25 < megabytes(log, checkpoints["floats"], "int8") / wide < 0.32
    assert 0.25 < megabytes(log, checkpoints["floats"], "fp8") / wide < 0.32
    assert f"drafts with {checkpoints['floats']}: K=7, model runner V1, heads by vLLM's int8 products" in log
    assert re.search(rf"drafts with {checkpoints['floats']}.*LM head in int8 \([\d.]+ MB more\)", log)
    assert megabytes(log, checkpoints["fp8"], "fp8") == megabytes(log, checkpoints["floats"], "fp8")
    # Of an int8 checkpoint on a CPU, "auto" makes a copy too; of one in fp8 it has the target's own.
    assert re.search(rf"drafts with {checkpoints['int8']}.*weights in int8 \([\d.]+ MB\), LM head in int8", log)
    assert not re.search(rf"drafts with {checkpoints['fp8']}.*LM head in", log)


@pytest.mark.feature("8-bit draft weights", "V2")
def test_v2_with_the_kernels(tmp_path, tiny_target, checkpoints):
    """Under Triton's interpreter: 8-bit heads and argmax by the kernels, drafts exactly the reference's."""
    cases = {
        "off": case(tiny_target, None, CALLS),
        "int8": case(tiny_target, drafting(checkpoints["floats"], "int8"), CALLS),
    }
    found = run_engines(tmp_path, "v2", cases, {"VLLM_GUMIHO_KERNELS": "1"})
    assert found["int8"]["tokens"] == found["off"]["tokens"]
    assert found["int8"]["launches"] == {"heads": ["one Triton launch per stage"], "argmax": ["triton"]}
    assert "argmax by Triton kernel (checked), weights in int8" in found["int8"]["log"]


@pytest.mark.long
@pytest.mark.parametrize("kernels", ["0", "1"])
def test_v2_with_every_setting(tmp_path, tiny_target, checkpoints, kernels):
    cases = {"off": case(tiny_target, None, CALLS)}
    cases |= {kind: case(tiny_target, drafting(checkpoints["floats"], kind), CALLS) for kind in ("fp8", "int8")}
    cases["some tokens"] = case(tiny_target, drafting(checkpoints["some"], "fp8"), CALLS)
    cases["drawn"] = case(
        tiny_target, drafting(checkpoints["floats"], "int8", draft_sample_method="probabilistic"), DRAWN
    )
    found = run_engines(tmp_path, "v2", cases, {"VLLM_GUMIHO_KERNELS": kernels})
    for name in ("fp8", "int8", "some tokens"):
        assert found[name]["tokens"] == found["off"]["tokens"]
    assert found["drawn"]["drafts"] > 0


@pytest.mark.long
def test_two_ranks_share_8_bit_rows(tmp_path, tiny_target, checkpoints):
    cases = {"off": case(tiny_target, None, CALLS, tensor_parallel_size=2)}
    cases |= {
        kind: case(tiny_target, drafting(checkpoints["floats"], kind), CALLS, tensor_parallel_size=2)
        for kind in ("fp8", "int8")
    }
    found = run_engines(tmp_path, "v1", cases, CORES | {"VLLM_GUMIHO_SPLIT_HEADS": "1"})
    for kind in ("fp8", "int8"):
        assert found[kind]["tokens"] == found["off"]["tokens"]
        assert f"heads shared by 2 ranks, weights in {kind}" in found[kind]["log"]

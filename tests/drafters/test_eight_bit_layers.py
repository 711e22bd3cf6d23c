"""8-bit rows in vLLM's linear layers and in the heads: what multiplies where, packing, ranks; what may be asked for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from layouts import LAYER
from torch import nn
from vllm.model_executor import parameter
from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
from vllm.scalar_type import scalar_types

from vllm_gumiho.checkpoint.tensors import SCALE
from vllm_gumiho.drafters import eight_bit
from vllm_gumiho.drafters.checkpoints import open_checkpoint, save_speculators
from vllm_gumiho.drafters.draft_weights import DraftWeights, choose
from vllm_gumiho.drafters.eight_bit import EightBitMatrix, PackedScheme, RowsScheme, pack_int8, schemes
from vllm_gumiho.drafters.gumiho import heads as heads_module
from vllm_gumiho.drafters.gumiho.heads import ParallelHeads
from vllm_gumiho.drafters.gumiho.reference import int8_rows
from vllm_gumiho.env import DRAFT_WEIGHTS
from vllm_gumiho.errors import DraftWeightsError
from vllm_gumiho.kernels.eight_bit import EIGHT_BIT, dequantise_rows, quantise_rows
from vllm_gumiho.kernels.parallel_heads import HeadWeights, dequantize_heads, parallel_heads_reference, quantize_heads


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def one_rank(monkeypatch):
    """vLLM's parameters, without its process groups."""
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)


@pytest.fixture
def on_gpu(monkeypatch):
    """vLLM's platform says that it is no CPU."""
    monkeypatch.setattr(eight_bit, "current_platform", SimpleNamespace(is_cpu=lambda: False))


def test_vllms_kernels_come_first_on_a_gpu(on_gpu):
    (first, last) = schemes(torch.int8, torch.bfloat16)
    assert type(first) is PackedScheme
    assert type(last) is RowsScheme
    assert [type(one) for one in schemes(torch.int8, torch.float32)] == [RowsScheme], "they take no float32"


@pytest.mark.parametrize("kind", EIGHT_BIT)
def test_a_layer_that_no_kernel_of_vllms_takes_is_multiplied_by_ours(monkeypatch, one_rank, kind):
    """`choose_mp_linear_kernel` refuses here, as it does on ROCm; what a scheme has half made is dropped."""

    class Refusing(RowsScheme):
        def create_weights(self, layer, **sizes):
            super().create_weights(layer, **sizes)
            raise ValueError("no kernel")

    dtype = EIGHT_BIT[kind]
    first = PackedScheme(dtype) if kind == "int8" else Refusing(dtype)
    monkeypatch.setattr(eight_bit, "schemes", lambda *kinds: iter([first, RowsScheme(dtype)]))
    layer, method = nn.Module(), eight_bit.EightBitLinearMethod(dtype)
    method.create_weights(layer, 48, [32, 8], 48, 40, torch.bfloat16, weight_loader=lambda *_: None)
    assert type(layer.scheme) is RowsScheme
    rows, x, bias = quantise_rows(torch.randn(40, 48), dtype), torch.randn(2, 3, 48), torch.randn(40)
    layer.weight.data, layer.weight_scale.data = rows.weight, rows.scale[:, None]
    method.process_weights_after_loading(layer)
    wide = x @ dequantise_rows(rows).T + bias
    assert torch.allclose(method.apply(layer, x, bias), wide, atol=1e-5)


def test_packed_codes_are_what_vllms_kernels_read(monkeypatch, one_rank):
    codes = torch.randint(-127, 128, (8, 16), dtype=torch.int8)
    unpacked = unpack_quantized_values_into_int32(pack_int8(codes), scalar_types.uint8b128, 1)
    assert torch.equal(unpacked - 128, codes.int())
    given = {}

    class Kernel:
        def __init__(self, config, **names):
            given.update(config=config, **names)

        def process_weights_after_loading(self, layer):
            given.update({name: parameter.data.clone() for name, parameter in layer.named_parameters()})

    monkeypatch.setattr(eight_bit, "choose_mp_linear_kernel", lambda config: Kernel)
    layer, scheme = nn.Module(), PackedScheme(torch.int8)
    scheme.create_weights(
        layer, output_partition_sizes=[4, 4], input_size_per_partition=16, weight_loader=lambda *_: None,
        input_size=32, output_size=8, params_dtype=torch.bfloat16,
    )  # fmt: skip
    layer.weight.data.copy_(codes)
    layer.weight_scale.data.fill_(0.5)
    scheme.process_weights_after_loading(layer)
    assert torch.equal(given["weight_packed"], pack_int8(codes))
    assert given["weight_scale"].dtype == torch.bfloat16
    assert (given["w_q_param_name"], given["w_s_param_name"]) == ("weight_packed", "weight_scale")
    assert given["config"].partition_weight_shape == (16, 8)
    assert given["config"].full_weight_shape == (32, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_by_vllms_int8_product(dtype):
    """As the reference has it: inputs rounded to int8 by rows, whole sums."""
    rows, x = quantise_rows(torch.randn(96, 64), torch.int8), torch.randn(5, 64, dtype=dtype)
    matrix = EightBitMatrix(rows)
    matrix.pack(dtype)
    assert matrix.packed
    assert not list(matrix.buffers())
    exact = int8_rows(x.float()) @ dequantise_rows(rows).T
    assert (matrix(x).float() - exact).abs().max() <= (1e-4 if dtype == torch.float32 else 2**-7) * exact.abs().max()
    assert (exact - x.float() @ dequantise_rows(rows).T).abs().max() > 1e-2, "the rounding is seen"


def loaded(module: ParallelHeads, codes: HeadWeights, scales) -> ParallelHeads:
    """As a checkpoint's tensors come."""
    for head in range(len(codes.bias)):
        for stage in range(6):
            first = stage == 0
            weight = codes.first_weight[head] if first else codes.weight[head, stage - 1]
            bias = codes.first_bias[head] if first else codes.bias[head, stage - 1]
            scale = scales.first[head] if first else scales.rest[head, stage - 1]
            parts = {"weight": weight, "bias": bias, "weight_scale": scale[:, None]}
            for kind, tensor in parts.items():
                place = module.destination(head, stage, kind)
                if place is not None:
                    place.copy_(tensor)
    module.finish_loading()
    return module


def random_heads() -> HeadWeights:
    return HeadWeights(
        torch.randn(3, 16, 32) / 6, torch.randn(3, 16) / 3, torch.randn(3, 5, 16, 16) / 4, torch.randn(3, 5, 16) / 3
    )


@pytest.mark.parametrize("kind", EIGHT_BIT)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_rank_has_the_codes_and_scales_of_its_heads(monkeypatch, kind, ranks):
    codes, scales = quantize_heads(random_heads(), EIGHT_BIT[kind])
    monkeypatch.setenv("VLLM_GUMIHO_SPLIT_HEADS", "1")
    monkeypatch.setattr(heads_module, "lowest_of_all_ranks", lambda values: values)
    m = [torch.randn(4, 16), torch.randn(4, 16)]
    exact = parallel_heads_reference(torch.cat(m, dim=-1), dequantize_heads(codes, scales, torch.float32))
    seen = []
    for rank in range(ranks):
        group = SimpleNamespace(world_size=ranks, rank_in_group=rank)
        monkeypatch.setattr(heads_module, "get_tp_group", lambda group=group: group)
        module = loaded(ParallelHeads(3, 2, 16, torch.float32, weights=EIGHT_BIT[kind]), codes, scales)
        mine = list(range(3))[rank::ranks]
        seen += mine
        assert module.weight.dtype == EIGHT_BIT[kind]
        assert torch.allclose(module._own(m, 3), exact[mine], atol=1e-5)
    assert sorted(seen) == [0, 1, 2]


def test_heads_by_vllms_int8_products(monkeypatch):
    """Packed once loaded; their own weights are gone; any number of the first heads."""
    codes, scales = quantize_heads(random_heads(), torch.int8)
    monkeypatch.setattr(heads_module, "get_tp_group", lambda: SimpleNamespace(world_size=1, rank_in_group=0))
    monkeypatch.setattr(heads_module, "lowest_of_all_ranks", lambda values: values)
    module = loaded(ParallelHeads(3, 2, 16, torch.float32, weights=torch.int8), codes, scales)
    assert module.pack()
    assert {name for name, _ in module.named_parameters()} == {"first_bias", "bias"}
    m = [torch.randn(4, 16), torch.randn(4, 16)]
    wide = dequantize_heads(codes, scales, torch.float32)
    for count in (1, 2, 3):
        found = module(m, count)
        z = torch.cat(m, dim=-1).expand(count, 4, 32)
        z = torch.nn.functional.silu(int8_rows(z) @ wide.first_weight[:count].mT + wide.first_bias[:count, None])
        for j in range(5):
            z = z + torch.nn.functional.silu(int8_rows(z) @ wide.weight[:count, j].mT + wide.bias[:count, j, None])
        # An input between two steps may be rounded to either.
        assert torch.allclose(found, z, atol=2e-2)
        assert (found - z).abs().median() < 1e-5


def checkpoint(folder, **more):
    tensors = tiny.drafter_tensors()
    return open_checkpoint(save_speculators(folder, tensors, "target", LAYER, **more).path)


@pytest.mark.parametrize(("asked", "environment", "int8", "found"), [
    (None, None, False, DraftWeights()), ("auto", "fp8", False, DraftWeights()),
    (None, None, True, DraftWeights("int8", "int8")), ("bf16", None, True, DraftWeights()),
    ("fp8", None, True, DraftWeights("fp8", "fp8")), ("int8", "fp8", False, DraftWeights("int8", "int8")),
    (None, "fp8", False, DraftWeights("fp8", "fp8")),
])  # fmt: skip
def test_what_is_asked_for(monkeypatch, tmp_path, asked, environment, int8, found):
    """On a CPU an int8 checkpoint has an int8 copy of the LM head too."""
    monkeypatch.delenv(DRAFT_WEIGHTS.name, raising=False)
    if environment is not None:
        monkeypatch.setenv(DRAFT_WEIGHTS.name, environment)
    assert choose(asked, checkpoint(tmp_path, int8=int8)) == found


def test_elsewhere_auto_keeps_what_the_checkpoint_has(monkeypatch, tmp_path):
    monkeypatch.setattr("vllm_gumiho.drafters.draft_weights._on_cpu", lambda: False)
    assert choose(None, checkpoint(tmp_path, int8=True)) == DraftWeights("int8")


@pytest.mark.parametrize(("asked", "environment", "source"), [
    ("fp4", None, "draft_weights='fp4'"), (8, None, "draft_weights=8"), (None, "", "VLLM_GUMIHO_DRAFT_WEIGHTS=''"),
])  # fmt: skip
def test_other_values_are_refused(monkeypatch, tmp_path, asked, environment, source):
    if environment is not None:
        monkeypatch.setenv(DRAFT_WEIGHTS.name, environment)
    with pytest.raises(DraftWeightsError, match=f"{source} is not a choice; set it to auto"):
        choose(asked, checkpoint(tmp_path))


@pytest.mark.parametrize("kind", EIGHT_BIT)
@pytest.mark.parametrize("int8", [False, True])
def test_a_checkpoint_gives_rows(tmp_path, kind, int8):
    """Every matrix but the wide ``fc``, with its scale; int8 rows that are there already, bit for bit."""
    opened = checkpoint(tmp_path, int8=int8)
    wide, rows = dict(opened.tensors()), dict(opened.rows(EIGHT_BIT[kind]))
    matrices = {name for name, tensor in wide.items() if tensor.ndim == 2} - {"fc.weight"}
    assert set(rows) - set(wide) == {name + SCALE for name in matrices}
    for name, tensor in wide.items():
        if name not in matrices:
            assert torch.equal(rows[name], tensor)
            continue
        assert rows[name].dtype == EIGHT_BIT[kind]
        assert rows[name + SCALE].shape == (len(tensor), 1)
        found = rows[name].float() * rows[name + SCALE]
        if int8 and kind == "int8":
            assert torch.equal(found, tensor)
        assert (found - tensor).abs().max() <= tensor.abs().max() / (14 if kind == "fp8" else 250)

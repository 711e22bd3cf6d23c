"""Matrices of 8-bit rows in a draft model: linear layers as vLLM quantises them, and single matrices.

Whatever multiplies, a layer is loaded the same way: ``weight`` of codes and ``weight_scale`` ``[N, 1]`` float32, split
among tensor-parallel ranks by vLLM's own weight loaders.  What multiplies is vLLM's own where it has a kernel:

    NVIDIA   fp8, int8   activations stay wide (Marlin, Machete, Humming)
    CPU      int8        activations rounded to int8 a row (oneDNN)
    else                 `rows_linear`: our kernel, or weights that are widened at each call
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from torch import Tensor, nn
from vllm.model_executor.kernels.linear import (
    MPLinearKernel,
    MPLinearLayerConfig,
    choose_mp_linear_kernel,
    init_int8_linear_kernel,
)
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW8A8Int8,
    CompressedTensorsW8A16Fp8,
)
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    ModelWeightParameter,
    PackedvLLMParameter,
)
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_gumiho.kernels.device import capability, converts_fnuz
from vllm_gumiho.kernels.eight_bit import EightBitRows, as_fnuz, rows_linear, rows_linear_reference

_WIDE = (torch.bfloat16, torch.float16)


def for_device(rows: EightBitRows) -> EightBitRows:
    """The rows in the 8-bit format that their device converts."""
    on_gpu = rows.weight.device.type == "cuda" and rows.weight.dtype == torch.float8_e4m3fn
    return as_fnuz(rows) if on_gpu and converts_fnuz(capability(rows.weight.device.index or 0)) else rows


@torch.library.custom_op("vllm_gumiho::rows_linear", mutates_args=())
def _rows_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The kernel as one operator, for torch.compile."""
    return rows_linear(x, EightBitRows(weight, scale), bias)


@_rows_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


class RowsScheme:
    """Codes and scales as they were loaded, multiplied by `rows_linear`.

    kernel: our Triton kernel may run; false until it was checked.
    """

    name = "our kernel of 8-bit rows"

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.kernel = False

    def create_weights(
        self,
        layer: nn.Module,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        weight_loader: Callable,
        **_: Any,
    ) -> None:
        rows = sum(output_partition_sizes)
        codes = torch.zeros(rows, input_size_per_partition, dtype=self.dtype)
        layer.register_parameter(
            "weight", ModelWeightParameter(data=codes, input_dim=1, output_dim=0, weight_loader=weight_loader)
        )
        scale = torch.ones(rows, 1, dtype=torch.float32)
        layer.register_parameter(
            "weight_scale", ChannelQuantScaleParameter(data=scale, output_dim=0, weight_loader=weight_loader)
        )

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        rows = for_device(EightBitRows(layer.weight.data, layer.weight_scale.data[:, 0].contiguous()))
        layer.weight = nn.Parameter(rows.weight, requires_grad=False)
        layer.weight_scale = nn.Parameter(rows.scale, requires_grad=False)

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        rows = EightBitRows(layer.weight, layer.weight_scale)
        flat = x.reshape(-1, x.shape[-1])
        y = _rows_linear(flat, *rows, bias) if self.kernel else rows_linear_reference(flat, rows, bias)
        return y.view(*x.shape[:-1], y.shape[-1])


class PackedScheme(RowsScheme):
    """int8 codes by vLLM's kernels of mixed precision, which take four of them, made unsigned, in one int32."""

    name = "vLLM's mixed-precision kernel"
    chosen: MPLinearKernel

    def create_weights(
        self,
        layer: nn.Module,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        weight_loader: Callable,
        **more: Any,
    ) -> None:
        """Raises: ValueError, NotImplementedError where vLLM has no such kernel for this device and shape."""
        rows, self.dtype_wide = sum(output_partition_sizes), more["params_dtype"]
        config = MPLinearLayerConfig(
            full_weight_shape=(more["input_size"], more["output_size"]),
            partition_weight_shape=(input_size_per_partition, rows),
            weight_type=scalar_types.uint8b128,
            act_type=self.dtype_wide,
            group_size=-1,
            zero_points=False,
        )
        if input_size_per_partition % 4:
            raise NotImplementedError  # no whole number of int32
        kernel = choose_mp_linear_kernel(config)
        self.chosen = kernel(config, w_q_param_name="weight_packed", w_s_param_name="weight_scale")
        super().create_weights(layer, output_partition_sizes, input_size_per_partition, weight_loader)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        common = {"weight_loader": layer.weight.weight_loader}
        packed = PackedvLLMParameter(
            data=pack_int8(layer.weight.data), input_dim=1, output_dim=0, packed_dim=1, packed_factor=Fraction(4),
            **common,
        )  # fmt: skip
        scale = ChannelQuantScaleParameter(data=layer.weight_scale.data.to(self.dtype_wide), output_dim=0, **common)
        del layer.weight, layer.weight_scale
        layer.register_parameter("weight_packed", packed)
        layer.register_parameter("weight_scale", scale)
        self.chosen.process_weights_after_loading(layer)

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.chosen.apply_weights(layer, x, bias)


def pack_int8(codes: Tensor) -> Tensor:
    """``[N, K]`` int8 -> ``[N, K / 4]`` int32 of four codes, 128 more each, the first in the low byte."""
    return (codes.view(torch.uint8) ^ 128).contiguous().view(torch.int32)


def schemes(dtype: torch.dtype, wide: torch.dtype) -> Iterator[Any]:
    """What may multiply rows of ``dtype`` with ``wide`` activations on this platform, the best first; the last always.

    vLLM's own that have no kernel for a layer raise when its weights are made.
    """
    if current_platform.is_cpu():
        if dtype == torch.int8:
            yield CompressedTensorsW8A8Int8(QuantizationStrategy.CHANNEL, False, True)
    elif wide in _WIDE and dtype == torch.int8:
        yield PackedScheme(dtype)
    elif wide in _WIDE:
        how = QuantizationArgs(num_bits=8, type=QuantizationType.FLOAT, strategy=QuantizationStrategy.CHANNEL)
        yield CompressedTensorsW8A16Fp8(how, is_static_input_scheme=False)
    yield RowsScheme(dtype)


@register_weight_loader_v2_supported_method
class EightBitLinearMethod(LinearMethodBase):
    """vLLM's linear method for one layer of a draft model; ``layer.scheme`` is what multiplies."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **more: Any,
    ) -> None:
        failed: list[str] = []
        for scheme in schemes(self.dtype, params_dtype):
            try:
                scheme.create_weights(
                    layer=layer,
                    input_size_per_partition=input_size_per_partition,
                    output_partition_sizes=output_partition_sizes,
                    input_size=input_size,
                    output_size=output_size,
                    params_dtype=params_dtype,
                    **more,
                )
            except (ValueError, NotImplementedError) as error:  # no such kernel of vLLM's
                failed.append(str(error))
                layer._parameters.clear()
                continue
            layer.scheme = scheme
            return
        raise ValueError("; ".join(failed))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.scheme.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.scheme.apply_weights(layer, x, bias)


class EightBitConfig(QuantizationConfig):
    """vLLM's quantisation config of a draft model: every linear layer, nothing else."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def get_name(self) -> Any:
        return "gumiho_8_bit"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [*_WIDE, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> EightBitConfig:
        raise NotImplementedError

    def get_quant_method(self, layer: nn.Module, prefix: str) -> EightBitLinearMethod | None:
        return EightBitLinearMethod(self.dtype) if isinstance(layer, LinearBase) else None


class EightBitMatrix(nn.Module):
    """``[N, K]`` 8-bit rows outside of vLLM's linear layers.

    weight ``[N, K]`` codes and scale ``[N]`` are buffers, as vLLM's sleep keeps those; None once `pack` has given them
    to vLLM's kernel for the CPU.  kernel: our Triton kernel may run; false until it was checked.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, rows: EightBitRows):
        super().__init__()
        rows = for_device(rows)
        self.register_buffer("weight", rows.weight, persistent=False)
        self.register_buffer("scale", rows.scale, persistent=False)
        self.nbytes = rows.weight.nbytes + rows.scale.nbytes
        self.kernel = False
        self._packed: tuple[Any, nn.Module] | None = None

    @property
    def rows(self) -> EightBitRows:
        return EightBitRows(self.weight, self.scale)

    @property
    def packed(self) -> bool:
        """Whether vLLM's kernel has the weights."""
        return self._packed is not None

    def pack(self, dtype: torch.dtype) -> None:
        """On a CPU, let vLLM's int8 kernel have the weights, for activations of ``dtype``; elsewhere nothing."""
        if self.weight.device.type != "cpu" or self.weight.dtype != torch.int8:
            return
        kernel, holder = packed_for_cpu(self.rows, dtype)
        self._packed = kernel, holder
        del self.weight, self.scale

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``[B, K]`` -> ``[B, N]`` in x's dtype."""
        if self._packed is not None:
            kernel, holder = self._packed
            return kernel.apply_weights(holder, x.contiguous(), bias)
        return rows_linear(x, self.rows, bias, kernel=self.kernel)


def packed_for_cpu(rows: EightBitRows, dtype: torch.dtype, bias: Tensor | None = None) -> tuple[Any, nn.Module]:
    """vLLM's int8 kernel for the CPU, and the layer that it has made of a copy of these rows."""
    holder = nn.Module()
    holder.logical_widths = [rows.weight.shape[0]]
    holder.weight = nn.Parameter(rows.weight, requires_grad=False)
    holder.weight_scale = nn.Parameter(rows.scale[:, None].contiguous(), requires_grad=False)
    for name in ("input_scale", "input_zero_point", "azp_adj"):
        holder.register_parameter(name, None)
    holder.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    kernel = init_int8_linear_kernel(
        is_channelwise=True, is_static_input_scheme=False, input_symmetric=True, module_name="EightBitMatrix"
    )
    with set_default_torch_dtype(dtype):
        kernel.process_weights_after_loading(holder)
    return kernel, holder

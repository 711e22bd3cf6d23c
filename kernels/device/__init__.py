"""What the kernels ask about the machine."""

from __future__ import annotations

import functools


@functools.cache
def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU."""
    try:
        import triton
    except ImportError:
        return False
    # Triton reads the switch once for its own library, at import; setting it later gives a broken mixture.
    return bool(triton.knobs.runtime.interpret) and not isinstance(triton.language.max, triton.JITFunction)


def converts_e4m3(capability: str | tuple[int, int]) -> bool:
    """Whether a device, by AMD's architecture or NVIDIA's compute capability, converts float8 e4m3fn in hardware."""
    if isinstance(capability, str):
        return capability.startswith(("gfx950", "gfx12"))
    return capability >= (8, 9)


def converts_fnuz(capability: str | tuple[int, int]) -> bool:
    """Whether a device converts e4m3fnuz instead, whose bias is one more and which has no negative zero."""
    return isinstance(capability, str) and capability.startswith("gfx942")


@functools.cache
def capability(index: int) -> str | tuple[int, int]:
    """AMD's architecture or NVIDIA's compute capability of device ``index``."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return str(getattr(properties, "gcnArchName", ""))
    return properties.major, properties.minor

"""vLLM's model runner V2 on a machine without a GPU: its kernels run, slowly, in Triton's interpreter."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any


def prepare() -> None:
    """Set this process up; before anything of vLLM has imported Triton."""
    os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")
    import triton
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))

    def narrow(name: str, position: int) -> None:
        # The interpreter widens ``block & scalar`` of two bools to int32, and then refuses it as a mask.
        original = getattr(InterpreterBuilder, name)

        def access(self: Any, *args: Any) -> Any:
            handles = list(args)
            mask = handles[position]
            handles[position] = TensorHandle(mask.data.astype(bool), mask.dtype)
            return original(self, *handles)

        setattr(InterpreterBuilder, name, access)

    narrow("create_masked_load", 1)
    narrow("create_masked_store", 2)
    _give_log1p()


def _give_log1p() -> None:
    """The interpreter has none of the device library; the sampling of rejected tokens needs this one."""
    import triton.language as tl
    from vllm.triton_utils import tldevice

    tldevice.log1p = lambda x: tl.log(1.0 + x)

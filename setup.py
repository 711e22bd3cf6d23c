"""Package mapping; everything else stands in pyproject.toml.

The folders of ``kernels/`` are installed under ``vllm_gumiho.kernels``.  ``kernels/`` itself is no package: as one it
would hide Hugging Face's ``kernels`` from a Python started in the checkout.
"""

from setuptools import find_packages, setup

kernels = {f"vllm_gumiho.kernels.{name}": f"kernels/{name}" for name in find_packages("kernels")}

setup(
    packages=["vllm_gumiho", *(f"vllm_gumiho.{name}" for name in find_packages("vllm_gumiho")), *kernels],
    package_dir={"vllm_gumiho": "vllm_gumiho", "vllm_gumiho.kernels": "vllm_gumiho/kernels", **kernels},
    package_data={"vllm_gumiho": ["heads/*/*.json", "heads/*/*.safetensors", "heads/*/*.md", "py.typed"]},
)

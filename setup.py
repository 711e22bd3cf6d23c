"""Package mapping; everything else stands in pyproject.toml.

``kernels/`` is installed as ``vllm_gumiho.kernels``: as a top-level package it would hide Hugging Face's ``kernels``.
"""

from setuptools import find_packages, setup

setup(
    packages=["vllm_gumiho", *(f"vllm_gumiho.{name}" for name in find_packages("vllm_gumiho"))]
    + ["vllm_gumiho.kernels", *(f"vllm_gumiho.kernels.{name}" for name in find_packages("kernels"))],
    package_dir={"vllm_gumiho": "vllm_gumiho", "vllm_gumiho.kernels": "kernels"},
    package_data={"vllm_gumiho": ["heads/*/*.json", "heads/*/*.safetensors", "heads/*/*.md", "py.typed"]},
)

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

EMBEDDED = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory) -> Path:
    return tiny.write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """Released layout without a config.json; accepted often enough to matter, as it passes target features through."""
    return tiny.write_released(tmp_path_factory.mktemp("checkpoint"), tiny.drafter_tensors())


@pytest.fixture(scope="session")
def embedded_target() -> Path:
    if not (EMBEDDED / "model.safetensors").is_file():
        from vllm_gumiho.embedded import embedded_target

        return embedded_target(EMBEDDED.parent)
    return EMBEDDED

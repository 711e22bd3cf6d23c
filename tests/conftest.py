from __future__ import annotations

import os
from pathlib import Path

import pytest
import record
import tiny

EMBEDDED = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="write what passed, was skipped and is proven to this file")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with engines come first: of two workers neither then has a long file left at the end."""
    record.mark_rows(items)
    engines = {item.path for item in items if item.get_closest_marker("engine")}
    items.sort(key=lambda item: item.path not in engines)


def pytest_configure(config: pytest.Config) -> None:
    """Under pytest-xdist the engines of each worker keep to cores of their own: OpenMP's threads spin."""
    if config.getoption("record") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(record.Recorder(config.getoption("record").absolute()))
    worker, workers = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if worker is None or not hasattr(os, "sched_getaffinity"):
        return
    cores, number = sorted(os.sched_getaffinity(0)), int(worker.removeprefix("gw"))
    mine = cores[number % workers :: workers] or [cores[number % len(cores)]]
    os.environ["OMP_NUM_THREADS"] = str(len(mine))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, mine))


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
        from vllm_gumiho.engines.smollm2 import smollm2_folder

        return smollm2_folder(EMBEDDED.parent)
    return EMBEDDED

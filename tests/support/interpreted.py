"""Tests of kernels under Triton's interpreter, which Triton decides on at its import.

A module of them runs itself in a process that is told so in time: `run_interpreted`.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vllm_gumiho.kernels.device import interpreting

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and interpreting()


def run_interpreted(file: str, config: pytest.Config) -> None:
    """A module's tests with those for the interpreter, of which this run's ``-m`` leaves out what it leaves out."""
    command = [sys.executable, "-m", "pytest", file, "-q", "-p", "no:cacheprovider", "--no-header"]
    command += ["-m", config.option.markexpr] if config.option.markexpr else []
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout

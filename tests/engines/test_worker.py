"""A worker ends with whoever started it, even where that is killed while the worker is busy."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

PARENT = """
from vllm_gumiho.engines.process import Worker
with Worker("busy", {}) as worker:
    worker.ask("wait")
"""
BUSY = """
import os, subprocess, time
from pathlib import Path

def start(job):
    return None, {}

def wait(_):
    child = subprocess.Popen(["sleep", "600"])
    Path("pids.part").write_text(f"{os.getpid()} {child.pid}")
    Path("pids.part").rename("pids")
    time.sleep(600)

TASKS = {"wait": wait}
"""


def running(number: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


def test_a_busy_worker_and_its_children_end_with_a_killed_parent(tmp_path):
    (tmp_path / "busy.py").write_text(BUSY)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, start_new_session=True
    )
    try:
        assert wait_until((tmp_path / "pids").exists, 60)
        pids = [int(number) for number in (tmp_path / "pids").read_text().split()]
        assert all(map(running, pids))
    finally:
        parent.kill()
        parent.wait()
    assert wait_until(lambda: not any(map(running, pids)), 20), "the worker goes on"

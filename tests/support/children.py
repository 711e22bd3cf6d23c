"""Processes that tests start, and their end whatever they do."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from pathlib import Path

import psutil
import pytest


def exit_code(process: subprocess.Popen, log: Path, limit_s: float = 300) -> int:
    """Of a process that writes to this log; one that takes longer fails the test by where it and its children stand.

    Started with PYTHONFAULTHANDLER, so that Python writes the stack of each of its threads when it is aborted.
    """
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        parent = psutil.Process(process.pid)
        # One after the other, so that their stacks do not mix; the parent first, which would end its children.
        for member in (parent, *parent.children(recursive=True)):
            for number in (signal.SIGABRT, signal.SIGKILL):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
                    member.send_signal(number)
                    member.wait(5)
        process.wait(10)
    pytest.fail(f"not done after {limit_s:g} s: {log.read_text()[-6000:]}")

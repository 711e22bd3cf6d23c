"""A process of a test that does not end is shown by its stacks, and ended with its children."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest
from children import exit_code

STUCK = """
import subprocess, sys, time

def stuck():
    print("ready", flush=True)
    time.sleep(600)

if sys.argv[1] == "parent":
    child = subprocess.Popen([sys.executable, __file__, "child"])
stuck()
"""


def test_a_family_that_does_not_end_is_shown_and_ended(tmp_path):
    script, log = tmp_path / "stuck.py", tmp_path / "log"
    script.write_text(STUCK)
    with log.open("w") as out:
        command = [sys.executable, str(script), "parent"]
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "PYTHONFAULTHANDLER": "1"})
    try:
        while log.read_text().count("ready") < 2:
            assert process.poll() is None
            time.sleep(0.05)
        parent = psutil.Process(process.pid)
        family = [parent, *parent.children()]
        assert len(family) == 2
        with pytest.raises(pytest.fail.Exception, match=r"not done after 0\.1 s") as failed:
            exit_code(process, log, 0.1)
        assert str(failed.value).count("in stuck") == 2
        _, alive = psutil.wait_procs(family, 10)
        assert not alive
    finally:
        process.kill()


def test_a_process_that_ends_gives_its_code(tmp_path):
    assert exit_code(subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]), tmp_path / "log") == 3

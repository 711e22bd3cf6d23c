"""Our environment variables are vLLM's too, where they are set: no warning of them, no refusal, the same in workers."""

import json
import os
import subprocess
import sys

from vllm_gumiho.env import KERNELS, OURS, SCHEDULE

LOAD = """
import json, os, sys
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm import EngineArgs, envs
if late := json.loads(sys.argv[1]):
    os.environ |= late
    EngineArgs(model=".")
from vllm.platforms import current_platform
current_platform.validate_environ(hard_fail=True)
factors = envs.compile_factors()
print(json.dumps({name: factors[name] for name in factors if "GUMIHO" in name}))
"""


def loaded(tmp_path, late=None, **variables):
    """What vLLM's compile cache is told of our variables, in a process that has these, some of them set late: after
    vLLM was imported and before the engine's arguments.  The process's outcome too."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(late)],
        env=kept | {"VLLM_CACHE_ROOT": str(tmp_path), **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None, done


def test_set_variables_are_known_and_that_of_graphs_is_in_their_key(tmp_path):
    late = {SCHEDULE.name: "{}"}
    factors, done = loaded(tmp_path, late, **{variable.name: "0" for variable in OURS if variable != SCHEDULE})
    assert factors == {variable.name: "0" if variable == KERNELS else None for variable in OURS}, done.stderr
    assert "Unknown vLLM environment variable" not in done.stderr


def test_variables_that_are_not_set_leave_the_key_of_graphs_alone(tmp_path):
    factors, done = loaded(tmp_path)
    assert factors == {}, done.stderr


def test_others_are_refused_as_ever(tmp_path):
    factors, done = loaded(tmp_path, **{KERNELS.name: "0", SCHEDULE.name + "S": "0"})
    assert factors is None
    assert f"Unknown vLLM environment variable detected: {SCHEDULE.name}S" in done.stderr

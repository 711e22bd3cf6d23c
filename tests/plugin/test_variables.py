"""Our environment variables are vLLM's too, where they are set: no warning of them, no refusal, the same in workers."""

import json
import os
import subprocess
import sys

from vllm_gumiho.env import KERNELS, OURS, SCHEDULE

UNKNOWN = SCHEDULE.name + "S"
LOAD = f"""
import json, os
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm import EngineArgs, envs
from vllm.platforms import current_platform

def key():
    factors = envs.compile_factors()
    return {{name: factors[name] for name in factors if "GUMIHO" in name}}

found = [key()]
os.environ[{SCHEDULE.name!r}] = "{{}}"
EngineArgs(model=".")
current_platform.validate_environ(hard_fail=True)
found.append(key())
os.environ[{UNKNOWN!r}] = "0"
try:
    current_platform.validate_environ(hard_fail=True)
except ValueError as error:
    found.append(str(error))
print(json.dumps(found))
"""


def test_variables_that_are_set_are_known_and_that_of_graphs_is_in_their_key(tmp_path):
    """All but one from the start; that one after vLLM was imported, before the engine's arguments.  What is not set
    leaves the key of compiled graphs alone, and a name that is none of ours is refused as ever."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    ours = {variable.name: "0" for variable in OURS if variable != SCHEDULE}
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        env=kept | {"VLLM_CACHE_ROOT": str(tmp_path), **ours},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    before, after, refused = json.loads(done.stdout.splitlines()[-1])
    assert before == {name: "0" if name == KERNELS.name else None for name in ours}
    assert after == before | {SCHEDULE.name: None}
    assert "Unknown vLLM environment variable" not in done.stderr
    assert f"Unknown vLLM environment variable detected: {UNKNOWN}" in refused

"""Every environment variable of this package, and those of others that it reads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Variable:
    """An environment variable: what it does, and what it may say."""

    name: str
    what: str
    default: str = "unset"

    def get(self) -> str | None:
        """Its value; None where it is unset."""
        return os.environ.get(self.name)


CHECKPOINTS = Variable(
    "VLLM_GUMIHO_CHECKPOINTS",
    'Your own pairs of target and checkpoint: a JSON object `{"target": "checkpoint"}`, or a file with one.',
    "`vllm-gumiho/checkpoints.json` in the user's config folder",
)
KERNELS = Variable(
    "VLLM_GUMIHO_KERNELS",
    "Triton kernels: `auto` on a GPU with greedy drafts, `1` wherever they run, `0` nowhere.",
    "`auto`",
)
SPLIT_HEADS = Variable(
    "VLLM_GUMIHO_SPLIT_HEADS",
    "Heads under tensor parallelism: `auto` shares them out where that spares enough reading, `1` always, `0` never.",
    "`auto`",
)
DRAFT_WEIGHTS = Variable(
    "VLLM_GUMIHO_DRAFT_WEIGHTS",
    "`auto`, `bf16`, `fp8` or `int8` for every draft, of which MoA takes the first two; the key `draft_weights` comes "
    "before it.",
    "`auto`",
)
SCHEDULE = Variable(
    "VLLM_GUMIHO_SCHEDULE",
    "A schedule record as JSON, before the stored ones; set for its children by a process that cannot store one.",
)
OURS = (CHECKPOINTS, DRAFT_WEIGHTS, KERNELS, SPLIT_HEADS, SCHEDULE)

CACHE_ROOT = Variable(
    "VLLM_CACHE_ROOT", "Its folder `gumiho` has schedules, drafts' configs and vLLMs found fit.", "`~/.cache/vllm`"
)
V2_RUNNER = Variable(
    "VLLM_USE_V2_MODEL_RUNNER",
    "vLLM's model runner: `1` for V2, `0` for V1.",
    "vLLM's choice, by platform and feature",
)
CPU_KV_SPACE = Variable(
    "VLLM_CPU_KVCACHE_SPACE", "GiB of KV cache on a CPU; the tools take 1 if it is unset, `generate` 4."
)
OFFLINE = Variable("HF_HUB_OFFLINE", "`1`: nothing is fetched; checkpoints come from the hub's cache or from folders.")
NO_STATS = Variable("VLLM_NO_USAGE_STATS", "`1` turns off vLLM's own usage statistics; this package has none.")
CONFIG_HOME = Variable(
    "XDG_CONFIG_HOME", "The user's config folder, where `vllm-gumiho/checkpoints.json` is looked for.", "`~/.config`"
)
BREAKABLE_GRAPHS = Variable(
    "VLLM_USE_BREAKABLE_CUDAGRAPH", "vLLM's breakable CUDA graphs; the drafter then copies what its heads read."
)
ONE_PROCESS = Variable(
    "VLLM_ENABLE_V1_MULTIPROCESSING", "vLLM's; `tune`, `eval` and `bench` set it to `0` for engines in one process."
)
PLUGINS = Variable(
    "VLLM_PLUGINS", "vLLM's: the plugins that it loads, with commas; `gumiho` must be among them.", "all"
)
SCOPES = Variable("VLLM_CUSTOM_SCOPES_FOR_PROFILING", "vLLM's; `bench` sets it to `1` to time the parts of a step.")
OTHERS = (
    CACHE_ROOT,
    CONFIG_HOME,
    V2_RUNNER,
    CPU_KV_SPACE,
    OFFLINE,
    NO_STATS,
    BREAKABLE_GRAPHS,
    ONE_PROCESS,
    PLUGINS,
    SCOPES,
)


def cache_folder() -> Path:
    """``gumiho`` in vLLM's cache root; it need not exist.  Raises: OSError where the user has no home folder."""
    from vllm import envs

    try:
        return Path(envs.VLLM_CACHE_ROOT).expanduser() / "gumiho"
    except RuntimeError as error:
        raise FileNotFoundError(str(error)) from error


def config_file() -> Path:
    """The user's own table of checkpoints; it need not exist."""
    home = CONFIG_HOME.get() or os.path.join(os.path.expanduser("~"), ".config")
    return Path(home) / "vllm-gumiho" / "checkpoints.json"


def engine_environment(**changes: str) -> dict[str, str]:
    """This process's environment for an engine in another: no usage statistics, a small KV cache on a CPU."""
    return {CPU_KV_SPACE.name: "1", **os.environ, NO_STATS.name: "1", **changes}

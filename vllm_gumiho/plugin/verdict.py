"""Whether the installed vLLM has every hook, remembered between processes: to read its source takes about a second,
which each process of every engine would spend, one without Gumiho too."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from vllm_gumiho.env import cache_folder
from vllm_gumiho.files import digest_of, sha256_of, write_text
from vllm_gumiho.plugin import vllm_source
from vllm_gumiho.plugin.hooks import SERVING, Hook, check, mismatch_message
from vllm_gumiho.plugin.vllm_source import Source


def refusal_of(source: Source, version: str | None, hooks: tuple[Hook, ...] = SERVING) -> str | None:
    """Why a vLLM cannot draft with us, None where every hook holds.  version: of it, None where there is none.

    Hooks that hold are remembered in vLLM's cache folder, for these hooks, these files and this way to look: a file of
    vLLM is told by its size and the times of its last change.  What does not hold is read again by each process.
    """
    mark = _mark(source, version, hooks)
    if mark is not None and os.path.isfile(mark):
        return None
    found = mismatch_message(check(source, hooks), version)
    if found is None and mark is not None:
        # A folder that cannot be written costs the second, no more.
        with contextlib.suppress(OSError):
            mark.parent.mkdir(parents=True, exist_ok=True)
            write_text(mark, f"every hook holds in vLLM {version}\n")
    return found


def _mark(source: Source, version: str | None, hooks: tuple[Hook, ...]) -> Path | None:
    """The file that says that all is well, there or not; None where source cannot be told from other source."""
    stamps = source.stamps(sorted({hook.module for hook in hooks}))
    if version is None or stamps is None:
        return None
    wanted = sorted([hook.module, hook.name, list(hook.needs), hook.variable] for hook in hooks)
    # Whatever goes wrong here, a vLLM without the place to ask among it: the hooks decide, and are read.
    with contextlib.suppress(Exception):
        return cache_folder() / "hooks" / digest_of([version, wanted, stamps, sha256_of(Path(vllm_source.__file__))])
    return None

"""Requests through an engine step by step, so that the next one starts as soon as one ends."""

from __future__ import annotations

import itertools
from typing import Any


class Stream:
    """Requests in one vLLM engine, each under a key of the caller's."""

    def __init__(self, engine: Any):
        """engine: ``LLM.llm_engine``."""
        self.engine = engine
        self._keys: dict[str, Any] = {}
        self._numbers = itertools.count()

    def __len__(self) -> int:
        """Requests sent and not finished."""
        return len(self._keys)

    def send(self, key: Any, prompt: list[int] | dict[str, Any], sampling: Any) -> None:
        """Queue a request: token ids or another prompt of vLLM's, and ``SamplingParams``."""
        name = f"{id(self)}-{next(self._numbers)}"
        self._keys[name] = key
        self.engine.add_request(name, {"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt, sampling)

    def step(self) -> list[tuple[Any, Any]]:
        """One step of the engine: ``(key, output)`` of every request that wrote something in it."""
        found = []
        for output in self.engine.step():
            key = self._keys.pop(output.request_id) if output.finished else self._keys[output.request_id]
            found.append((key, output))
        return found

    def abort(self) -> None:
        """End every request that is not finished."""
        self.engine.abort_request(list(self._keys))
        self._keys.clear()

    def drain(self) -> None:
        """Step until nothing is left in the engine."""
        while self.engine.has_unfinished_requests():
            self.step()

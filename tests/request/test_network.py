"""An engine that drafts reaches for no network, even where the Hub is allowed."""

from __future__ import annotations

import pytest
from engines import generate, greedy, run, step

pytestmark = pytest.mark.engine
# A port that nothing listens on: what the watch must see.
PLANTED = 9


def test_an_engine_that_drafts_reaches_for_nothing(tmp_path, embedded_target):
    """The embedded target, given as a folder, with the bundled head, from start to shutdown, with the Hub allowed."""
    steps = {"plain": generate(["The capital of France is"], greedy(8))}
    settings = {"model": str(embedded_target)}
    cases = {
        "off": {"llm": settings, "steps": steps | {"planted": {"do": "reach", "port": PLANTED}}},
        "on": {"llm": settings | {"speculative_config": {"method": "gumiho"}}, "steps": steps},
    }
    results = run(tmp_path, cases, env={"HF_HUB_OFFLINE": "0"})
    assert step(results, "on", "plain")["counts"]["drafts"] > 0
    assert f"socket.connect ('127.0.0.1', {PLANTED})" in results["off"]["network"]
    # vLLM alone reaches for nothing either: no Hub, no other machine, not even the loopback.
    assert results["on"]["network"] == []

"""The load test itself: its mix, that it can fail, and a small run of it against a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest
from places import TESTS

pytest.importorskip("aiohttp")

import psutil
from soak.load import Report, _judge_answers, _judge_memory
from soak.server import Server
from soak.traffic import BAD, GOOD, LEAVING, MALFORMED, Call, Outcome, mix, pool

SOAK = TESTS / "soak"
KNOWN = pool(0, 24, 8, 16)


def test_the_mix_is_the_same_for_a_seed_and_has_every_kind():
    calls = mix(3, 1000, KNOWN, 1024)
    assert calls == mix(3, 1000, KNOWN, 1024)
    assert calls != mix(4, 1000, KNOWN, 1024)
    kinds = Counter(call.kind for call in calls)
    assert kinds.keys() == (GOOD | LEAVING | BAD).keys()
    assert sum((GOOD | LEAVING | BAD).values()) == 100
    sent = [call.body for call in calls if call.kind == "malformed"]
    assert all(body in sent for _, body in MALFORMED)
    assert {call.text_of for call in calls if call.text_of} == KNOWN.keys()


@pytest.mark.parametrize("seed", range(3))
def test_long_calls_run_together_in_a_small_mix_too(seed):
    kinds = [call.kind for call in mix(seed, 60, KNOWN, 1024)]
    assert [place for place, kind in enumerate(kinds) if kind == "long"] == [20, 21, 22, 23]
    assert Counter(call.kind for call in mix(seed, 1000, KNOWN, 1024))["long"] == 10 * GOOD["long"]


def idle_server(tmp_path, *command: str) -> Server:
    server = Server(tmp_path, tmp_path / "log", 1, gumiho=False, max_model_len=8, max_num_seqs=1, kv_blocks=1)
    server.command = list(command)
    return server


def test_no_server_is_started_after_giving_up(tmp_path):
    server = idle_server(tmp_path, "sleep", "60")
    server.give_up()
    with pytest.raises(RuntimeError, match="the time is up"):
        server.start()
    assert server.process is None


def test_a_server_that_starts_while_it_is_given_up_is_ended(tmp_path, monkeypatch):
    server = idle_server(tmp_path, "sleep", "60")
    earlier = psutil.Popen(["true"])
    earlier.wait()
    server.family = [earlier]
    monkeypatch.setattr(server, "health", lambda: setattr(server, "given_up", True))
    with pytest.raises(RuntimeError, match="the time is up"):
        server.start()
    assert server.process.poll() is not None
    assert server.leftovers(5) == []


def test_a_dead_server_is_looked_at_without_an_error(tmp_path):
    server = idle_server(tmp_path)
    server.process = psutil.Popen(["true"])
    server.process.wait()
    server.family = [server.process]
    assert (server.memory(), server.open_files(), server.child("Worker"), server.leftovers(1)) == ({}, 0, None, [])
    server.end()


def outcome(kind: str, state: str, text: str = "right") -> Outcome:
    return Outcome(Call(kind, "/", {}, text_of="known" if kind == "chat" else None), state, 0.1, text)


@pytest.mark.parametrize(
    ("outcomes", "kept"),
    [
        ([outcome("chat", "answered"), outcome("malformed", "refused"), outcome("abort", "left")], True),
        ([outcome("chat", "answered"), outcome("hang up in stream", "answered")], True),
        ([outcome("chat", "answered"), outcome("chat", "answered", "wrong")], False),
        ([outcome("chat", "refused")], False), ([outcome("chat", "answered"), outcome("chat", "failed")], False),
        ([outcome("chat", "answered"), outcome("oversize", "answered")], False),
        ([outcome("chat", "answered"), outcome("malformed", "failed")], False),
        ([outcome("chat", "answered"), outcome("abort", "failed")], False), ([outcome("malformed", "refused")], False),
    ],
)  # fmt: skip
def test_a_wrong_answer_breaks_a_promise(outcomes, kept):
    report = Report()
    _judge_answers(outcomes, {"known": "right"}, report)
    assert report.kept is kept
    assert report.figures["sent"] == len(outcomes)


@pytest.mark.parametrize(("growth_mib", "kept"), [(0, True), (60, True), (300, False), (3000, False)])
def test_growing_memory_breaks_a_promise(growth_mib, kept):
    report = Report()
    _judge_memory([(n, (4000 << 20) + (n * growth_mib << 20) // 62) for n in range(1, 101)], 100, report)
    assert report.kept is kept


@pytest.mark.engine
@pytest.mark.long
def test_a_small_load_keeps_every_promise(tmp_path, embedded_target):
    output = tmp_path / "soak.json"
    done = subprocess.run(
        [
            sys.executable,
            str(SOAK),
            "--requests",
            "60",
            "--concurrency",
            "8",
            "--known",
            "12",
            "--no-faults",
            "--kv-blocks",
            "12",
            "--target",
            str(embedded_target),
            "--output",
            str(output),
        ],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    report = json.loads(output.read_text())
    figures = report["figures"]
    assert figures["sent"] == 60
    assert figures["answered"] + figures["refused"] + figures["left"] == 60
    assert figures["greedy texts compared"] > 10
    assert figures["drafts"] > 0
    assert all(promise["kept"] for promise in report["promises"].values())

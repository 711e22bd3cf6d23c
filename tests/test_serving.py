"""``vllm serve`` with the bundled head, over HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine
BIN = Path(sys.executable).parent
START_LIMIT_S = 400


@pytest.fixture(scope="module")
def server(tmp_path_factory, embedded_target):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with log.open("w") as out:
        process = subprocess.Popen(
            [
                str(BIN / "vllm"), "serve", str(embedded_target), "--served-model-name", "smollm2",
                "--dtype", "float32",
                "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512", "--max-num-seqs", "4",
                "--enforce-eager", "--speculative-model", "gumiho",
            ],
            stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(START_LIMIT_S):
            if process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2)
                break
            except OSError:
                time.sleep(1)
        assert process.poll() is None, log.read_text()[-3000:]
        yield url, log
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def ask(url: str, content: str, stream: bool = False) -> str:
    body = {
        "model": "smollm2", "messages": [{"role": "user", "content": content}], "max_tokens": 24, "temperature": 0,
        "stream": stream,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        if not stream:
            return json.load(response)["choices"][0]["message"]["content"]
        chunks = [line[6:] for line in response.read().decode().splitlines() if line.startswith("data: {")]
    return "".join(json.loads(chunk)["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def counter(url: str, name: str) -> float:
    text = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    return sum(float(value) for value in re.findall(rf"^{name}\{{.*\}} (\S+)$", text, re.MULTILINE))


def test_the_server_answers_with_gumiho_and_counts_its_drafts(server):
    url, log = server
    before = counter(url, "vllm:spec_decode_num_drafts_total")
    whole = ask(url, "Name three fruits.")
    assert whole
    assert ask(url, "Name three fruits.", stream=True) == whole
    assert counter(url, "vllm:spec_decode_num_drafts_total") > before
    assert counter(url, "vllm:spec_decode_num_accepted_tokens_total") > 0
    assert "Gumiho drafts with" in log.read_text()


def test_a_bad_request_leaves_the_server_running(server):
    url, _ = server
    request = urllib.request.Request(f"{url}/v1/chat/completions", b"{", {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert 400 <= refused.value.code < 500
    assert ask(url, "Hello")

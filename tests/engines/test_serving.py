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
from places import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.next_release]
BIN = Path(sys.executable).parent
DASHBOARD = ROOT / "examples" / "grafana" / "vllm-gumiho.json"
START_LIMIT_S = 900


@pytest.fixture(scope="module")
def server(tmp_path_factory, embedded_target):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_GUMIHO_KERNELS": "auto"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with log.open("w") as out:
        process = subprocess.Popen(
            [
                str(BIN / "vllm"),
                "serve",
                str(embedded_target),
                "--served-model-name",
                "smollm2",
                "--dtype",
                "float32",
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                "--max-model-len",
                "512",
                "--max-num-seqs",
                "4",
                "--enforce-eager",
                "--speculative-model",
                "gumiho",
                "--per-request-spec-decode-metrics",
                "detailed",
            ],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        end, healthy = time.monotonic() + START_LIMIT_S, False
        while not healthy and process.poll() is None and time.monotonic() < end:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2)
                healthy = True
            except OSError:
                time.sleep(1)
        assert healthy, log.read_text()[-3000:]
        yield url, log
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def answer(url: str, body: dict) -> dict:
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps({"model": "smollm2", **body}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def metrics(url: str) -> str:
    return urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()


def ask(url: str, content: str, stream: bool = False) -> str:
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 24,
        "temperature": 0,
        "stream": stream,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        if not stream:
            return json.load(response)["choices"][0]["message"]["content"]
        chunks = [line[6:] for line in response.read().decode().splitlines() if line.startswith("data: {")]
    return "".join(json.loads(chunk)["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def counter(url: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^{name}\{{.*\}} (\S+)$", metrics(url), re.MULTILINE))


def by_position(url: str) -> list[float]:
    found = re.findall(
        r'^vllm:spec_decode_num_accepted_tokens_per_pos_total\{.*position="(\d+)".*\} (\S+)$',
        metrics(url),
        re.MULTILINE,
    )
    return [float(value) for _, value in sorted((int(position), value) for position, value in found)]


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


def test_a_requests_own_metrics_are_what_the_counters_grew_by(server):
    url, _ = server
    names = ("drafts", "draft_tokens", "accepted_tokens")
    before = [counter(url, f"vllm:spec_decode_num_{name}_total") for name in names]
    positions = by_position(url)
    tokens = 32
    given = answer(url, {"prompt": "1 2 3 4 5 6 7 8", "max_tokens": tokens, "temperature": 0, "ignore_eos": True})
    own = given["metrics"]["speculative_decoding"]
    grown = [counter(url, f"vllm:spec_decode_num_{name}_total") - b for name, b in zip(names, before, strict=True)]
    assert grown == [own["num_spec_steps"], own["num_draft_tokens"], own["num_accepted_draft_tokens"]]
    assert own["num_spec_tokens"] == 7
    assert grown[2] > 0
    # The prompt's pass gives one token, each draft's check those accepted and one more; the last may overshoot.
    assert tokens - 1 <= grown[0] + grown[2] <= tokens - 1 + 7
    assert own["mean_acceptance_length"] == pytest.approx(1 + grown[2] / grown[0])
    accepted = [after - b for after, b in zip(by_position(url), positions, strict=True)]
    assert accepted == [sum(own["acceptance_histogram"][i + 1 :]) for i in range(7)]
    assert sum(own["per_step_accepted"]) == grown[2]
    assert own["per_step_drafted"][0] == 7


def test_the_log_says_in_one_line_what_drafts(server):
    _, log = server
    lines = [line for line in log.read_text().splitlines() if "Gumiho drafts with" in line]
    assert len(lines) == 1
    why = re.escape("(no GPU; VLLM_GUMIHO_KERNELS=1 asks for the Triton kernels all the same)")
    assert re.search(
        rf"heads/smollm2-135m-instruct: K=7, model runner V1, heads by vLLM's int8 products {why}, "
        rf"argmax by logits {why}, weights in int8 \(\d+\.\d\d MB\), LM head in int8 \(\d+\.\d\d MB more\)$",
        lines[0],
    )


def test_every_metric_of_the_dashboard_is_on_the_page(server):
    url, _ = server
    ask(url, "Hello")
    page = metrics(url)
    board = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    named = {name for query in queries for name in re.findall(r"vllm:\w+", query)}
    assert len(named) >= 10
    assert all("$model" in query for query in queries)
    for name in named:
        assert re.search(rf'^{name}\{{.*model_name="smollm2".*\}} ', page, re.MULTILINE), name
    assert re.search(r'^vllm:kv_cache_usage_perc\{.*engine="0"', page, re.MULTILINE)

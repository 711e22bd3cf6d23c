"""Shows: a server with Gumiho, a streaming chat with it by the openai package, and its metrics read back.

    python examples/serving.py --question "Name three fruits."

The server is the one that `make serve` starts; here it runs only as long as the chat.
"""

import argparse
import os
import subprocess
import sys
import time
import urllib.request

import torch
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from vllm_gumiho.engines.smollm2 import smollm2_folder

START_LIMIT_S = 600


def wait_until_up(server: subprocess.Popen, url: str) -> None:
    for _ in range(START_LIMIT_S):
        if server.poll() is not None:
            raise SystemExit(f"the server ended with {server.returncode}; see its output above")
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2)
        except OSError:
            time.sleep(1)
        else:
            return
    raise SystemExit(f"the server did not answer in {START_LIMIT_S} s")


def chat(url: str, model: str, question: str, max_tokens: int) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=max_tokens, temperature=0, stream=True
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


def show_metrics(url: str) -> None:
    text = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    counters = {"drafts": 0.0, "draft_tokens": 0.0, "accepted_tokens": 0.0}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix("vllm:spec_decode_num_").removesuffix("_total")
            if name in counters and sample.name.endswith("_total"):
                counters[name] += sample.value
    print(", ".join(f"{name.replace('_', ' ')} {value:.0f}" for name, value in counters.items()))
    print(f"acceptance length {1 + counters['accepted_tokens'] / counters['drafts']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--question", default="Name three fruits.")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()

    model, url = str(smollm2_folder()), f"http://127.0.0.1:{args.port}"
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        model,
        "--served-model-name",
        "smollm2",
        "--host",
        "127.0.0.1",
        "--port",
        str(args.port),
        "--max-model-len",
        "1024",
        "--speculative-config",
        '{"method": "gumiho"}',
    ]
    if not torch.accelerator.is_available():
        command += ["--dtype", "float32", "--enforce-eager"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    server = subprocess.Popen(command, env=environment, stdout=sys.stderr)
    try:
        wait_until_up(server, url)
        chat(url, "smollm2", args.question, args.max_tokens)
        show_metrics(url)
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()

"""Makes engine configs, and no engine, from cases: ``python config_main.py JOB.json RESULT.json``.

A job is ``{"model": folder, "cases": {name: {argument of EngineArgs: value}}}``.  The result has each case's error or
settings, and every attempt to reach a network.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    attempts: list[str] = []

    def watch(event: str, arguments: tuple) -> None:
        if event in NETWORK:
            attempts.append(f"{event} {arguments[-1] if event == 'socket.connect' else arguments[0]}")

    sys.addaudithook(watch)
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    results = {}
    for name, arguments in job["cases"].items():
        defaults = {"model": job["model"], "skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 256}
        try:
            config = EngineArgs(**(defaults | arguments)).create_engine_config()
            results[name] = {"k": config.speculative_config and config.speculative_config.num_speculative_tokens}
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    Path(sys.argv[2]).write_text(json.dumps({"results": results, "network": attempts}))


if __name__ == "__main__":
    main()

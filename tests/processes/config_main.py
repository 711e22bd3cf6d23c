"""Makes engine configs, and no engine, from cases: ``python config_main.py JOB.json RESULT.json``.

A job is ``{"model": folder, "cases": {name: {argument of EngineArgs: value}}}``.  The result has each case's error or
settings, and every attempt to reach a network.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")


def watch_network() -> list[str]:
    """A list that fills with every attempt to reach a network from now on, one entry an attempt."""
    attempts: list[str] = []

    def watch(event: str, arguments: tuple) -> None:
        if event in NETWORK:
            attempts.append(f"{event} {arguments[-1] if event == 'socket.connect' else arguments[0]}")

    sys.addaudithook(watch)
    return attempts


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    attempts = watch_network()
    import vllm.config.vllm
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models.utils import get_draft_quant_config
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    # As on a GPU, where Triton is installed: else vLLM takes V1 before it looks for what V2 lacks.
    vllm.config.vllm.HAS_TRITON = True
    results = {}
    for name, arguments in job["cases"].items():
        defaults = {"model": job["model"], "skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 256}
        try:
            config = EngineArgs(**(defaults | arguments)).create_engine_config()
            speculative = config.speculative_config
            results[name] = {"k": speculative and speculative.num_speculative_tokens}
            results[name] |= {
                "V2 lacks": config._get_v2_model_runner_unsupported_features(),
                "V2": config.use_v2_model_runner,
                "positions": config.model_config.max_model_len,
                "draft positions": speculative and speculative.draft_model_config.max_model_len,
                "layers read": getattr(
                    speculative and speculative.draft_model_config.hf_config, "eagle_aux_hidden_state_layer_ids", None
                ),
            }
            if config.quant_config is not None:
                draft = get_draft_quant_config(config) if speculative else None
                results[name] |= {
                    "target quantised by": type(config.quant_config).__name__,
                    "draft by": draft and str(draft),
                }
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    Path(sys.argv[2]).write_text(json.dumps({"results": results, "network": attempts}))


if __name__ == "__main__":
    main()

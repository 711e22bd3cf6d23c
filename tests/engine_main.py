"""Runs engine cases in a process of its own: ``python engine_main.py JOB.json RESULT.json``.

A job is ``{"runner": "v1" | "v2", "cases": {name: {"llm": {...}, "calls": [{"prompts", "sampling"}]}}}``.  The V2
runner needs Triton's interpreter, which must be chosen before Triton is imported: hence the process.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace


def prepare(runner: str) -> None:
    os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="INFO")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if os.environ.get("GUMIHO_TESTS_ON_GPU"):
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(runner == "v2"))
    elif runner == "v2":
        os.environ.update(TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")
        import triton

        triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
        _take_wide_masks()
        _give_log1p()


def _take_wide_masks() -> None:
    """The interpreter widens ``block & scalar`` of two bools to int32, and then refuses it as a mask."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def narrow(name: str, position: int) -> None:
        original = getattr(InterpreterBuilder, name)

        def access(self, *args):
            handles = list(args)
            mask = handles[position]
            handles[position] = TensorHandle(mask.data.astype(bool), mask.dtype)
            return original(self, *handles)

        setattr(InterpreterBuilder, name, access)

    narrow("create_masked_load", 1)
    narrow("create_masked_store", 2)


def _give_log1p() -> None:
    """The interpreter has none of the device library; the sampling of rejected tokens needs this one."""
    import triton.language as tl
    from vllm.triton_utils import tldevice

    tldevice.log1p = lambda x: tl.log(1.0 + x)


def record_drafts(drafter) -> set[int]:
    """Token ids that model runner V1's proposer drafts from now on."""
    drafted: set[int] = set()
    propose = drafter.propose

    def recording(*args, **kwargs):
        tokens = propose(*args, **kwargs)
        drafted.update(tokens.flatten().tolist())
        return tokens

    drafter.propose = recording
    return drafted


def run_case(case: dict) -> dict:
    from vllm import LLM, SamplingParams

    if case.get("import_first"):
        import vllm_gumiho  # noqa: F401
    defaults = {
        "skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 256, "enforce_eager": True,
        "max_num_seqs": 8, "disable_log_stats": False,
    }  # fmt: skip
    llm = LLM(**(defaults | case["llm"]))
    config = llm.llm_engine.vllm_config
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
    drafted_ids = record_drafts(drafter) if type(drafter).__name__ == "GumihoProposer" else set()
    result: dict = {
        "tokens": [],
        "drafter": type(drafter).__name__,
        "model": config.model_config.model,
        "k": config.speculative_config and config.speculative_config.num_speculative_tokens,
        "runner": "v2" if config.use_v2_model_runner else "v1",
    }
    for call in case["calls"]:
        prompts = [{"prompt_token_ids": ids} for ids in call["prompts"]]
        sampling = call["sampling"]
        parameters = (
            [SamplingParams(**({"detokenize": False} | one)) for one in sampling]
            if isinstance(sampling, list)
            else SamplingParams(**({"detokenize": False} | sampling))
        )
        started = time.monotonic()
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        result.setdefault("seconds", []).append(time.monotonic() - started)
        result["tokens"].append([[list(o.token_ids) for o in out.outputs] for out in outputs])
    result["draft_tokens"] = sorted(drafted_ids)
    for metric in llm.get_metrics():
        if metric.name == "vllm:spec_decode_num_drafts":
            result["drafts"] = metric.value
        elif metric.name == "vllm:spec_decode_num_draft_tokens":
            result["drafted"] = metric.value
        elif metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
            result["accepted"] = list(metric.values)
    if result["drafter"].startswith("Gumiho"):
        from vllm_gumiho.kernels import lm_head_argmax, parallel_heads

        heads = sorted(path.value for path in parallel_heads.launches)
        result["launches"] = {"heads": heads, "argmax": sorted(lm_head_argmax.launches)}
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return result


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    prepare(job["runner"])
    results = {}
    for name, case in job["cases"].items():
        try:
            results[name] = run_case(case)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()

"""Runs greedy requests on several engines: ``python data_parallel_main.py JOB.json RESULT.json``.

The job has ``llm`` (AsyncLLM's arguments), ``prompts`` of token ids and ``max_tokens``; the result the requests'
tokens, and by engine the number of accepted draft tokens.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path


async def answer(job: dict) -> dict:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.reader import get_metrics_snapshot

    settings = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "max_num_seqs": 8} | job["llm"]
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True)

    async def one(number: int, ids: list[int]) -> list[int]:
        async for output in engine.generate({"prompt_token_ids": ids}, sampling, str(number)):
            last = output
        return list(last.outputs[0].token_ids)

    tokens = await asyncio.gather(*(one(i, ids) for i, ids in enumerate(job["prompts"])))
    name = "vllm:spec_decode_num_accepted_tokens"
    accepted = {m.labels["engine"]: m.value for m in get_metrics_snapshot() if m.name == name}
    engine.shutdown()
    return {"tokens": tokens, "accepted": accepted}


def main() -> None:
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    result = asyncio.run(answer(json.loads(Path(sys.argv[1]).read_text())))
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()

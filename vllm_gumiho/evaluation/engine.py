"""One engine in a process of its own: ``python -m vllm_gumiho.evaluation.engine JOB.json RESULT.jsonl``.

An n-gram engine leaves a process in which no other drafter starts, and memory is given back only at the end of one.
The result has a line for the engine, one for each set at each temperature as it is finished, or one for an error.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_gumiho.evaluation.metrics import read_counts
from vllm_gumiho.evaluation.prompts import render

Emit = Callable[[dict[str, Any]], None]


def run_engine(job: dict[str, Any], emit: Emit) -> None:
    """Answer every set of the job at every temperature.

    job: ``llm`` (arguments of ``vllm.LLM``), ``sets`` (name to ``[{"id", "turns"}]``), ``temperatures``,
    ``max_tokens``, ``seed``.
    """
    import vllm
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import set_random_seed

    llm = vllm.LLM(**job["llm"])
    if current_platform.is_cpu():
        # Every method is judged with the right sampler, not only Gumiho, whose engines correct it themselves.
        from vllm_gumiho.cpu_sampling import correct_expansion

        correct_expansion()
    config = llm.llm_engine.vllm_config
    draft = getattr(config.speculative_config, "draft_model_config", None)
    emit(
        {
            "kind": "engine",
            "vllm": vllm.__version__,
            "device": current_platform.get_device_name(),
            "model_runner": "V2" if config.use_v2_model_runner else "V1",
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "draft_architecture": next(
                iter(getattr(getattr(draft, "hf_config", None), "architectures", None) or ()), None
            ),
        }
    )
    first = next(iter(job["sets"].values()))[:1]
    _answer(llm, first, vllm.SamplingParams(temperature=0, max_tokens=4))
    for temperature in job["temperatures"]:
        sampling = vllm.SamplingParams(temperature=temperature, max_tokens=job["max_tokens"])
        for name, prompts in job["sets"].items():
            # A set's draws do not depend on which sets came before it.
            set_random_seed(job["seed"])
            before = read_counts(llm.get_metrics())
            start = time.perf_counter()
            answers = _answer(llm, prompts, sampling)
            seconds = time.perf_counter() - start
            counts = read_counts(llm.get_metrics()) - before
            emit(
                {"kind": "set", "temperature": temperature, "set": name, "seconds": seconds, "counts": vars(counts)}
                | {"answers": answers}
            )
    llm.llm_engine.engine_core.shutdown()


def _answer(llm: Any, prompts: list[dict[str, Any]], sampling: Any) -> dict[str, list[list[int]]]:
    """Token ids of every answer by prompt id; the engine's own answers stand in the later turns' conversations."""
    tokenizer = llm.get_tokenizer()
    talks: dict[str, list[dict[str, str]]] = {prompt["id"]: [] for prompt in prompts}
    answers: dict[str, list[list[int]]] = {prompt["id"]: [] for prompt in prompts}
    for turn in range(max(len(prompt["turns"]) for prompt in prompts)):
        going = [prompt for prompt in prompts if turn < len(prompt["turns"])]
        for prompt in going:
            talks[prompt["id"]].append({"role": "user", "content": prompt["turns"][turn]})
        asked = [{"prompt_token_ids": render(tokenizer, talks[prompt["id"]])} for prompt in going]
        for prompt, out in zip(going, llm.generate(asked, sampling, use_tqdm=False), strict=True):
            answers[prompt["id"]].append(list(out.outputs[0].token_ids))
            talks[prompt["id"]].append({"role": "assistant", "content": out.outputs[0].text})
    return answers


def main() -> None:
    """Run the job of the first argument, write lines to the second; exit code 1 after an error."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    job = json.loads(Path(sys.argv[1]).read_text())
    with Path(sys.argv[2]).open("a") as lines:

        def emit(line: dict[str, Any]) -> None:
            lines.write(json.dumps(line) + "\n")
            lines.flush()

        try:
            run_engine(job, emit)
        except Exception as error:
            traceback.print_exc()
            emit({"kind": "error", "message": f"{type(error).__name__}: {error}"})
            raise SystemExit(1) from None


if __name__ == "__main__":
    main()

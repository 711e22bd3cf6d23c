"""Shows: a file of prompts answered offline by `LLM.generate`, with Gumiho, and what its drafts were worth.

    python examples/offline_batch.py --prompts examples/prompts.jsonl --answers out/answers.jsonl

Prompts are JSON lines of {"id", "turns"}; the first turn is asked.  The figures are vLLM's own counters.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
from vllm import LLM, SamplingParams

from vllm_gumiho.engines.smollm2 import smollm2_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, default=Path("examples/prompts.jsonl"))
    parser.add_argument("--answers", type=Path, default=Path("out/answers.jsonl"))
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--limit", type=int, help="Only the first so many prompts.")
    args = parser.parse_args()
    asked = [json.loads(line) for line in args.prompts.read_text().splitlines()][: args.limit]

    on_cpu = not torch.accelerator.is_available()
    llm = LLM(
        str(smollm2_folder()),
        speculative_config={"method": "gumiho"},
        max_model_len=1024,
        # In float32 the texts are the target's own token for token; eager spares a CPU a minute of compiling.
        dtype="float32" if on_cpu else "auto",
        enforce_eager=on_cpu,
        disable_log_stats=False,
    )
    tokenizer = llm.get_tokenizer()
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": one["turns"][0]}], add_generation_prompt=True, tokenize=False
        )
        for one in asked
    ]
    start = time.perf_counter()
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=args.max_tokens))
    seconds = time.perf_counter() - start

    args.answers.parent.mkdir(parents=True, exist_ok=True)
    with args.answers.open("w") as out:
        for one, output in zip(asked, outputs, strict=True):
            out.write(json.dumps({"id": one["id"], "answer": output.outputs[0].text}) + "\n")
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    counters = {metric.name.removeprefix("vllm:spec_decode_num_"): metric for metric in llm.get_metrics()}
    drafts = counters["drafts"].value
    accepted = counters["accepted_tokens_per_pos"].values
    print(f"{args.answers}: {len(outputs)} answers, {tokens} tokens, {tokens / seconds:.1f} tokens/s")
    print(f"acceptance length {1 + sum(accepted) / drafts:.2f} over {drafts} drafts")
    print("accepted up to position 1, 2, ...:", " ".join(f"{count / drafts:.2f}" for count in accepted))


# vLLM may start worker processes that import this file.
if __name__ == "__main__":
    main()

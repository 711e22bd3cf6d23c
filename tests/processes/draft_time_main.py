"""Time of a draft, engines alternating: ``--target FOLDER --prompts FOLDER --output FILE``.

One engine for each of ``--checkpoint`` and ``--weights``, named by the one that there are several of.  The drafter's
call is timed in model runner V1, whose CPU form waits for what it has asked for.  Tokens a second are those of the
whole engine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

ROUNDS, TOKENS, LONGEST = 4, 32, 400
LENGTHS, BATCHES = (7, 3), (1, 4, 8)


def start(job: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """An engine whose drafter's calls are timed."""
    from vllm_gumiho.engines.worker import start_engine

    llm, facts = start_engine(job)
    drafter = llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter
    propose, llm.spent = drafter.propose, []

    def timed(*args: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        found = propose(*args, **named)
        llm.spent.append(time.perf_counter() - begin)
        return found

    drafter.propose = timed
    return llm, facts


def generate(llm: Any, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    """Greedy texts, tokens a second, and the mean milliseconds of a draft."""
    from vllm import SamplingParams

    llm.spent.clear()
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": one} for one in prompts], sampling, use_tqdm=False)
    seconds = time.perf_counter() - begin
    texts = [list(output.outputs[0].token_ids) for output in outputs]
    return {
        "texts": texts,
        "tokens_per_s": sum(map(len, texts)) / seconds,
        "draft_ms": 1000 * statistics.mean(llm.spent),
    }


TASKS = {"generate": generate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--checkpoint", nargs="+", default=["gumiho"], help="NAME=FOLDER or FOLDER")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--weights", nargs="+", default=["bf16", "auto", "int8"])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    prompts = read(args.prompts, args.target)
    here = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    found: dict[str, Any] = {}
    for length in LENGTHS:
        with contextlib.ExitStack() as stack:
            engines = {
                name: stack.enter_context(engine(args, name, checkpoint, weights, length, here))
                for name, checkpoint, weights in kinds(args)
            }
            for one in engines.values():
                for batch in BATCHES:
                    one.ask("generate", prompts=prompts[:batch], max_tokens=8)
            for batch in BATCHES:
                found[f"K={length}, {batch} at once"] = compared(engines, prompts, batch)
                args.output.write_text(json.dumps(found, indent=1))


def read(folder: Path, target: str) -> list[list[int]]:
    """Token ids of four prompts of each set, in turn."""
    from transformers import AutoTokenizer

    tokenizer, found = AutoTokenizer.from_pretrained(target), []
    for place in range(4):
        for file in sorted(folder.glob("*.jsonl")):
            chat = [{"role": "user", "content": json.loads(file.read_text().split("\n")[place])["turns"][0]}]
            found.append(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)[-LONGEST:])
    return found


def kinds(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """Name, checkpoint and ``draft_weights`` of each engine."""
    found = []
    for one in args.checkpoint:
        name, _, folder = one.rpartition("=")
        for weights in args.weights:
            parts = [name or Path(folder).name] if len(args.checkpoint) > 1 else []
            parts += [weights] if len(args.weights) > 1 or not parts else []
            found.append((" ".join(parts), folder, weights))
    return found


def engine(args: argparse.Namespace, name: str, checkpoint: str, weights: str, length: int, path: str) -> Any:
    from vllm_gumiho.drafters import DRAFTERS
    from vllm_gumiho.drafters.checkpoints import open_checkpoint
    from vllm_gumiho.engines.process import Worker
    from vllm_gumiho.errors import CheckpointError

    speculative = {"model": checkpoint, "num_speculative_tokens": length}
    try:
        name_of = checkpoint if checkpoint in DRAFTERS else open_checkpoint(Path(checkpoint)).drafter.name
        speculative |= {"method": name_of, "draft_weights": weights}
    except CheckpointError:
        speculative["method"] = "eagle"  # vLLM's own
    llm = {
        "model": args.target,
        "dtype": args.dtype,
        "max_model_len": 2 * LONGEST,
        "max_num_seqs": max(BATCHES),
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "speculative_config": speculative,
    }
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": path}
    return Worker("draft_time_main", {"llm": llm}, name, environment=environment)


def compared(engines: dict[str, Any], prompts: list[list[int]], batch: int) -> dict[str, Any]:
    """Medians over rounds, in which every engine answers the same prompts, every other time in the other order."""
    rounds: dict[str, list[dict[str, Any]]] = {kind: [] for kind in engines}
    for number in range(ROUNDS):
        some = prompts[4 * number : 4 * number + batch]
        for kind in list(engines)[:: 1 if number % 2 == 0 else -1]:
            rounds[kind].append(engines[kind].ask("generate", prompts=some, max_tokens=TOKENS))
    texts = {json.dumps([one["texts"] for one in of]) for of in rounds.values()}
    assert len(texts) == 1, "texts differ"
    return {
        kind: {name: round(statistics.median(one[name] for one in of), 2) for name in ("draft_ms", "tokens_per_s")}
        for kind, of in rounds.items()
    }


if __name__ == "__main__":
    main()

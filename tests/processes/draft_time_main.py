"""Time of a draft, engines alternating: ``--target FOLDER --prompts FOLDER --output FILE``.

One engine for each choice of ``--checkpoint``, ``--weights`` and ``--per-request``, named by what there is several of,
and with ``--off`` one without speculation.  The drafter's call is timed in model runner V1, whose CPU form waits for
what it has asked for.  Tokens a second are those of the whole engine; sent and accepted are counted over all rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

ROUNDS, TOKENS, LONGEST = 4, 32, 400
MEDIANS, COUNTS = ("draft_ms", "tokens_per_s"), ("drafts", "sent", "accepted")
K = "num_speculative_tokens"


def start(job: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """An engine whose drafter's calls are timed."""
    from vllm_gumiho.engines.worker import start_engine

    llm, facts = start_engine(job)
    llm.spent = []
    if "speculative_config" not in job["llm"]:
        return llm, facts
    drafter = llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter
    propose = drafter.propose

    def timed(*args: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        found = propose(*args, **named)
        llm.spent.append(time.perf_counter() - begin)
        return found

    drafter.propose = timed
    return llm, facts


def generate(llm: Any, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    """Greedy texts, tokens a second, the mean milliseconds of a draft, and drafts and tokens sent and accepted."""
    from vllm import SamplingParams

    from vllm_gumiho.engines.counters import read_counts

    llm.spent.clear()
    before = read_counts(llm.get_metrics())
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": one} for one in prompts], sampling, use_tqdm=False)
    seconds = time.perf_counter() - begin
    texts = [list(output.outputs[0].token_ids) for output in outputs]
    counted = read_counts(llm.get_metrics()) - before
    return {
        "texts": texts,
        "tokens_per_s": sum(map(len, texts)) / seconds,
        "draft_ms": 1000 * statistics.mean(llm.spent or [0.0]),
        "drafts": counted.drafts,
        "sent": counted.draft_tokens,
        "accepted": counted.accepted_tokens,
    }


TASKS = {"generate": generate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--checkpoint", nargs="+", default=["gumiho"], help="NAME=FOLDER or FOLDER")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--weights", nargs="+", default=["bf16", "auto", "int8"])
    parser.add_argument("--per-request", nargs="+", default=["no"], choices=["no", "confident"])
    parser.add_argument("--off", action="store_true")
    parser.add_argument("--lengths", nargs="+", type=int, default=[7, 3], help="K")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 8], help="at most 8")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    prompts = read(args.prompts, args.target)
    here = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    found: dict[str, Any] = {}
    for length in args.lengths:
        with contextlib.ExitStack() as stack:
            engines = {
                name: stack.enter_context(engine(args, name, config and config | {K: length}, here))
                for name, config in kinds(args).items()
            }
            for one in engines.values():
                for batch in args.batches:
                    one.ask("generate", prompts=prompts[:batch], max_tokens=8)
            for batch in args.batches:
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


def kinds(args: argparse.Namespace) -> dict[str, dict[str, Any] | None]:
    """The speculative config of each engine but for K, None without speculation, by its name."""
    from vllm_gumiho.drafters import DRAFTERS
    from vllm_gumiho.drafters.checkpoints import open_checkpoint
    from vllm_gumiho.errors import CheckpointError

    found: dict[str, dict[str, Any] | None] = {"off": None} if args.off else {}
    for one, weights, by_request in itertools.product(args.checkpoint, args.weights, args.per_request):
        name, _, folder = one.rpartition("=")
        config: dict[str, Any] = {"model": folder}
        try:
            method = folder if folder in DRAFTERS else open_checkpoint(Path(folder)).drafter.name
            config |= {"method": method, "draft_weights": weights}
        except CheckpointError:
            config["method"] = "eagle"  # vLLM's own
        parts = [name or Path(folder).name] if len(args.checkpoint) > 1 else []
        parts += [weights] if len(args.weights) > 1 else []
        if by_request == "confident":
            config["num_speculative_tokens_per_request"] = by_request
            parts.append(by_request)
        found[" ".join(parts) or "on"] = config
    return found


def engine(args: argparse.Namespace, name: str, speculative: dict[str, Any] | None, path: str) -> Any:
    from vllm_gumiho.engines.process import Worker

    llm = {
        "model": args.target,
        "dtype": args.dtype,
        "max_model_len": 2 * LONGEST,
        "max_num_seqs": max(args.batches),
        "enforce_eager": True,
        "enable_prefix_caching": False,
        # Under it drafts keep their full length, and counts come late.
        "async_scheduling": False,
        "disable_log_stats": False,
    }
    if speculative is not None:
        llm["speculative_config"] = speculative
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
        kind: {name: round(statistics.median(one[name] for one in of), 2) for name in MEDIANS}
        | {name: sum(one[name] for one in of) for name in COUNTS}
        for kind, of in rounds.items()
    }


if __name__ == "__main__":
    main()

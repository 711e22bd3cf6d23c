"""Heads shared out among tensor-parallel ranks, against whole ones: equal, and how long each takes.

``python tests/processes/split_heads_main.py --hidden 576 --batches 1,8,32 --rounds 30``: one process a rank, over
vLLM's own collectives on the CPU.  Prints JSON: for every number of heads, count asked for and batch, the largest
difference of any rank and the median milliseconds of both.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--heads", default="5")
    parser.add_argument("--batches", default="1")
    parser.add_argument("--counts", default="5")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--port", type=int)
    args = parser.parse_args()
    if args.rank is not None:
        print(json.dumps(one_rank(args)))
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, *sys.argv[1:], "--port", str(port)]
    ranks = [
        subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(args.ranks)
    ]
    try:
        answers = [process.communicate(timeout=400)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    if any(process.returncode for process in ranks):
        raise SystemExit(f"ranks ended with {[process.returncode for process in ranks]}")
    found = [json.loads(answer.splitlines()[-1]) for answer in answers]
    print(
        json.dumps([cell | {"difference": max(f[i]["difference"] for f in found)} for i, cell in enumerate(found[0])])
    )


def one_rank(args: argparse.Namespace) -> list[dict]:
    os.environ["VLLM_DIST_IDENT"] = f"split-{args.port}"
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )

    from vllm_gumiho.drafters.gumiho.heads import ParallelHeads
    from vllm_gumiho.env import SPLIT_HEADS

    torch.set_num_threads(1)

    def heads(switch: str, count: int) -> ParallelHeads:
        os.environ[SPLIT_HEADS.name] = switch
        module = ParallelHeads(count, 2, args.hidden, torch.float32)
        for head in range(count):
            for stage in range(6):
                for kind in ("weight", "bias"):
                    generator = torch.Generator().manual_seed(head * 100 + stage * 10 + (kind == "bias"))
                    columns = (args.hidden * (2 if stage == 0 else 1),) if kind == "weight" else ()
                    whole = torch.randn(args.hidden, *columns, generator=generator) / args.hidden**0.5
                    place = module.destination(head, stage, kind)
                    if place is not None:
                        place.copy_(whole)
        return module

    def milliseconds(module: ParallelHeads, m: list, count: int) -> float:
        times = []
        for _ in range(args.rounds):
            torch.distributed.barrier()
            begin = time.perf_counter()
            module(m, count)
            times.append(1e3 * (time.perf_counter() - begin))
        return statistics.median(times)

    cells = []
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        init_distributed_environment(args.ranks, args.rank, f"tcp://127.0.0.1:{args.port}", args.rank, "gloo")
        initialize_model_parallel(args.ranks)
        for num_heads in map(int, args.heads.split(",")):
            whole, split = heads("0", num_heads), heads("1", num_heads)
            for count in (c for c in map(int, args.counts.split(",")) if c <= num_heads):
                for batch in map(int, args.batches.split(",")):
                    m = [torch.randn(batch, args.hidden, generator=torch.Generator().manual_seed(i)) for i in range(2)]
                    expected = whole(m, count)
                    cells.append(
                        {
                            "heads": num_heads,
                            "count": count,
                            "batch": batch,
                            "ranks": [whole.ranks, split.ranks],
                            "own": split.bias.shape[0],
                            "difference": (expected - split(m, count)).abs().max().item(),
                            "largest": expected.abs().max().item(),
                            "whole ms": milliseconds(whole, m, count),
                            "split ms": milliseconds(split, m, count),
                        }
                    )
        # A rank that leaves while another still reads from it aborts at exit.
        torch.distributed.barrier()
        destroy_model_parallel()
        destroy_distributed_environment()
    return cells


if __name__ == "__main__":
    main()

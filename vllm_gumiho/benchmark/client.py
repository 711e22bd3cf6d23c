"""``vllm bench serve`` several times over in one worker: importing vLLM takes as long as a small cell does."""

from __future__ import annotations

from typing import Any


def start(job: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The command's parser; it is imported while the server starts."""
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    return parser, {}


def bench_serve(parser: Any, argv: list[str]) -> None:
    """One run, by the function that the command itself calls."""
    from vllm.benchmarks.serve import main

    main(parser.parse_args(argv))


TASKS = {"bench serve": bench_serve}

"""Arguments of vLLM's own commands, parsed by its own parsers."""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
from typing import Any

from vllm_gumiho.errors import BenchError


def split(option: str, text: str) -> list[str]:
    """Words of a command line.  Raises: BenchError naming the option."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise BenchError(f"{option} {text!r}: not a command line ({error}); close its quotes") from error


def parse_engine_args(argv: list[str]) -> Any:
    """vLLM's ``EngineArgs`` for the arguments of ``vllm serve``, the target first.  Raises: SystemExit as argparse."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    return EngineArgs.from_cli_args(parser.parse_args(["--model", *argv]))


def check_engine_args(argv: list[str]) -> None:
    """Raises: BenchError with vLLM's own reason where it does not take them."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parse_engine_args(argv)
    except SystemExit as error:
        reason = (said.getvalue().strip().splitlines() or ["refused"])[-1]
        raise BenchError(f"--engine-args: vLLM does not take them: {reason}; see 'vllm serve --help'") from error


def parse_request_args(argv: list[str]) -> argparse.Namespace:
    """Arguments of ``vllm bench serve``, general lengths set for each dataset as that command does."""
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    args = parser.parse_args(argv)
    for name in list(vars(args)):
        if name.endswith("_output_len") and args.output_len is not None:
            setattr(args, name, args.output_len)
    if args.input_len is not None:
        args.random_input_len = args.input_len
    args.ignore_eos = args.ignore_eos or args.dataset_name == "random"
    return args

"""``vllm bench serve`` several times over in one process: ``python -m vllm_gumiho.benchmark.client``.

Importing vLLM takes as long as a small cell does.  A line of standard input is a JSON list, the arguments of one run;
the answer is a line ``{"error": null}`` or with a reason.  What the client prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Run what is asked until the input ends, by the function that the command itself calls."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as bench_serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    for line in sys.stdin:
        reason = None
        try:
            bench_serve(parser.parse_args(json.loads(line)))
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error}"
        print(json.dumps({"error": reason}), file=answers, flush=True)


if __name__ == "__main__":
    main()

"""Outputs with speculation off, kept in a report so that many drafters can be compared to one run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_gumiho.engines.prompts import Prompt
from vllm_gumiho.errors import EvalError

Answers = dict[str, list[list[int]]]


@dataclass(frozen=True)
class Identity:
    """What two runs must share for their greedy outputs to be comparable."""

    target: dict[str, str] | str
    dtype: str
    max_tokens: int
    all_turns: bool


def pack(prompts: list[Prompt], answers: Answers) -> dict[str, Any]:
    """Answers for a report: token ids as text, since lists would take a line a token."""
    return {
        prompt.id: {
            "prompt_sha256": prompt.digest,
            "tokens": [" ".join(map(str, turn)) for turn in answers[prompt.id]],
        }
        for prompt in prompts
    }


def load(file: Path, identity: Identity, sets: dict[str, list[Prompt]]) -> dict[str, Answers]:
    """Greedy outputs without speculation from a report, by set and prompt.

    Raises: EvalError when the file is no such report, is of another target or setting, or lacks a prompt.
    """
    try:
        report = json.loads(file.read_bytes())
        (run,) = [run for run in report["runs"] if run["method"] == "none" and run["temperature"] == 0]
        theirs = Identity(**report["identity"])
        outputs = {
            name: {
                i: (o["prompt_sha256"], [[int(t) for t in turn.split()] for turn in o["tokens"]]) for i, o in of.items()
            }
            for name, of in run["outputs"].items()
        }
    except OSError as error:
        raise EvalError(
            f"--baseline {file}: not readable ({error}); write it with --method none --output FILE"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EvalError(
            f"--baseline {file}: no report of a greedy run without speculation ({error!r}); write it with "
            "--method none --temperature 0 --output FILE"
        ) from error
    for name, ours in vars(identity).items():
        if getattr(theirs, name) != ours:
            raise EvalError(
                f"--baseline {file}: it was run with {name} {getattr(theirs, name)!r}, this run has {ours!r}; make a "
                "baseline of the same settings with --method none"
            )
    found: dict[str, Answers] = {}
    for name, prompts in sets.items():
        known = outputs.get(name, {})
        lacking = [p.id for p in prompts if known.get(p.id, ("", []))[0] != p.digest]
        if lacking:
            raise EvalError(
                f"--baseline {file}: it has no answers to these prompts of set {name}: {', '.join(lacking[:6])}"
                f"{f' and {len(lacking) - 6} more' if len(lacking) > 6 else ''}; make a baseline over the same prompts "
                "with --method none"
            )
        wrong = [p.id for p in prompts if len(known[p.id][1]) != len(p.turns)]
        if wrong:
            raise EvalError(f"--baseline {file}: its answers to {wrong[0]} are not one a turn; make it again")
        found[name] = {p.id: known[p.id][1] for p in prompts}
    return found

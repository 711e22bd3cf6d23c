"""How many tokens to draft: one number, or a schedule by batch size, held to what the checkpoint and vLLM can do.

vLLM takes ``num_speculative_tokens_per_batch_size = [[first, last, K], ...]``: inclusive ranges of batch sizes from 1,
each K going on to the next range, the last one above all.
"""

from __future__ import annotations

from typing import Any

from vllm_gumiho.drafters.checkpoints import Checkpoint
from vllm_gumiho.errors import CheckpointError

AUTO = "auto"
TOKENS, SCHEDULE = "num_speculative_tokens", "num_speculative_tokens_per_batch_size"


def draft_length(asked: Any, checkpoint: Checkpoint) -> int:
    """K for what a user wrote, all the checkpoint has for None.  Raises: CheckpointError with what fits."""
    most = checkpoint.sizes.max_draft_tokens
    if asked is None:
        return most
    if isinstance(asked, bool) or not isinstance(asked, int) or not 1 <= asked <= most:
        raise CheckpointError(
            f"{TOKENS}={asked!r} with {checkpoint.path}: it drafts {checkpoint.sizes.passes()}; give a whole number "
            f'from 1 to {most}, or "{AUTO}"'
        )
    return asked


def length_option(text: str) -> int | str:
    """A command's K: a whole number, whose range `draft_length` knows, or "auto".  Raises: typer.BadParameter."""
    if text.strip().lower() == AUTO:
        return AUTO
    try:
        return int(text)
    except ValueError:
        import typer  # of the command line alone: engines import this module

        raise typer.BadParameter(f'{text!r} is no K; give a whole number, or "{AUTO}"') from None


def schedule_problem(schedule: Any, most: int) -> str | None:
    """Why this is no schedule with K up to ``most``, None for one that is: vLLM's own rules, types, and the limit.

    vLLM looks at a schedule in the engine core only, takes what can be made a number, and cuts a K that is too large.
    """
    from vllm.v1.spec_decode.dynamic.utils import validate_and_normalize_dynamic_sd_schedule

    for row in schedule if isinstance(schedule, (list, tuple)) else ():
        if isinstance(row, (list, tuple)) and any(type(number) is not int for number in row):
            return f"at {row!r}, expected [first, last, K] of whole numbers"
    try:
        rows = validate_and_normalize_dynamic_sd_schedule(schedule)
    except (ValueError, TypeError) as error:
        return f"{error} Expected [first, last, K] with batch sizes from 1"
    wrong = next((row for row in rows if row[2] > most), None)
    return None if wrong is None else f"at {list(wrong)}, expected K from 0 to {TOKENS}={most}"


def check_schedule(schedule: Any, most: int) -> None:
    """Raises: CheckpointError for a schedule, None being none, that `schedule_problem` has a word on."""
    problem = None if schedule is None else schedule_problem(schedule, most)
    if problem is not None:
        raise CheckpointError(f"{SCHEDULE}={schedule!r}: {problem}")

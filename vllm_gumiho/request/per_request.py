"""``"num_speculative_tokens_per_request": "confident"``: drafts end where another token is not worth verifying."""

from __future__ import annotations

import math
from typing import Any

from vllm_gumiho.drafters import PER_REQUEST
from vllm_gumiho.errors import CheckpointError

__all__ = ["CONFIDENT", "PER_REQUEST", "per_request_option", "per_request_value", "row_cost"]

CONFIDENT = "confident"
# What one more row of the target's pass takes, as a share of a pass without any.  Measured on two CPU cores for a
# target of 135 M weights; on a GPU a pass reads weights until some 300 rows are under way.
ON_CPU, ON_GPU = 0.07, 1 / 300


def per_request_option(text: str) -> str:
    """A command's way to end drafts: "confident", or a number as it is written.  Raises: typer.BadParameter."""
    try:
        row_cost(value := per_request_value(text))
    except CheckpointError:
        import typer  # of the command line alone: engines import this module

        raise typer.BadParameter(
            f'{text!r} ends no draft; give "{CONFIDENT}", or what a row of a step costs, a share above 0'
        ) from None
    return str(value)


def per_request_value(text: str) -> str | float:
    """What the speculative config takes for a text of `per_request_option`."""
    try:
        return float(text)
    except ValueError:
        return text.strip().lower()


def row_cost(asked: Any) -> float | None:
    """What a user's value of the key means, None where it is left out.

    Raises: CheckpointError for anything but "confident" and a share above 0.
    """
    if asked is None:
        return None
    if asked == CONFIDENT:
        from vllm.platforms import current_platform

        return ON_CPU if current_platform.is_cpu() else ON_GPU
    if isinstance(asked, bool) or not isinstance(asked, (int, float)) or not 0 < asked < math.inf:
        raise CheckpointError(
            f'{PER_REQUEST} is {asked!r}, expected "{CONFIDENT}", or a number above 0: what one more row of a step '
            "costs, as a share of a step without any; or leave it out, for drafts of one length"
        )
    return float(asked)

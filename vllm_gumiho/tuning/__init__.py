"""How many tokens to draft: the paper's theory (`plan`), and a schedule measured on this machine (`tune`, "auto")."""

from __future__ import annotations


class TuningError(ValueError):
    """A plan or a measurement that cannot be made.  Names the input, the reason and the remedy."""


class StorageError(TuningError):
    """The folder of schedules cannot be written."""

"""Errors of data generation and training."""


class TrainingError(ValueError):
    """Base of errors that name an input of ``generate`` or ``train``."""


class DataError(TrainingError):
    """A data file that cannot be trained on; the message names the file and the line."""


class RecipeError(TrainingError):
    """A training setting that cannot be used; the message names it and what it may be."""

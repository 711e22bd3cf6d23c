"""Every error of this package.  A message names the input, the reason and the remedy."""

from __future__ import annotations


class GumihoError(ValueError):
    """Root of all; the ``vllm-gumiho`` command ends with its message and exit code 2."""


class HookError(GumihoError):
    """Gumiho was asked for, and this vLLM lacks something it needs."""


class CheckpointError(GumihoError):
    """A checkpoint, or a request for one, that cannot be used."""


class DraftModelError(GumihoError):
    """A draft model that cannot be built in this engine."""


class KernelChoiceError(GumihoError):
    """The switch of the kernels has no such value, or asks for kernels that failed their check."""


class DraftWeightsError(GumihoError):
    """Draft weights asked for in a form that there is not, or that a drafter does not take."""


class SplitHeadsError(GumihoError):
    """The switch that shares heads out among ranks has no such value."""


class PromptError(GumihoError):
    """A file or folder of prompts that cannot be read."""


class DataError(GumihoError):
    """Training data that cannot be trained on."""


class RecipeError(GumihoError):
    """A training setting that cannot be used."""


class EvalError(GumihoError):
    """A judgement that cannot be made."""


class BenchError(GumihoError):
    """A benchmark that cannot be run."""


class GpuCheckError(GumihoError):
    """A check of a GPU that cannot be made."""


class TuningError(GumihoError):
    """A plan or a measurement that cannot be made."""


class StorageError(TuningError):
    """The folder of schedules cannot be written."""


class EngineError(GumihoError):
    """An engine or a server in a process of its own did not start, failed, or took too long."""


class FigureError(GumihoError):
    """A picture that cannot be drawn or written."""


class OutputError(GumihoError):
    """A file or folder that cannot be written."""


class TargetError(GumihoError):
    """A target model that cannot be had or used."""

"""Benchmarks: no speculation, n-grams, EAGLE and Gumiho in turn, offline and against a server."""


class BenchError(ValueError):
    """A benchmark that cannot be run.  The message names the input, the reason and the remedy."""

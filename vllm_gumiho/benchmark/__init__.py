"""Benchmarks: no speculation, n-grams, EAGLE and our drafters in turn, offline and against a server."""

"""Gumiho's kernels, one folder per operation, imported as ``vllm_gumiho.kernels``."""

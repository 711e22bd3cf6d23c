"""Gumiho's kernels, one subpackage an operation; their source is the checkout's top folder ``kernels/``."""

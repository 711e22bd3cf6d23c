"""Gumiho's kernels, one subpackage an operation; their source is the checkout's top folder ``kernels/``."""

from pathlib import Path

# A checkout on PYTHONPATH that nobody installed: pyproject's mapping of the folders is not in force there.
_checkout = Path(__file__).parents[2] / "kernels"
if (_checkout / "parallel_heads").is_dir():
    __path__.append(str(_checkout))

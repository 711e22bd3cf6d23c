"""What a drafter starts from: random layers, the target's own, a checkpoint, or a linear fit in closed form.

The linear start: ``fc`` is the ridge regression of ``h[t+1]`` on ``(E[x[t+1]], h[t], 1)`` over the training answers,
and the layers' output projections are near zero, so that the untrained drafter is the best linear one.  Where the first
serial step reads several of the target's layers, what makes a feature of them is fitted from the same sums.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_gumiho.checkpoint.tensors import D2T
from vllm_gumiho.drafters.checkpoints import open_checkpoint
from vllm_gumiho.drafters.trainable_layers import SerialDrafter
from vllm_gumiho.errors import RecipeError
from vllm_gumiho.training.data import PackedRows
from vllm_gumiho.training.recipe import Recipe
from vllm_gumiho.training.target import FrozenTarget
from vllm_gumiho.training.unrolling import shift, valid_anchors

# Of each input's own sum of squares: an input's scale makes no difference.
RIDGE = 1e-3
# How much the feature made of several layers is to be the target's own where that makes no difference, of what ``fc``
# makes of a feature.
OWN_FEATURE = 1e-3
# Of the layers' output projections under a linear start; `init_weights` gives them ten times that.
OUTPUT_STD = 0.002


class RidgeRegression:
    """Multi-output ridge regression whose normal equations are summed as data streams by.

    Products in float32 of what one `add` is given, sums in float64: ``X^T X`` ``[I, I]``, ``X^T Y`` ``[I, O]``.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device):
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.xy = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)
        self.rows = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """x ``[n, I]``, y ``[n, O]``."""
        x, y = x.float(), y.float()
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.rows += x.shape[0]

    def solve(self) -> Tensor:
        """``[I, O]``, float64: see `ridge_solution`."""
        return ridge_solution(self.xx, self.xy)


def ridge_solution(xx: Tensor, xy: Tensor) -> Tensor:
    """``[I, O]``: the least ``|Y - X W|^2 + RIDGE * sum_i xx[i, i] |W[i]|^2``, by ``X^T X`` and ``X^T Y``."""
    diagonal = xx.diagonal()
    # An input that is always zero has a coefficient of zero.
    scale = diagonal.sqrt().where(diagonal > 0, 1.0)
    scaled = xx / scale[:, None] / scale
    scaled.diagonal().add_(RIDGE)
    return torch.linalg.solve(scaled, xy / scale[:, None]) / scale[:, None]


def _rows_at_once(device: torch.device) -> int:
    """A GPU makes the features of many rows in about the time of one row's."""
    return 1 if device.type == "cpu" else 16


@torch.no_grad()
def _summed(
    drafter: SerialDrafter,
    rows: PackedRows,
    embed: Tensor,
    features_of: Callable[[dict[str, Tensor]], Tensor],
    most: int,
) -> RidgeRegression:
    """``h[t+1]`` on ``(E[x[t+1]], h[t], 1)`` and, where the drafter reads layers, their normalised states after that.

    The 1 is left out where ``fc`` has no bias.
    """
    width, bias = embed.shape[1], drafter.config.fc_bias
    states = len(drafter.config.target_layers) * width
    fit = RidgeRegression(2 * width + int(bias) + states, width, embed.device)
    at_once = _rows_at_once(embed.device)
    for first in range(0, len(rows), at_once):
        some = [rows[i] for i in range(first, min(first + at_once, len(rows)))]
        batch = {name: torch.stack([row[name] for row in some]).to(embed.device) for name in some[0]}
        at = valid_anchors(batch["segments"], batch["answer"], 1).flatten().nonzero()[:, 0]
        held = features_of(batch).flatten(0, 1)
        h = held[:, :width]
        x = [F.embedding(shift(batch["input_ids"], 1).flatten()[at], embed).float(), h[at].float()]
        if bias:
            x.append(torch.ones(len(at), 1, device=embed.device))
        if states:
            x.append(drafter.normed(held[at]).float())
        with torch.autocast(embed.device.type, enabled=False):
            fit.add(torch.cat(x, dim=1), h[at + 1])
        if fit.rows >= most:
            break
    return fit


@torch.no_grad()
def start_linear(
    drafter: SerialDrafter,
    rows: PackedRows,
    embed: Tensor,
    features_of: Callable[[dict[str, Tensor]], Tensor],
    most: int,
) -> int:
    """Give an initialised drafter the linear start; returns how many answer positions the fit has seen."""
    width, bias = embed.shape[1], drafter.config.fc_bias
    fit = _summed(drafter, rows, embed, features_of, most)
    if drafter.config.target_layers:
        plain, combined = _with_layers(fit, width)
        drafter.combine.weight.copy_(combined[1:].T)
        drafter.combine.bias.copy_(combined[0])
    else:
        plain = fit.solve()
    drafter.fc.weight.copy_(plain[: 2 * width].T)
    if bias:
        drafter.fc.bias.copy_(plain[-1])
    for layer in drafter.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.normal_(projection.weight, std=OUTPUT_STD)
    return fit.rows


def _with_layers(fit: RidgeRegression, width: int) -> tuple[Tensor, Tensor]:
    """``fc`` ``[2 H + 1, H]``, and from ``(1, states)`` to the feature that it makes the best ``h[t+1]`` of.

    One regression of two kinds of rows, ``(E, h, 1)`` of later steps and ``(E, 1, states)`` of the first, in which the
    token's part is the same.  What it makes of the states is taken back through ``fc``'s part of the feature
    ``[1 + m * H, H]``; where that does not look, the feature stays the target's own.
    """
    token, feature, later = slice(width), slice(width, 2 * width), slice(2 * width + 1)
    # The 1 is of both kinds of rows.
    first = slice(2 * width, None)
    xx = torch.block_diag(fit.xx[later, later], fit.xx[first, first])
    xy = torch.cat((fit.xy[later], fit.xy[first]))
    xx[token, token] *= 2
    xy[token] *= 2
    xx[token, later.stop :] = fit.xx[token, first]
    xx[later.stop :, token] = fit.xx[first, token]
    found = ridge_solution(xx, xy)
    plain, best = found[later], found[later.stop :]
    own = ridge_solution(fit.xx[first, first], fit.xx[first, feature])
    # What the states give beyond fc's own bias.
    best[0] -= plain[-1]
    through = plain[feature]
    gram = through @ through.T
    weight = OWN_FEATURE * gram.diagonal().mean()
    back = gram + weight * torch.eye(width, dtype=gram.dtype, device=gram.device)
    return plain, torch.linalg.solve(back, (best @ through.T + weight * own).T).T


def start(drafter: SerialDrafter, recipe: Recipe, target: FrozenTarget, rows: PackedRows) -> int:
    """Give a new drafter the weights that the run starts from; returns the answer positions of a fit, 0 without one.

    rows: the training rows.  Raises: RecipeError for a checkpoint of another shape.
    """
    device = target.embed.device

    def features_of(batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
            return target.features(batch)

    probe = features_of({name: value[None].to(device) for name, value in rows[0].items()})
    width = target.embed.shape[1]
    scale = probe[(rows[0]["segments"] > 0)[None].to(device), :width].float().square().mean().sqrt()
    drafter.init_weights(float(scale), float(target.embed.float().square().mean().sqrt()))
    if recipe.start == "target":
        layers = getattr(target.model.base_model, "layers", ())
        try:
            drafter.init_from_target(layers)
        except (KeyError, RuntimeError, ValueError) as error:
            raise RecipeError(
                f"init 'target': layers of {type(target.model).__name__} are not Llama's ({type(error).__name__}: "
                f"{str(error).partition(chr(10))[0]}); choose linear or random"
            ) from error
    if recipe.init_from:
        tensors = dict(open_checkpoint(recipe.init_from).tensors())
        tensors.pop(D2T, None)
        try:
            drafter.load_state_dict(tensors)
        except RuntimeError as error:
            raise RecipeError(
                f"init_from {recipe.init_from}: another shape than this run's drafter: {error}"
            ) from error
        return 0
    if recipe.start == "linear":
        return start_linear(drafter, rows, target.embed, features_of, recipe.fit_tokens)
    return 0

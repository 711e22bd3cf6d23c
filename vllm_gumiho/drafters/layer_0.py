"""State 0 of a target, its embeddings, beside operators that write in place.

vLLM hands out the tensor itself, which the target's first layer takes for its residual; a GPU's fused norms and
all-reduces write sums of later layers into that.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from vllm_gumiho.drafters.target_view import language_model
from vllm_gumiho.errors import DraftModelError


@torch.library.custom_op("vllm_gumiho::own_copy", mutates_args=())
def own_copy(x: Tensor) -> Tensor:
    """A copy that stays one: vLLM's and torch's compilers take out a plain clone that only later graphs write to."""
    return x.clone()


@own_copy.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def keep_layer_0(target: nn.Module, name: str) -> None:
    """Let the target's first layer work on a copy of the embeddings, so that state 0 stays what it was.

    target: a loaded one.  name: of the target.  Raises: DraftModelError where its first layer cannot be told.
    """
    layer = first_layer(target)
    # Of the class: weight offloading gives a layer another one.
    at = [] if layer is None else list(inspect.signature(type(layer).forward).parameters)[1:]
    if layer is None or "hidden_states" not in at:
        raise DraftModelError(
            f"target {name}: the draft reads states of layer 0, and the first layer of vLLM's class "
            f"{type(target).__name__} cannot be told; use a checkpoint that reads later layers"
        )
    place = at.index("hidden_states")

    def with_a_copy(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": own_copy(kwargs["hidden_states"])}
        return (*args[:place], own_copy(args[place]), *args[place + 1 :]), kwargs

    layer.register_forward_pre_hook(with_a_copy, with_kwargs=True)


def first_layer(target: nn.Module) -> nn.Module | None:
    """Of the module that hands out states."""
    for module in language_model(target).modules():
        if hasattr(module, "aux_hidden_state_layers") and isinstance(getattr(module, "layers", None), nn.ModuleList):
            return module.layers[0]
    return None

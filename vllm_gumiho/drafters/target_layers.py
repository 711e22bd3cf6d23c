"""States of the target's inner layers: who reads them, and whether a target gives them.

vLLM gives them to what it serves as its method ``eagle3``: state I is what goes into the target's layer I; of a target
of L layers, state L is what comes out of the last one, before the final norm.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_gumiho.errors import CheckpointError, DraftModelError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from vllm.config import ModelConfig

# Classes of vLLM 0.32 that say they give states, and whose inner model does not.
_GIVE_NONE = ("MiMoForCausalLM",)
# config.json: whose states vLLM is to give, in this order.
LAYERS_KEY = "eagle_aux_hidden_state_layer_ids"
# What is made of states and alive at a time, by kind of device: a long prefill goes through in chunks.  On a GPU a
# chunk costs a launch per operation and a reading of the weights, which 64 MiB (30 tokens at Llama 3 8B's shape, with
# keys and values of all layers) would not be worth.
CHUNK_BYTES = {"cpu": 64 << 20}
CHUNK_BYTES_ELSEWHERE = 512 << 20


def chunk_bytes(device: torch.device) -> int:
    """Bytes of what is made of states that may be alive at a time."""
    return CHUNK_BYTES.get(device.type, CHUNK_BYTES_ELSEWHERE)


def gives_states(kind: type) -> bool:
    """Whether vLLM's class of a target gives states of its inner layers."""
    from vllm.model_executor.models.interfaces import supports_eagle3

    return bool(supports_eagle3(kind)) and kind.__name__ not in _GIVE_NONE


def check_layers(where: Path, layers: Collection[int], target: ModelConfig) -> str:
    """Name of the target's vLLM class, which gives the states of these layers.

    where: the checkpoint that reads them.  Raises: CheckpointError where the target has fewer layers, or gives none.
    """
    from vllm.model_executor.model_loader.utils import get_model_cls

    count, kind = target.get_total_num_hidden_layers(), get_model_cls(target)
    beyond = [str(layer) for layer in layers if layer > count]
    if beyond:
        raise CheckpointError(
            f"{where}: reads states of layer {', '.join(beyond)}, and target {target.model} has {count} layers; "
            "use a checkpoint trained for this target"
        )
    name = str(kind.__name__)
    if not gives_states(kind):
        raise CheckpointError(
            f"{where}: reads states of inner layers, which vLLM's class {name} of target {target.model} does not give; "
            "use a drafter that reads the last state alone, such as a Gumiho checkpoint without state_norms"
        )
    if 0 in layers and name.startswith("Transformers"):
        raise CheckpointError(
            f"{where}: reads states of layer 0, the embeddings, which vLLM's class {name} of target {target.model} "
            "does not give; use a checkpoint that reads later layers"
        )
    return name


def keep_layer_0(target: nn.Module, name: str) -> None:
    """Let the target's first layer work on a copy of the embeddings, so that state 0 stays what it was.

    vLLM hands out the tensor itself, which the first layer takes for its residual; a GPU's fused norms and all-reduces
    write sums of later layers into that.  target: a loaded one.  name: of the target.  Raises: DraftModelError where
    its first layer cannot be told.
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
            return args, kwargs | {"hidden_states": kwargs["hidden_states"].clone()}
        return (*args[:place], args[place].clone(), *args[place + 1 :]), kwargs

    layer.register_forward_pre_hook(with_a_copy, with_kwargs=True)


def first_layer(target: nn.Module) -> nn.Module | None:
    """Of the module that hands out states."""
    from vllm_gumiho.drafters.target_view import language_model

    for module in language_model(target).modules():
        if hasattr(module, "aux_hidden_state_layers") and hasattr(module, "layers"):
            layer: nn.Module = module.layers[0]
            return layer
    return None

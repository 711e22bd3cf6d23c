"""States of the target's inner layers: who reads them, and whether a target gives them.

vLLM gives them to what it serves as its method ``eagle3``: state I is what goes into the target's layer I; of a target
of L layers, state L is what comes out of the last one, before the final norm.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_gumiho.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig

# Classes of vLLM 0.32 that say they give states, and whose inner model does not.
_GIVE_NONE = ("MiMoForCausalLM",)
# How classes are named whose state 0 cannot be had; DeepSeek's add a residual to it, which there is none of yet.
_GIVE_NO_EMBEDDINGS = ("Transformers", "Deepseek")
# config.json: whose states vLLM is to give, in this order.
LAYERS_KEY = "eagle_aux_hidden_state_layer_ids"


def chunk_bytes(device: torch.device) -> int:
    """Bytes of what is made of states that may be alive at a time: a long prefill goes through in chunks.

    On a GPU a chunk costs a launch per operation and a reading of the weights, which 64 MiB (30 tokens at Llama 3 8B's
    shape, with keys and values of all layers) would not be worth.
    """
    return (64 if device.type == "cpu" else 512) << 20


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
    if 0 in layers and any(base.__name__.startswith(_GIVE_NO_EMBEDDINGS) for base in kind.__mro__):
        raise CheckpointError(
            f"{where}: reads states of layer 0, the embeddings, which vLLM's class {name} of target {target.model} "
            "does not give; use a checkpoint that reads later layers"
        )
    return name

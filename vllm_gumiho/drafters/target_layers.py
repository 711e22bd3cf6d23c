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
    from vllm.config import ModelConfig

# Classes of vLLM 0.32 that say they give states, and whose inner model does not.
_GIVE_NONE = ("MiMoForCausalLM",)
# config.json: whose states vLLM is to give, in this order.
LAYERS_KEY = "eagle_aux_hidden_state_layer_ids"
# What is made of states and alive at a time: a long prefill goes through in chunks.
CHUNK_BYTES = 64 << 20


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

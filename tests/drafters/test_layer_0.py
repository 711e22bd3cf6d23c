"""State 0 stays what it was while the target's layers write in place, eager and through vLLM's compiler."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from vllm_gumiho.drafters.layer_0 import first_layer, keep_layer_0
from vllm_gumiho.errors import DraftModelError


class Summed(nn.Module):
    """As layers of targets are called, and as a GPU's are: what it is given becomes its residual, which it writes."""

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        return hidden_states.add_(positions[:, None])


def target(layers: object) -> nn.Module:
    inner = nn.Module()
    inner.aux_hidden_state_layers, inner.layers = (0,), layers
    return inner


def step_of(layer: nn.Module, named: bool = False):
    def step(positions: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        state = embedded * 1
        given = {"hidden_states": state} if named else {}
        return state, layer(positions, *([] if named else [state]), **given)

    return step


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_state_0_stays_what_it_was(named, compiled):
    layer = Summed()
    keep_layer_0(target(nn.ModuleList([layer])), "TARGET")
    step = step_of(layer, named)
    positions, embedded = torch.arange(3), torch.ones(3, 4)
    state, out = (torch.compile(step, backend="eager", fullgraph=True) if compiled else step)(positions, embedded)
    assert torch.equal(state, embedded)
    assert torch.equal(out, embedded + positions[:, None])


class Passed(nn.Module):
    """A layer's part before its first attention: a later graph writes what it gives out."""

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        return hidden_states


@pytest.mark.parametrize("kept", [True, False])
def test_vllms_compiler_leaves_the_copy(kept):
    """It takes out a plain clone that is only read in its graph: state and residual would be one tensor again."""
    from vllm.compilation.passes.inductor_pass import get_pass_context, pass_context
    from vllm.compilation.passes.ir.clone_elimination import UnsafeCloneEliminationPass
    from vllm.config import VllmConfig
    from vllm.config.utils import Range

    layer = Passed()
    if kept:
        keep_layer_0(target(nn.ModuleList([layer])), "TARGET")
    else:
        layer.register_forward_pre_hook(lambda _, args: (args[0], args[1].clone()))
    graph = make_fx(step_of(layer))(torch.arange(3), torch.ones(3, 4)).graph
    with pass_context(Range(3, 3)):
        get_pass_context().donated_input_ids = set()
        UnsafeCloneEliminationPass(VllmConfig())(graph)
    (output,) = graph.output_node().args
    assert (output[0] is not output[1]) == kept


def test_the_layers_are_found_within_a_decoder_of_its_own():
    layer, outer = Summed(), target(nn.Identity())
    outer.layers.decoder = target(nn.ModuleList([layer]))
    assert first_layer(outer) is layer
    assert first_layer(SimpleNamespace(get_language_model=lambda: outer)) is layer


def test_a_target_without_a_first_layer_is_refused():
    with pytest.raises(DraftModelError, match="target TARGET: the draft reads states of layer 0, and the first layer"):
        keep_layer_0(nn.Linear(2, 2), "TARGET")

"""The draft pass as vLLM's compiler takes it: traced, then through the pass that lets norms write their inputs."""

from __future__ import annotations

from typing import Any

import torch


def functionalized(llm: Any, tokens: int = 5) -> dict[str, Any]:
    """What vLLM's own pass found in the traced draft model.

    ``operators``: how many of which it may run in place; ``donated``: inputs of the graph that these may write.
    Raises: ValueError, by vLLM, where a tensor that an operator may write is read again after it.
    """
    from vllm import ir
    from vllm.compilation.passes.inductor_pass import get_pass_context, pass_context
    from vllm.compilation.passes.ir.inplace_functionalization import VllmIRInplaceFunctionalizationPass
    from vllm.config.utils import Range
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.layernorm import RMSNorm

    config = llm.llm_engine.vllm_config
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    model = (getattr(runner, "drafter", None) or runner.speculator).model.model
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    ids, positions = torch.arange(tokens), torch.arange(tokens)
    hidden = torch.randn(tokens, model.config.hidden_size, dtype=config.model_config.dtype)
    operators = RMSNorm.forward_native
    assert operators.__module__ == "vllm.model_executor.layers.layernorm", "the graph is to have vLLM's own operators"
    torch._dynamo.reset()
    # A CPU's engine has these operators computed where they are called; a compiled one has them in its graph.
    wrapped = ir.enable_torch_wrap(True)
    with torch.inference_mode(), wrapped, set_forward_context(None, config, num_tokens=tokens):
        torch.compile(lambda *given: type(model).forward(model, *given), backend=keep, fullgraph=True)(
            ids, positions, hidden
        )
    functionalize = VllmIRInplaceFunctionalizationPass(config)
    with pass_context(Range(tokens, tokens)):
        for graph in graphs:
            functionalize(graph.graph)
        donated = sorted(get_pass_context().donated_input_ids)
    names = [node.name for graph in graphs for node in graph.graph.nodes]
    return {"operators": dict(functionalize.functionalized_ops), "donated": [names[i] for i in donated]}

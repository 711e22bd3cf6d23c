"""A captured function as a CUDA graph keeps it: its tensor operations, on the memory they had, and no Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

# What hands a value to Python; a stream that is captured has none to hand over.
READS = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default")


class Graph(TorchDispatchMode):
    """Records operations, Triton's launches included, to run them again on the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Callable[[], None]] = []
        self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if str(func) in READS:
            raise RuntimeError(f"{func}: a CUDA graph cannot capture a value that Python reads")
        out = func(*args, **(kwargs or {}))
        # An attention operator finds its layer and metadata here.
        context = _context()
        self.launches.append(lambda: self._again(func, args, kwargs or {}, out, context))
        return out

    def _again(self, func: Any, args: tuple, kwargs: dict, out: Any, context: Any) -> None:
        from vllm.forward_context import override_forward_context

        with override_forward_context(context):
            found = func(*args, **kwargs)
        for old, new in zip(tree_flatten(out)[0], tree_flatten(found)[0], strict=True):
            # Views, and results written to an argument, have their memory already.
            if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                old.copy_(new)

    def __enter__(self) -> Graph:
        from triton.runtime.interpreter import GridExecutor

        self._executor, launch = GridExecutor.__call__, GridExecutor.__call__

        def recording(executor: Any, *args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                launch(executor, *args, **kwargs)
            self.kernels += 1
            self.launches.append(lambda: launch(executor, *args, **kwargs))

        GridExecutor.__call__ = recording
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        from triton.runtime.interpreter import GridExecutor

        GridExecutor.__call__ = self._executor
        return super().__exit__(*error)

    def replay(self) -> None:
        for launch in self.launches:
            launch()


def _context() -> Any:
    from vllm.forward_context import get_forward_context, is_forward_context_available

    return get_forward_context() if is_forward_context_available() else None


def compare(
    call: Callable[[], Any], changed: list[Tensor], held: list[Tensor], outputs: Callable[[], list[Tensor]]
) -> dict:
    """Whether a capture of ``call`` replays to what Python computes from other inputs.

    changed: inputs that get other values, rows swapped.  held: all other tensors that the call reads and writes.
    """
    before = [tensor.clone() for tensor in held]

    def restore() -> None:
        for tensor, value in zip(held, before, strict=True):
            tensor.copy_(value)

    graph = Graph()
    with graph:
        call()
    captured = [tensor.clone() for tensor in outputs()]
    inputs = [tensor.clone() for tensor in changed]
    found = {}
    for name, run in (("live", call), ("replayed", graph.replay)):
        restore()
        for tensor, value in zip(changed, inputs, strict=True):
            tensor.copy_(value.flip(0))
        run()
        found[name] = [tensor.clone() for tensor in outputs()]
    restore()
    for tensor, value in zip(changed, inputs, strict=True):
        tensor.copy_(value)
    call()

    def same(a: list[Tensor], b: list[Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    return {
        "operations": len(graph.launches),
        "kernels": graph.kernels,
        "replayed as live": same(found["live"], found["replayed"]),
        "inputs matter": not same(captured, found["live"]),
    }


def watch(llm: Any) -> list[dict]:
    """A list that gets a comparison of the engine's next draft of two requests or more."""
    runner, found = llm.llm_engine.model_executor.driver_worker.worker.model_runner, []
    speculator = getattr(runner, "speculator", None)
    if speculator is not None:
        _watch_speculator(speculator, found)
    else:
        _watch_model(runner.drafter, found)
    return found


def _watch_speculator(speculator: Any, found: list[dict]) -> None:
    """Runner V2 captures `_generate_draft`, or what calls it: serial step, heads and sampling."""
    generate = speculator._generate_draft

    def watched(num_reqs: int, *args: Any, **kwargs: Any) -> None:
        if found or num_reqs < 2:
            generate(num_reqs, *args, **kwargs)
            return
        buffers = speculator.input_buffers
        changed = [buffers.input_ids[:num_reqs], speculator.hidden_states[:num_reqs]]
        own = [value for value in (*vars(buffers).values(), *vars(speculator).values()) if isinstance(value, Tensor)]

        def call() -> None:
            generate(num_reqs, *args, **kwargs)

        found.append(compare(call, changed, own, lambda: [speculator.draft_tokens[:num_reqs]]))

    speculator._generate_draft = watched


def _watch_model(drafter: Any, found: list[dict]) -> None:
    """Runner V1 captures the draft model's forward pass (whole, with breakable graphs); heads read what it leaves."""
    model, forward = drafter.model, drafter.model.forward

    def watched(**inputs: Any) -> Any:
        rows = len(inputs["input_ids"])
        if found or rows < 2:
            return forward(**inputs)
        kept: dict[str, Any] = {}

        def call() -> None:
            kept["out"] = forward(**inputs)

        def outputs() -> list[Tensor]:
            return [kept["out"][0], model.last_fused(rows)]

        changed = [inputs["input_ids"], inputs["hidden_states"]]
        found.append(compare(call, changed, [model._fused] if model.copies_fused else [], outputs))
        return kept["out"]

    model.forward = watched

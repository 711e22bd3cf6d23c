"""The table of vLLM internals names what the package uses of vLLM, and no more."""

import ast
import functools
import importlib
import importlib.util
import re

import pytest
from places import ROOT

from vllm_gumiho.plugin.hooks import MEASURING, SERVING

pytestmark = pytest.mark.next_release

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
HOOKS = SERVING + MEASURING
TOOLS = {"benchmark", "demo", "engines", "evaluation", "training", "tuning"}
# What vLLM documents for everyone, and modules, of which the table has what is used.
PUBLIC = {("vllm", "LLM"), ("vllm", "SamplingParams"), ("vllm.sampling_params", "RequestOutputKind")}
# Named nowhere: an LM head or a verification has one, which is read; a runner's class is a subclass, and has a manager
# of its graphs.
HELD = {
    ("vllm.v1.worker.gpu.cudagraph_utils", "CudaGraphManager"),
    ("vllm.model_executor.layers.vocab_parallel_embedding", "VocabParallelEmbeddingShardIndices"),
    ("vllm.v1.worker.gpu.spec_decode.speculator", "DraftModelSpeculator"),
    ("vllm.v1.attention.backends.flash_attn", "FlashAttentionImpl"),
    ("vllm.v1.worker.gpu_input_batch", "InputBatch"),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"),
    ("vllm.v1.worker.gpu.sample.sampler", "Sampler"),
    # Of a target whose keys and values are made again, and of its batch.
    ("vllm.model_executor.models.llama", "LlamaAttention"),
    ("vllm.model_executor.models.qwen2", "Qwen2Attention"),
    ("vllm.model_executor.models.qwen3", "Qwen3Attention"),
    ("vllm.v1.worker.gpu.input_batch", "InputBatch"),
    # Of a target whose state 0 is read.
    ("vllm.model_executor.models.interfaces", "EagleModelMixin"),
    ("vllm.model_executor.models.llama", "LlamaDecoderLayer"),
}
# An alias of a module of Triton's.
TRITONS = {("vllm.triton_utils", "tldevice")}


@functools.cache
def used_names() -> dict[tuple[str, str], set[str]]:
    """What the package names in vLLM: module and name as imported or written "module:name", to the rooms that do."""
    found: dict[tuple[str, str], set[str]] = {}
    for file in sorted((ROOT / "vllm_gumiho").rglob("*.py")):
        room, names = file.relative_to(ROOT).parts[1], []
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                names += [(node.module, alias.name) for alias in node.names]
            elif isinstance(node, ast.Constant) and file.name != "hooks.py":
                written = re.fullmatch(r"(vllm(?:\.\w+)+)(?::(\w+))?", str(node.value))
                names += [(written[1], written[2] or "")] if written and written[1] != "vllm.vllm_gumiho" else []
        for name in names:
            found.setdefault(name, set()).add(room)
    return found


def origin(module: str, name: str) -> tuple[str, str | None]:
    """Where a name is defined; no name for a module, of which something else is used."""
    if not name:
        return module, None
    if importlib.util.find_spec(module).submodule_search_locations and importlib.util.find_spec(f"{module}.{name}"):
        return f"{module}.{name}", None
    if name == "current_platform":
        return module, "__getattr__"
    thing = getattr(importlib.import_module(module), name)
    return getattr(thing, "__module__", module), getattr(thing, "__qualname__", name).split(".")[0]


@needs_vllm
@pytest.mark.parametrize(("module", "name"), sorted(used_names()))
def test_the_table_has_what_the_package_uses(module, name):
    if (module, name) in PUBLIC | TRITONS:
        return
    place, rooms = origin(module, name), used_names()[module, name]
    table = HOOKS if rooms <= TOOLS else SERVING
    known = {(hook.module, hook.name.split(".")[0] if place[1] else None) for hook in table}
    assert place in known, f"used by {rooms}"


@needs_vllm
def test_gumiho_is_refused_for_nothing_that_only_tools_use():
    """Each entry that serving calls is used by a room that serves, and no such room uses an entry of the tools'."""
    serving = {origin(*name) for name, rooms in used_names().items() if not rooms <= TOOLS}
    called = {(hook.module, hook.name.split(".")[0]) for hook in SERVING if hook.use == "called"} - HELD
    modules = {module for module, name in serving if name is None}
    assert {hook for hook in called if hook not in serving and hook[0] not in modules} == set()
    assert {(hook.module, hook.name.split(".")[0]) for hook in MEASURING} & serving == set()


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_the_table_has_the_attributes_that_a_runner_takes_from_vllms_class(runner):
    tree = ast.parse((ROOT / "vllm_gumiho" / "runners" / f"{runner}.py").read_text())
    ours = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    attributes = [node for one in ours for node in ast.walk(one) if isinstance(node, ast.Attribute)]
    functions = [node for one in ours for node in one.body if isinstance(node, ast.FunctionDef)]
    own = {node.name for node in functions}
    inits = [node for function in functions if function.name == "__init__" for node in ast.walk(function)]
    own |= {node.attr for node in inits if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    own |= {node.target.id for one in ours for node in one.body if isinstance(node, ast.AnnAssign)}
    taken = {node.attr for node in attributes if ast.unparse(node.value) == "self"} - own - {"model"}  # by load_model
    overridden = {node.attr for node in attributes if ast.unparse(node.value) == "super()"} - {"__init__"}
    classes = {"v1": {"SpecDecodeBaseProposer"}, "v2": {"DraftModelSpeculator", "TargetDependentARSpeculator"}}[runner]
    known = {need for hook in SERVING if hook.name in classes for need in hook.needs}
    known |= {hook.name.split(".")[1] for hook in SERVING if hook.name.split(".")[0] in classes and "." in hook.name}
    assert len(taken) > 4
    assert taken | overridden <= known

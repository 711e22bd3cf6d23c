"""Which room may import which; no circles; the map in the docs names every room."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from places import ROOT

PACKAGE = "vllm_gumiho"
# A room may import itself and what is named here; imports inside functions count, and places as "module:name".
MAY_IMPORT = {
    "version": "",
    "errors": "",
    "env": "",
    "options": "",
    "files": "errors",
    "figures": "errors files",
    "kernels": "",
    "checkpoint": "errors files",
    "drafters": "checkpoint env errors files kernels runners",
    "runners": "drafters errors",
    "engines": "env errors files",
    "request": "drafters env errors files",
    "tuning": "engines env errors figures files options request",
    "plugin": "drafters engines env errors files request tuning",
    "training": "checkpoint drafters engines env errors figures files options version",
    "evaluation": "checkpoint drafters engines env errors figures files options plugin request",
    "benchmark": "drafters engines env errors evaluation figures files options request",
    "demo": "drafters engines files options request",
    "gpu_check": "benchmark drafters engines env errors files kernels",
    "cli": "benchmark demo drafters engines env errors evaluation gpu_check options plugin request training tuning",
    "__init__": "plugin version",
}
# A drafter names its runners for vLLM to make, and a runner knows its drafter: the one pair that knows each other.
BY_NAME_ONLY = {("drafters", "runners")}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; the kernels lie in a folder of their own."""
    found = {}
    for folder, prefix in ((ROOT / PACKAGE, PACKAGE), (ROOT / "kernels", f"{PACKAGE}.kernels")):
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join((prefix, *(part for part in parts if part != "__init__")))] = file
    return found


MODULES = modules()


def imports(file: Path) -> tuple[set[str], set[str]]:
    """Modules of ours that a file imports, and those that it names in texts ``"module:name"`` or ``"module"``."""
    imported, named = set(), set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= {name if name in MODULES else node.module for name in whole}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value.partition(":")[0]
            named |= {name} if name in MODULES and name != PACKAGE else set()
    return imported, named


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_every_module_imports_only_from_rooms_that_its_own_may():
    wrong = []
    for module, file in MODULES.items():
        imported, named = imports(file)
        allowed = {room(module), *MAY_IMPORT[room(module)].split()}
        wrong += [f"{module} -> {other}" for other in sorted(imported | named) if room(other) not in allowed]
        pairs = {(room(module), room(other)) for other in imported}
        wrong += [f"{module} imports what it may only name: {a} -> {b}" for a, b in pairs & BY_NAME_ONLY]
    assert wrong == []


def test_no_room_is_allowed_what_it_does_not_use():
    used: dict[str, set[str]] = {name: set() for name in MAY_IMPORT}
    for module, file in MODULES.items():
        imported, named = imports(file)
        used[room(module)] |= {room(other) for other in imported | named} - {room(module)}
    assert {name: set(rooms.split()) for name, rooms in MAY_IMPORT.items()} == used


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += graph[name]
    return seen


def test_rooms_have_no_circle():
    graph = {name: set(rooms.split()) for name, rooms in MAY_IMPORT.items()}
    for a, b in BY_NAME_ONLY:
        graph[a].discard(b)
    assert [name for name in graph if name in reached(graph, name)] == []


def test_modules_have_no_circle():
    graph = {module: imports(file)[0] & MODULES.keys() - {module} for module, file in MODULES.items()}
    assert [module for module in graph if module in reached(graph, module)] == []


def test_the_root_holds_rooms_and_what_every_room_uses():
    loose = {file.stem for file in (ROOT / PACKAGE).glob("*.py")}
    assert loose == {"__init__", "cli", "env", "errors", "figures", "files", "options", "version"}


@pytest.mark.parametrize("name", sorted({*MAY_IMPORT} - {"__init__"}))
def test_the_map_says_in_a_line_what_a_room_is_for(name):
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    entry = f"{name}/" if (ROOT / PACKAGE / name).is_dir() or name == "kernels" else f"{name}.py"
    assert re.search(rf"^\W*{re.escape(entry)}\s+\S.{{8,}}$", page, re.MULTILINE), f"no line for {entry}"


def test_only_the_plugin_patches_vllm():
    """Setting an attribute of something imported from vLLM is patching it."""
    wrong = []
    for module, file in MODULES.items():
        tree = ast.parse(file.read_text())
        theirs = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
            for alias in node.names
        }
        for node in ast.walk(tree):
            for target in node.targets if isinstance(node, ast.Assign) else ():
                base = target.value if isinstance(target, ast.Attribute) else None
                if isinstance(base, ast.Name) and base.id in theirs and room(module) != "plugin":
                    wrong.append(f"{module}: {ast.unparse(target)}")
    # Triton's interpreter lacks a function, where there is no GPU; no engine that serves is started with it.
    assert wrong == [f"{PACKAGE}.engines.interpreter: tldevice.log1p"]

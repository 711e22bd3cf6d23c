"""Looking into a package's source without importing it, and acting when a module is imported."""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


class Source:
    """The Python source of vLLM: an installed package or a wheel."""

    def __init__(self, read: Callable[[str], str | None]):
        self._read = read
        self._trees: dict[str, ast.Module | None] = {}

    @staticmethod
    def installed(package: str = "vllm") -> Source:
        """Source of the package as it would be imported.  An absent package has no files."""
        spec = importlib.util.find_spec(package)
        root = Path(spec.origin).parent.parent if spec and spec.origin else None

        def read(path: str) -> str | None:
            file = root / path if root else None
            return file.read_text(encoding="utf-8") if file and file.is_file() else None

        return Source(read)

    @staticmethod
    def wheel(file: str | Path) -> Source:
        """Source inside a wheel file."""
        archive = zipfile.ZipFile(file)
        names = set(archive.namelist())
        return Source(lambda path: archive.read(path).decode() if path in names else None)

    def tree(self, module: str) -> ast.Module | None:
        if module not in self._trees:
            path = module.replace(".", "/")
            text = self._read(f"{path}.py")
            if text is None:
                text = self._read(f"{path}/__init__.py")
            try:
                self._trees[module] = None if text is None else ast.parse(text)
            except (SyntaxError, ValueError):
                self._trees[module] = ast.Module([], [])
        return self._trees[module]

    def problem(self, module: str, name: str, needs: Sequence[str]) -> str | None:
        """What is wrong with ``module.name``: it is gone, or lacks something it needs.  None if nothing is.

        needs: of a function its parameters, of a class its bases, or names assigned in its body.
        """
        node: Any = self.tree(module)
        if node is None:
            return "the module is gone"
        for part in name.split("."):
            node = next((n for n in _definitions(node) if n.name == part), None)
            if node is None:
                return "it is gone"
        lacking = [need for need in needs if need not in _names_of(node)]
        return f"it has no {', '.join(lacking)}" if lacking else None


def _definitions(node: ast.AST) -> list[Any]:
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [n for n in getattr(node, "body", []) if isinstance(n, kinds)]


def _names_of(node: ast.AST) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        a = node.args
        return {arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)}
    assert isinstance(node, ast.ClassDef)
    names = {ast.unparse(base).rsplit(".", 1)[-1] for base in node.bases}
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign):
            names.add(ast.unparse(statement.target))
        elif isinstance(statement, ast.Assign):
            names |= {ast.unparse(target) for target in statement.targets}
        elif isinstance(statement, ast.FunctionDef):
            names.add(statement.name)
    return names


class _Finder(importlib.abc.MetaPathFinder):
    """Calls back when one of the awaited modules has been executed."""

    def __init__(self) -> None:
        self.awaited: dict[str, list[Callable[[ModuleType], None]]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.awaited:
            return None
        spec = self._found_by_others(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for callback in self.awaited.pop(name, ()):
                callback(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def _found_by_others(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> importlib.machinery.ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                return spec
        return None


_finder = _Finder()


def when_imported(module: str, callback: Callable[[ModuleType], None]) -> None:
    """Call ``callback(module)`` now if the module is imported, else right after it will be."""
    if (loaded := sys.modules.get(module)) is not None and not _executing(loaded):
        callback(loaded)
        return
    _finder.awaited.setdefault(module, []).append(callback)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def _executing(module: ModuleType) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))

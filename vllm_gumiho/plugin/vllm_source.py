"""What vLLM's Python source says, read without importing it: of the installed package, or inside a wheel."""

from __future__ import annotations

import ast
import importlib.util
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class Source:
    """The Python source of vLLM: an installed package or a wheel."""

    def __init__(self, read: Callable[[str], str | None], root: Path | None = None):
        """read: a file's text by its path in the package's parent folder, None where there is none.  root: that folder,
        where the files lie on the disk."""
        self._read, self._root = read, root
        self._trees: dict[str, ast.Module | None] = {}

    @staticmethod
    def installed(package: str = "vllm") -> Source:
        """Source of the package as it would be imported.  An absent package has no files."""
        spec = importlib.util.find_spec(package)
        root = Path(spec.origin).parent.parent if spec and spec.origin else None

        def read(path: str) -> str | None:
            file = root / path if root else None
            return file.read_text(encoding="utf-8") if file and file.is_file() else None

        return Source(read, root)

    @staticmethod
    def wheel(file: str | Path) -> Source:
        """Source inside a wheel file."""
        archive = zipfile.ZipFile(file)
        names = set(archive.namelist())
        return Source(lambda path: archive.read(path).decode() if path in names else None)

    def stamps(self, modules: Sequence[str]) -> list[list[Any]] | None:
        """Module, file, size in bytes and times of the last change (of content and of status, ns) of each; None for
        source that lies in no files, or where one cannot be looked at."""
        if self._root is None:
            return None
        found: list[list[Any]] = []
        for module in modules:
            path = self._root / module.replace(".", "/")
            file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
            try:
                status = file.stat()
            except OSError:
                return None
            found.append([module, str(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns])
        return found

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

    def problem(self, module: str, name: str, needs: Sequence[str], variable: bool = False) -> str | None:
        """What is wrong with ``module.name``: it is gone, or lacks something it needs.  None if nothing is.

        variable: it is a value that the module assigns, not a function or class.
        needs: of a function its parameters, of a class its bases, names assigned in its body, or attributes that its
        ``__init__`` sets.
        """
        node: Any = self.tree(module)
        if node is None:
            return "the module is gone"
        if variable:
            return None if name in _assigned(node) else "it is gone"
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
    names |= _assigned(node)
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef):
            names.add(statement.name)
            names |= _attributes_set(statement) if statement.name == "__init__" else set()
    return names


def _assigned(node: ast.Module | ast.ClassDef) -> set[str]:
    """Names that the body of a module or class assigns."""
    names: set[str] = set()
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign):
            names.add(ast.unparse(statement.target))
        elif isinstance(statement, ast.Assign):
            names |= {ast.unparse(target) for target in statement.targets}
    return names


def _attributes_set(function: ast.FunctionDef) -> set[str]:
    """Attributes of ``self`` that a method assigns."""
    targets: list[ast.expr] = []
    for node in ast.walk(function):
        targets += node.targets if isinstance(node, ast.Assign) else []
        targets += [node.target] if isinstance(node, ast.AnnAssign) else []
    found = (target for target in targets if isinstance(target, ast.Attribute))
    return {target.attr for target in found if isinstance(target.value, ast.Name) and target.value.id == "self"}

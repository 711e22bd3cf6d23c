"""What pip installs, and that no folder of ours hides Hugging Face's ``kernels``."""

import ast
import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

SOURCES = ("vllm_gumiho", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def run(code: str, folder: Path, path: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(path)}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Folder that ``pip install`` of a copy of the checkout filled."""
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("pip")
    copy, target = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("installed")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(copy)], check=True)
    return target


def test_every_module_of_the_checkout_is_installed(installed):
    for package, folder in (("vllm_gumiho", "vllm_gumiho"), ("kernels", "vllm_gumiho/kernels")):
        ours = {path.relative_to(ROOT / package) for path in (ROOT / package).rglob("*.py")}
        theirs = {path.relative_to(installed / folder) for path in (installed / folder).rglob("*.py")}
        assert ours
        assert ours <= theirs
    assert (installed / "vllm_gumiho" / "py.typed").is_file()
    data = {path.relative_to(ROOT) for path in (ROOT / "vllm_gumiho").rglob("*.safetensors")}
    assert all((installed / file).is_file() for file in data)


def test_the_kernels_are_imported_as_a_part_of_the_package(installed, tmp_path):
    code = "import vllm_gumiho.kernels.parallel_heads.reference as m; print(m.__file__)"
    expected = installed / "vllm_gumiho" / "kernels" / "parallel_heads" / "reference.py"
    assert run(code, tmp_path, installed) == str(expected)


def test_nothing_named_kernels_is_installed(installed):
    assert not (installed / "kernels").exists()
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    top_level = {Path(file).parts[0] for file in distribution.files if file.suffix == ".py"}
    assert top_level == {"vllm_gumiho"}


def test_the_entry_points_name_what_is_there(installed):
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    points = {(point.group, point.name): point.value for point in distribution.entry_points}
    assert points == {
        ("vllm.general_plugins", "gumiho"): "vllm_gumiho:register",
        ("console_scripts", "vllm-gumiho"): "vllm_gumiho.cli:main",
    }
    for point in distribution.entry_points:
        assert callable(point.load())
    assert distribution.metadata["Name"] == "vllm-gumiho"
    assert distribution.version == run("import vllm_gumiho; print(vllm_gumiho.__version__)", installed, installed)


@pytest.mark.parametrize("where", ["elsewhere", "repository root"])
def test_another_package_named_kernels_is_not_hidden(where, tmp_path):
    (tmp_path / "site" / "kernels").mkdir(parents=True)
    (tmp_path / "site" / "kernels" / "__init__.py").write_text("who = 'Hugging Face'\n")
    folder = ROOT if where == "repository root" else tmp_path
    assert run("import kernels; print(kernels.who)", folder, tmp_path / "site") == "Hugging Face"


def test_the_examples_and_scripts_import_what_is_there():
    names = set()
    for file in (*(ROOT / "examples").glob("*.py"), *(ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm_gumiho":
                names |= {(node.module, alias.name) for alias in node.names if alias.name != "*"}
    assert ("vllm_gumiho.engines.smollm2", "smollm2_folder") in names
    missing = []
    for module, name in sorted(names):
        try:
            found = importlib.import_module(module)
            if not hasattr(found, name):
                importlib.import_module(f"{module}.{name}")
        except ImportError:
            missing.append(f"{module}.{name}")
    assert missing == []

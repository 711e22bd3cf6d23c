"""Acting when a module is imported, and importing this package with and without vLLM."""

import importlib
import importlib.util
import subprocess
import sys

import pytest

from vllm_gumiho.plugin.import_watch import when_imported

WITHOUT_VLLM = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] == "vllm" else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Name of a package with a submodule ``inner`` that counts its executions, importable for this test."""
    name = f"awaited_{tmp_path.name.replace('-', '_')}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("done = True\n")
    (tmp_path / name / "inner.py").write_text("done = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield name
    for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == name]:
        del sys.modules[loaded]


@pytest.mark.parametrize("part", ["", ".inner"])
def test_callbacks_run_once_in_order_after_the_module_was_executed(module, part):
    seen = []
    for label in "ab":
        when_imported(module + part, lambda m, label=label: seen.append((label, m.__name__, m.done)))
    assert seen == []
    loaded = importlib.import_module(module + part)
    assert seen == [("a", module + part, True), ("b", module + part, True)]
    importlib.reload(loaded)
    assert len(seen) == 2


def test_a_module_that_is_already_imported_is_given_at_once(module):
    loaded, seen = importlib.import_module(module), []
    when_imported(module, seen.append)
    assert seen == [loaded]


def test_looking_for_a_module_without_importing_it_loses_no_callback(module):
    seen = []
    when_imported(f"{module}.inner", seen.append)
    assert importlib.util.find_spec(f"{module}.inner") is not None
    assert importlib.util.find_spec(f"{module}.inner") is not None
    assert seen == []
    loaded = importlib.import_module(f"{module}.inner")
    assert seen == [loaded]


def test_a_failing_import_is_tried_again(module, tmp_path):
    seen, file = [], tmp_path / module / "inner.py"
    file.write_text("raise RuntimeError('not yet')\n")
    when_imported(f"{module}.inner", seen.append)
    with pytest.raises(RuntimeError, match="not yet"):
        importlib.import_module(f"{module}.inner")
    assert seen == []
    file.write_text("done = True  # of another length, so that no cached bytecode fits\n")
    loaded = importlib.import_module(f"{module}.inner")
    assert seen == [loaded]


def test_a_module_that_is_nowhere_stays_so():
    when_imported("awaited_but_nowhere", lambda _: pytest.fail("called"))
    with pytest.raises(ModuleNotFoundError, match="awaited_but_nowhere"):
        importlib.import_module("awaited_but_nowhere")


def run(code: str, folder) -> str:
    ran = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    return ran.stdout.strip()


def test_importing_the_package_imports_neither_vllm_nor_torch(tmp_path):
    code = (
        "import sys, vllm_gumiho\nvllm_gumiho.register()\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'vllm', 'torch', 'transformers', 'triton'}))"
    )
    assert run(code, tmp_path) == "[]"


def test_without_vllm_the_package_imports_and_the_check_says_what_is_missing(tmp_path):
    code = WITHOUT_VLLM + (
        "import vllm_gumiho, vllm_gumiho.drafters.checkpoints, vllm_gumiho.request.resolve\n"
        "from vllm_gumiho.plugin.hooks import SERVING, check, mismatch_message\n"
        "from vllm_gumiho.plugin.vllm_source import Source\n"
        "vllm_gumiho.register()\n"
        "findings = check(Source.installed())\n"
        "print({finding.problem for finding in findings}, len(findings) == len(SERVING))\n"
        "print(mismatch_message(findings, None))"
    )
    problems, message = run(code, tmp_path).splitlines()
    assert problems == "{'the module is gone'} True"
    assert message.startswith("vLLM is not installed.")
    assert "0.32 and 0.33" in message

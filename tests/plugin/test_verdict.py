"""That hooks hold is remembered for the files and hooks it was found for, and nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from vllm_gumiho.plugin import verdict
from vllm_gumiho.plugin.hooks import SERVING, Hook
from vllm_gumiho.plugin.vllm_source import Source

HOOK = Hook("package.module", "f", "called", "a test", ("a",))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package on the disk, as `Source` of it, and how often it is read."""
    monkeypatch.setattr(verdict, "cache_folder", lambda: tmp_path / "cache")
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "module.py").write_text("def f(a): pass\n")
    reads = []

    def open_it() -> Source:
        def read(path: str) -> str | None:
            reads.append(path)
            file = tmp_path / path
            return file.read_text() if file.is_file() else None

        return Source(read, tmp_path)

    return folder / "module.py", open_it, reads


def test_what_holds_is_read_once(package):
    _, source, reads = package
    assert verdict.refusal_of(source(), "0.32", (HOOK,)) is None
    assert len(reads) == 1
    assert verdict.refusal_of(source(), "0.32", (HOOK,)) is None
    assert len(reads) == 1


def test_another_file_vllm_or_hook_is_read_again(package):
    file, source, reads = package
    assert verdict.refusal_of(source(), "0.32", (HOOK,)) is None
    assert verdict.refusal_of(source(), "0.33", (HOOK,)) is None
    assert len(reads) == 2
    assert "it has no b" in verdict.refusal_of(source(), "0.32", (Hook("package.module", "f", "called", "x", ("b",)),))
    file.write_text("def f(b): pass\n")
    os.utime(file, ns=(1, 1))
    assert "it has no a" in verdict.refusal_of(source(), "0.32", (HOOK,))
    file.unlink()
    assert "the module is gone" in verdict.refusal_of(source(), "0.32", (HOOK,))


def test_a_refusal_is_not_remembered(package):
    file, source, reads = package
    file.write_text("def g(a): pass\n")
    for count in (1, 2):
        assert "it is gone" in verdict.refusal_of(source(), "0.32", (HOOK,))
        assert len(reads) == count


def test_without_a_place_to_remember_it_is_read_each_time(package, monkeypatch, tmp_path):
    _, source, reads = package
    (tmp_path / "cache").write_text("a file where a folder should be")
    for count in (1, 2):
        assert verdict.refusal_of(source(), "0.32", (HOOK,)) is None
        assert len(reads) == count

    def homeless():
        raise FileNotFoundError("no home")

    monkeypatch.setattr(verdict, "cache_folder", homeless)
    assert verdict.refusal_of(source(), "0.32", (HOOK,)) is None
    assert len(reads) == 3


def test_a_process_reads_vllm_only_where_no_other_has(tmp_path):
    code = (
        "import json, vllm_gumiho.plugin.install as install\n"
        "from vllm_gumiho.plugin.vllm_source import Source\n"
        "read, tree = [], Source.tree\n"
        "Source.tree = lambda self, module: read.append(module) or tree(self, module)\n"
        "print(json.dumps([install.refusal(), len(set(read))]))"
    )
    counts = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "VLLM_CACHE_ROOT": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        refusal, read = json.loads(done.stdout.splitlines()[-1])
        assert refusal is None
        counts.append(read)
    assert counts == [len({hook.module for hook in SERVING}), 0]

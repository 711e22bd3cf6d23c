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
    times = file.stat()
    file.write_text("def f(b): pass\n")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "it has no a" in verdict.refusal_of(source(), "0.32", (HOOK,))
    file.unlink()
    assert "the module is gone" in verdict.refusal_of(source(), "0.32", (HOOK,))


def test_vllms_that_share_a_cache_are_told_apart(package, tmp_path):
    file, source, reads = package
    assert verdict.refusal_of(source(), "0.32", (HOOK,)) is None
    other = tmp_path / "other"
    (other / "package").mkdir(parents=True)
    file.rename(other / "package" / "module.py")

    def read(path):
        reads.append(path)
        return (other / path).read_text()

    assert verdict.refusal_of(Source(read, other), "0.32", (HOOK,)) is None
    assert len(reads) == 2


def test_source_in_a_wheel_is_not_remembered(package):
    source = Source({"package/module.py": "def f(a): pass\n"}.get)
    assert source.stamps(["package.module"]) is None
    assert verdict.refusal_of(source, "0.32", (HOOK,)) is None
    assert "it is gone" in verdict.refusal_of(Source({"package/module.py": ""}.get), "0.32", (HOOK,))


def test_another_way_to_look_is_read_again(package, monkeypatch, tmp_path):
    _, source, reads = package
    assert verdict.refusal_of(source(), "0.32", (HOOK,)) is None
    (tmp_path / "vllm_source.py").write_text("another way")
    monkeypatch.setattr(verdict.vllm_source, "__file__", str(tmp_path / "vllm_source.py"))
    assert verdict.refusal_of(source(), "0.32", (HOOK,)) is None
    assert len(reads) == 2


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


@pytest.mark.parametrize("error", [FileNotFoundError("no home"), AttributeError("an unfit vLLM has no such place")])
def test_a_place_that_cannot_be_asked_for_is_no_reason_to_refuse(package, monkeypatch, error):
    _, source, reads = package

    def fails():
        raise error

    monkeypatch.setattr(verdict, "cache_folder", fails)
    assert verdict.refusal_of(source(), "0.32", (HOOK,)) is None
    assert len(reads) == 1


def test_a_place_that_cannot_be_looked_at_is_no_reason_to_refuse(package, monkeypatch, tmp_path):
    """As root every folder may be looked at; a name that is too long may not."""
    _, source, reads = package
    monkeypatch.setattr(verdict, "cache_folder", lambda: tmp_path / ("x" * 300))
    assert verdict.refusal_of(source(), "0.32", (HOOK,)) is None
    assert len(reads) == 1


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

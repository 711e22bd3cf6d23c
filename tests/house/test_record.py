"""What a run of the tests is recorded to have shown."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from record import Recorder

ROW = ["n > 1", "V1"]


def report(name: str, outcome: str = "passed", when: str = "call", rows=(), why: str = ""):
    skip = ("file.py", 1, f"Skipped: {why}") if why else None
    properties = [("feature", row) for row in rows]
    return SimpleNamespace(nodeid=name, outcome=outcome, when=when, longrepr=skip, user_properties=properties)


def recorded(file, *reports) -> dict:
    recorder = Recorder(file)
    for one in reports:
        recorder.pytest_runtest_logreport(one)
    recorder.pytest_sessionfinish()
    return json.loads(file.read_text())


@pytest.fixture
def file(tmp_path):
    return tmp_path / "record.json"


def test_a_test_counts_once_and_a_skip_has_its_reason(file):
    found = recorded(
        file,
        *(report("tests/a.py::one", when=when) for when in ("setup", "call", "teardown")),
        report("tests/a.py::two", "skipped", "setup", why="no operator"),
        report("tests/b.py::three[x::y]", "failed", "setup"),
    )
    assert found["files"] == {
        "tests/a.py": {"passed": 1, "skipped": {"no operator": 1}, "failed": [], "proven": []},
        "tests/b.py": {"passed": 0, "skipped": {}, "failed": ["three[x::y]"], "proven": []},
    }
    assert found["versions"]["torch"]
    assert found["date"].count("-") == 2


@pytest.mark.parametrize(("other", "proven"), [("passed", [ROW]), ("failed", []), ("skipped", [])])
def test_a_row_is_proven_where_every_test_of_it_passed(file, other, proven):
    reports = [report("tests/a.py::one", rows=[ROW]), report("tests/a.py::two", other, rows=[ROW], why="no operator")]
    assert recorded(file, *reports)["files"]["tests/a.py"]["proven"] == proven


def test_a_run_of_some_files_leaves_the_entries_of_others(file):
    recorded(file, report("tests/a.py::one", "failed"), report("tests/b.py::one"))
    found = recorded(file, report("tests/a.py::one"))
    assert {name: (entry["passed"], entry["failed"]) for name, entry in found["files"].items()} == {
        "tests/a.py": (1, []),
        "tests/b.py": (1, []),
    }


def test_kinds_of_target_are_kept_from_run_to_run_unless_they_fail(tmp_path):
    recorder = Recorder(tmp_path / "record.json")
    recorder.targets["t.py"] = {("llama", "V1"), ("llama", "trained")}
    assert recorder.targets_of("t.py", [["gemma2", "V2"]]) == [["gemma2", "V2"], ["llama", "V1"], ["llama", "trained"]]
    recorder.failed["t.py"] = ["test_it[v2 gemma2]"]
    assert recorder.targets_of("t.py", [["gemma2", "V2"], ["gemma2 b", "V1"]])[0] == ["gemma2 b", "V1"]


def test_the_page_of_targets_is_the_one_the_record_makes():
    import target_list

    assert target_list.PAGE.read_text() == target_list.page(), "write it again: python tests/support/target_list.py"
    assert len(target_list.shown()) > 20

"""docs/features.md says what the tests prove, no more and no less."""

from __future__ import annotations

import ast
import json

import feature_list
from feature_list import FEATURES, PAGE, RECORD, RUNNERS, TESTS, marks, page, proven_with_next


def test_every_row_has_a_test_and_every_marked_test_a_row():
    assert marks().keys() == FEATURES.keys()
    assert {runner for proofs in marks().values() for runner in proofs} == set(RUNNERS)


def test_marks_of_another_drafter_are_rows_of_the_same_table():
    assert marks("moa")
    assert marks("moa").keys() <= FEATURES.keys()


def test_every_row_is_proven_by_tests_of_the_short_run():
    """``make test`` leaves out what is marked long: such a test proves nothing there."""
    for file in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = {ast.unparse(mark).partition("(")[0] for mark in getattr(node, "decorator_list", ())}
            assert not {"pytest.mark.feature", "pytest.mark.long"} <= names, f"{file.name}: {node.name}"


def test_the_page_is_the_one_the_tests_make():
    assert PAGE.read_text() == page(), "write it again: python tests/support/feature_list.py"


def test_what_did_not_pass_with_the_next_release_is_not_said_of_it(tmp_path, monkeypatch):
    """A row is named with a runner where a file that proves it passed there; the rest of the record changes nothing."""
    record = json.loads(RECORD.read_text())
    assert record["versions"]["vllm"].startswith("0.33")
    name, file = next(
        (name, *proofs["V1"]) for name, proofs in marks().items() if proofs.keys() == {"V1"} and len(proofs["V1"]) == 1
    )
    said = f"| {name} | {FEATURES[name][0]} | V1 | "
    others = [[name, "V2"], ["no row", "V1"], [name, "V1", "moa"]]
    for proven, cell in (([[name, "V1"], *others], "V1"), (others, "")):
        record["files"] = {f"tests/{file}": {"passed": 1, "skipped": {}, "failed": [], "proven": proven}}
        (tmp_path / "record.json").write_text(json.dumps(record))
        monkeypatch.setattr(feature_list, "RECORD", tmp_path / "record.json")
        assert proven_with_next() == ({name: {"V1": {file}}} if cell else {})
        assert said + cell + " | " in page()


def test_the_readme_links_to_the_page():
    assert "(docs/features.md)" in (TESTS.parent / "README.md").read_text()

"""docs/features.md says what the tests prove, no more and no less."""

from __future__ import annotations

import ast

from feature_list import FEATURES, PAGE, RUNNERS, TESTS, marks, page


def test_every_row_has_a_test_and_every_marked_test_a_row():
    assert marks().keys() == FEATURES.keys()
    assert {runner for proofs in marks().values() for runner in proofs} == set(RUNNERS)


def test_every_row_is_proven_by_tests_of_the_short_run():
    """``make test`` leaves out what is marked long: such a test proves nothing there."""
    for file in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = {ast.unparse(mark).partition("(")[0] for mark in getattr(node, "decorator_list", ())}
            assert not {"pytest.mark.feature", "pytest.mark.long"} <= names, f"{file.name}: {node.name}"


def test_the_page_is_the_one_the_tests_make():
    assert PAGE.read_text() == page(), "write it again: python tests/support/feature_list.py"


def test_the_readme_links_to_the_page():
    assert "(docs/features.md)" in (TESTS.parent / "README.md").read_text()

"""docs/features.md says what the tests prove, no more and no less."""

from __future__ import annotations

from feature_list import FEATURES, PAGE, RUNNERS, TESTS, marks, page


def test_every_row_has_a_test_and_every_marked_test_a_row():
    assert marks().keys() == FEATURES.keys()
    assert {runner for proofs in marks().values() for runner in proofs} == set(RUNNERS)


def test_the_page_is_the_one_the_tests_make():
    assert PAGE.read_text() == page(), "write it again: python tests/feature_list.py"


def test_the_readme_links_to_the_page():
    assert "(docs/features.md)" in (TESTS.parent / "README.md").read_text()

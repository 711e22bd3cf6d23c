"""What a run of the tests showed, by file: ``pytest --record FILE``.

A file of tests that ran takes the place of its entry; entries of others stay, so that a run may be made in parts.
An entry has how many tests passed, why how many were skipped, which failed, which rows of docs/features.md were
proven: those with a marked test that passed, and none that failed or was left out; and what was shown of which kind of
target, for docs/targets.md.
"""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from vllm_gumiho.engines.facts import versions


class Recorder:
    """Collects the reports of a run, also of those that ran in other processes."""

    def __init__(self, file: Path):
        self.file = file
        self.passed: Counter[str] = Counter()
        self.skipped: dict[str, Counter[str]] = {}
        self.failed: dict[str, list[str]] = {}
        self.rows: dict[str, dict[tuple[str, str], set[str]]] = {}
        self.targets: dict[str, set[tuple[str, str]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        file = report.nodeid.split("::")[0]
        outcome = report.outcome
        if outcome == "passed":
            self.passed[file] += 1
        elif outcome == "skipped":
            reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.skipped.setdefault(file, Counter())[reason.removeprefix("Skipped: ")] += 1
        else:
            self.failed.setdefault(file, []).append(report.nodeid.split("::", 1)[1])
        for name, row in report.user_properties:
            if name == "target" and outcome == "passed":
                self.targets.setdefault(file, set()).add(tuple(row))
            if name == "feature":
                self.rows.setdefault(file, {}).setdefault(tuple(row), set()).add(outcome)

    def targets_of(self, file: str, before: Iterable[list[str]]) -> list[list[str]]:
        """What was shown of kinds of target in this run, and in those before where it was not run, or passed, in this.

        A test of a kind has runner and kind in its name, ``[v1 llama]``.
        """
        failed = self.failed.get(file, ())
        kept = {tuple(row) for row in before if not any(name.endswith(f" {row[0]}]") for name in failed)}
        return sorted(map(list, kept | self.targets.get(file, set())))

    def pytest_sessionfinish(self) -> None:
        record = json.loads(self.file.read_text()) if self.file.exists() else {"files": {}}
        record |= {"versions": versions(), "date": datetime.date.today().isoformat()}
        for file in {*self.passed, *self.skipped, *self.failed}:
            rows = self.rows.get(file, {})
            targets = self.targets_of(file, record["files"].get(file, {}).get("targets", ()))
            record["files"][file] = ({"targets": targets} if targets else {}) | {
                "passed": self.passed[file],
                "skipped": dict(sorted(self.skipped.get(file, {}).items())),
                "failed": sorted(self.failed.get(file, [])),
                "proven": sorted(list(row) for row, outcomes in rows.items() if outcomes == {"passed"}),
            }
        files = record.pop("files")
        entries = ",\n".join(f"  {json.dumps(file)}: {json.dumps(files[file])}" for file in sorted(files))
        self.file.write_text(f'{json.dumps(record)[:-1]}, "files": {{\n{entries}\n}}}}\n')


def mark_rows(items: list[pytest.Item]) -> None:
    """Let each test's report say which rows it proves."""
    for item in items:
        item.user_properties += [("feature", list(mark.args)) for mark in item.iter_markers("feature")]

"""Finished cells on disk, so that a benchmark goes on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_gumiho.errors import BenchError
from vllm_gumiho.files import write_json

Key = tuple[str, str, int, int]


def key(cell: dict[str, Any]) -> Key:
    """Mode, variant, concurrency and repeat of a cell."""
    return cell["mode"], cell["label"], cell["concurrency"], cell["repeat"]


class Store:
    """``settings.json`` and ``cells.jsonl`` of an output folder; failed cells are not finished.

    Raises: BenchError when the folder holds cells of other settings, or files that are no cells.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], resume: bool = True):
        self.cells: dict[Key, dict[str, Any]] = {}
        self.file = folder / "cells.jsonl"
        settings = folder / "settings.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not resume:
                self.file.unlink(missing_ok=True)
            if self.file.exists():
                self._read(identity, settings)
            else:
                write_json(settings, identity)
                self.file.touch()
        except OSError as error:
            raise BenchError(f"--output {folder}: cannot be written ({error}); give another folder") from error

    def _read(self, identity: dict[str, Any], settings: Path) -> None:
        try:
            theirs = json.loads(settings.read_text())
            lines = self.file.read_text().splitlines()
            # A line cut short by a full disk or a kill is a cell that was not finished.
            whole = [json.loads(line) for line in (*lines[:-1], *filter(_whole, lines[-1:]))]
            self.cells = {key(cell): cell for cell in whole}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BenchError(
                f"{self.file}: not the cells of a benchmark ({type(error).__name__}: {error}); give --no-resume to "
                "start anew, or another --output"
            ) from error
        differing = sorted(name for name in {*theirs, *identity} if theirs.get(name) != identity.get(name))
        if differing:
            raise BenchError(
                f"{self.file.parent} holds cells of other settings ({', '.join(differing)} differ); give another "
                "--output, or --no-resume to start anew there"
            )
        self.file.write_text("".join(json.dumps(cell) + "\n" for cell in whole))

    def finished(self, *where: Any) -> bool:
        """Whether a cell is there and did not fail."""
        return self.cells.get(where, {}).get("status") == "ok"

    def add(self, cell: dict[str, Any]) -> None:
        """Keep a cell."""
        self.cells[key(cell)] = cell
        with self.file.open("a") as lines:
            lines.write(json.dumps(cell) + "\n")


def _whole(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True

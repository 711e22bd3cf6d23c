"""Files that are whole or not there, and digests of what is in them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vllm_gumiho.errors import OutputError

_BLOCK = 1 << 20


@contextlib.contextmanager
def whole(file: Path, sync: bool = False) -> Iterator[Path]:
    """A path beside ``file`` to write to, which takes its place if the block ends well: a reader sees all or none.

    sync: wait until the content is on the disk.  Raises: OSError of what is done with it.
    """
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex}.part")
    try:
        yield part
        if sync:
            with part.open("rb+") as written:
                os.fsync(written.fileno())
        part.replace(file)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_text(file: Path, text: str, sync: bool = False) -> None:
    """Write a text file, whole or not at all.  Raises: OSError."""
    with whole(file, sync) as part:
        part.write_text(text, encoding="utf-8")


def write_json(file: Path, content: Any, indent: int = 2, sync: bool = False) -> None:
    """Write a JSON file, whole or not at all.  Raises: OSError."""
    write_text(file, json.dumps(content, indent=indent) + "\n", sync)


def check_writable(file: Path) -> None:
    """Make a file's folder and try it, before hours of work are lost.  Raises: OutputError."""
    try:
        if file.is_dir():
            raise IsADirectoryError("it is a folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}."):
            pass
    except OSError as error:
        raise OutputError(f"{file}: cannot be written ({error}); give another path") from error


def sha256_of(file: Path) -> str:
    """SHA-256 of a file in hexadecimal.  Raises: OSError."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def digest_of(value: Any, digits: int = 16) -> str:
    """The first hexadecimal digits of the SHA-256 of a JSON value, the same for any order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:digits]


def json_lines_files(paths: Iterable[str | Path]) -> list[Path]:
    """The files meant: a folder stands for its ``*.jsonl``.  They need not exist."""
    return [f for path in map(Path, paths) for f in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of every line that is not blank.

    Only a line feed ends a line: other separators that Python knows occur inside JSON strings.
    """
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())

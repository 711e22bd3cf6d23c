"""Whether a checkpoint's files are its own and hold what was written: links, checksums, archive CRCs."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

from vllm_gumiho.errors import CheckpointError
from vllm_gumiho.files import sha256_of

SHA256 = "sha256"
_CHUNK = 1 << 20


def check_place(file: Path, folder: Path) -> None:
    """Refuse a link that leaves the checkpoint's folder: a checkpoint from elsewhere must not read other files here.

    Links into the ``blobs`` of a hub cache are its layout, and legal.  A link in place of the whole folder is the
    user's own, and is followed.

    Raises: CheckpointError.
    """
    here, real = folder.resolve(), file.resolve()
    if real.is_relative_to(here) or not file.is_symlink():
        return
    # <repository>/snapshots/<revision>/<file> -> <repository>/blobs/<digest>
    own_blobs = here.parent.parent / "blobs" if here.parent.name == "snapshots" else None
    some_cache = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    if real.parent == own_blobs or some_cache:
        return
    raise CheckpointError(
        f"{file}: is a link to {real}, outside the checkpoint; copy the file into the folder, or name the folder that "
        "holds it"
    )


def checksums(config: dict[str, Any] | None) -> dict[str, str]:
    """SHA-256 by file name, as config.json gives them; a checkpoint of others gives none."""
    return (config or {}).get(SHA256) or {}


def check_checksums(config_file: Path, config: dict[str, Any]) -> None:
    """Refuse a ``sha256`` entry that is no object of file names and digests.  Raises: CheckpointError."""
    sums = config.get(SHA256)
    if sums is None:
        return
    remedy = "fetch it again, or remove the entry"
    if not isinstance(sums, dict):
        raise CheckpointError(f"{config_file}: {SHA256} is {sums!r}, expected an object; {remedy}")
    for name, digest in sums.items():
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise CheckpointError(f"{config_file}: {SHA256} of {name!r} is {digest!r}, no SHA-256; {remedy}")


def check_digest(file: Path, expected: str) -> None:
    """Raises: CheckpointError for a file whose SHA-256 is another."""
    try:
        found = sha256_of(file)
    except OSError as error:
        raise CheckpointError(f"{file}: not readable ({error}); fetch it again") from error
    if found != expected:
        raise CheckpointError(
            f"{file}: its SHA-256 is {found[:16]}..., config.json says {expected[:16]}...; the file is damaged or not "
            f"the one the config was written for: fetch both again, or remove {SHA256!r} from config.json if you "
            "changed the file yourself"
        )


def check_archive(file: Path) -> None:
    """Compare the CRCs of a ``torch.save`` archive, which ``torch.load`` does not.  Older files have none.

    Raises: CheckpointError.
    """
    try:
        if not zipfile.is_zipfile(file):
            return
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                # Zero stands for "not computed" in files written without CRCs.
                if entry.CRC == 0:
                    continue
                with archive.open(entry) as content:
                    while content.read(_CHUNK):
                        pass
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{file}: not what was written ({error}); the file is damaged, fetch it again") from error

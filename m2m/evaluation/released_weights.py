"""Weights that others released as one file, known by the start of its sha256, as torch's hub names such files.

Belongs here: refusing another file. Not here: pins of a profile (`m2m.evaluation.protocol`), what is done with weights.
"""

import hashlib
from pathlib import Path

from m2m.errors import InputError


def require_weights(setting: str, path: Path, name: str, sha256: str) -> None:
    """Refuse a file that is not the released one.

    Args:
        name: the released file's.
        sha256: the first characters of its digest.

    Raises:
        InputError: it is missing, or has other content.
    """
    if not path.is_file():
        raise InputError(f"{setting} {path}: no such file; expected {name}")
    with path.open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if not found.startswith(sha256):
        raise InputError(f"{setting} {path}: not {name}: sha256 {found[:8]}..., not {sha256}...")

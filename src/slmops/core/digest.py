"""Digests and canonical JSON.

Law: `digest_json(a) == digest_json(b)` exactly when `a` and `b` are the same JSON value, whatever the order of keys.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

CHUNK = 1 << 20


def canonical_json(value: Any) -> str:
    """The one text of a JSON value: sorted keys, no white space, UTF-8. NaN and infinities are a ValueError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_bytes(data: bytes) -> str:
    """`sha256:<64 hex digits>` of bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_text(text: str) -> str:
    """Digest of the UTF-8 form of a text. Lone surrogates are kept by `surrogatepass`."""
    return digest_bytes(text.encode("utf-8", "surrogatepass"))


def digest_json(value: Any) -> str:
    """Digest of the canonical JSON text of a value."""
    return digest_text(canonical_json(value))


def digest_file(path: Path) -> str:
    """Digest of a file's bytes, read in pieces of 1 MiB."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha.update(chunk)
    return "sha256:" + sha.hexdigest()

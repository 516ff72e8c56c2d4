"""The adapters in a converted model's folder: which there are, and that their files are as they were written."""

from __future__ import annotations

import difflib
from pathlib import Path

from slmops.core.digest import digest_file
from slmops.engines import read_json
from slmops.errors import ModelError

ADAPTERS = "adapters.json"
"""In a folder with adapters: their names, files and digests, and the digest of the base that they belong to."""


def adapter_file(folder: Path, adapter: str) -> Path:
    """The file of an adapter, if the folder has it as it was written.

    Raises:
        ModelError: the folder has no such adapter, or other bytes.
    """
    if not (folder / ADAPTERS).is_file():
        raise ModelError(f"{folder} has no adapters", "convert a base with adapters, or leave the adapter out")
    known = read_json(folder / ADAPTERS).get("adapters", {})
    if adapter not in known:
        close = difflib.get_close_matches(adapter, known, n=1)
        there = f"there are: {', '.join(sorted(known))}"
        raise ModelError(f"{folder} has no adapter {adapter}", f"did you mean {close[0]}?" if close else there)
    file: Path = folder / known[adapter]["file"]
    if not file.is_file() or digest_file(file) != known[adapter]["digest"]:
        raise ModelError(f"{file} is missing or not as it was written", "convert the model again")
    return file

"""Reading and checking a bundle.

    manifest.json        what this page's `Manifest` holds
    model/…              the payload: exactly what the runtime loads
    report.json, .html   how it was judged

Promise: `verify` returns only if every file named in the manifest has the recorded bytes and no other file lies in
`model/`. The payload digest depends on the payload alone: two runs that make the same model make the same payload
digest, although their reports hold other measured times.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from slmops.core.artifact import Artifact, FileEntry
from slmops.core.digest import digest_file
from slmops.core.model import Value
from slmops.errors import IntegrityError, UsageError
from slmops.store.files import read_json

NAME = "manifest.json"


class Runtime(Value):
    """What runs the payload."""

    name: str
    version: str
    device: str = "cpu"


class ChatTemplate(Value):
    """A rendered example, so that a device can prove that it tokenises as the judges did."""

    messages: tuple[dict[str, str], ...]
    token_ids: tuple[int, ...]


class Limits(Value):
    """Token bounds."""

    context_tokens: int
    max_new_tokens: int


class BundleFile(Value):
    """A file of the bundle: path, bytes, digest."""

    path: str
    size: int
    digest: str


class Manifest(Value):
    """What a bundle says of itself. `signatures` stays empty until signing exists."""

    schema_version: int = 1
    name: str
    version: str
    task: dict[str, Any]
    runtime: Runtime
    precision: str
    payload: str
    files: tuple[BundleFile, ...]
    chat_template: ChatTemplate
    limits: Limits
    verdict: str
    provenance: dict[str, Any]
    licences: dict[str, str]
    signatures: tuple[str, ...] = ()


def payload_digest(files: tuple[BundleFile, ...]) -> str:
    """Digest of the files under model/."""
    entries = [FileEntry(f.path, f.size, f.digest) for f in files if f.path.startswith("model/")]
    return Artifact("payload", tuple(sorted(entries, key=lambda entry: entry.path))).digest


def load(folder: Path) -> Manifest:
    """Read a bundle's manifest without checking its files.

    Raises:
        UsageError: not a bundle.
        IntegrityError: a manifest that this version cannot read.
    """
    value = read_json(folder / NAME)
    if not isinstance(value, dict):
        raise UsageError(
            f"{folder} is not a bundle (no readable {NAME})", "`slmops run` writes one to outputs/NAME/bundle"
        )
    if value.get("schema_version") != 1:
        raise IntegrityError(f"{folder}: manifest schema {value.get('schema_version')} is unknown", "update slmops")
    try:
        return Manifest.model_validate_json((folder / NAME).read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise IntegrityError(
            f"{folder}: manifest: {'.'.join(map(str, first['loc']))}: {first['msg']}", "fetch it again"
        ) from None


def verify(folder: Path) -> Manifest:
    """Read a bundle and compare every byte with the manifest.

    Raises:
        IntegrityError: a file is missing, changed or too many.
    """
    manifest = load(folder)
    for file in manifest.files:
        path, inside = folder / file.path, Path(file.path)
        linked = any((folder / part).is_symlink() for part in (inside, *inside.parents[:-1]))
        if ".." in inside.parts or inside.is_absolute() or linked:
            raise IntegrityError(f"{folder}: the manifest names {file.path}", "do not use this bundle")
        if not path.is_file():
            raise IntegrityError(f"{folder}: {file.path} is missing", "make or fetch the bundle again")
        if path.stat().st_size != file.size or digest_file(path) != file.digest:
            raise IntegrityError(
                f"{folder}: {file.path} is not what the manifest says", "make or fetch the bundle again"
            )
    known = {file.path for file in manifest.files}
    for path in (folder / "model").rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in known:
            raise IntegrityError(f"{folder}: {name} is not in the manifest", "remove it, or make the bundle again")
    if payload_digest(manifest.files) != manifest.payload:
        raise IntegrityError(f"{folder}: the payload digest does not fit its files", "make or fetch the bundle again")
    return manifest

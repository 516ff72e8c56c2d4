"""Project folders that run as they are: what `slmops init` writes.

A template is a folder beside this file with its slmops.yaml and README.md; its data comes from a generator, so the
package carries no data. `write_project` never writes into a folder that has something in it.
"""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

from slmops.errors import UsageError

TEMPLATE = "support_desk_project"
MESSAGES = 10_000


def project_name(name: str) -> str:
    """`name` in the form that `name:` in slmops.yaml has: lower case, other characters than a-z 0-9 . _ - as a dash.

    Raises:
        UsageError: nothing of the name is left.
    """
    plain = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("._-")[:63].rstrip("._-")
    if not plain:
        raise UsageError(f"{name!r} cannot be a project's name", "use letters a to z and digits, such as support-desk")
    return plain


def write_project(folder: Path, name: str, seed: int) -> list[Path]:
    """Write the support-desk project into a new or empty folder.

    Args:
        folder: where to; made with its parents where it is missing.
        name: the project's name, brought into the form of `project_name`.
        seed: of the messages and of the project.

    Returns:
        The files that were written, in the order of reading: slmops.yaml, README.md, data/messages.jsonl.

    Raises:
        UsageError: the folder has something in it, or its place is taken by a file, or the name cannot be used.
    """
    from slmops.templates.support_desk import generate

    plain = project_name(name)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", "give the name of a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty", "give a new folder, or empty this one first; nothing was changed")
    try:
        (folder / "data").mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made: {error.strerror}", "choose a folder you may write to") from error
    written: list[Path] = []
    for file in ("slmops.yaml", "README.md"):
        text = (files(__package__) / TEMPLATE / file).read_text(encoding="utf-8")
        written.append(folder / file)
        written[-1].write_text(text.replace("@NAME@", plain).replace("@SEED@", str(seed)), encoding="utf-8")
    rows = (json.dumps(row, ensure_ascii=False) + "\n" for row in generate(MESSAGES, seed))
    written.append(folder / "data" / "messages.jsonl")
    written[-1].write_text("".join(rows), encoding="utf-8")
    return written

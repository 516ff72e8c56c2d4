"""`slmops import`: a project file from the configuration of another trainer, and a word about every key of it."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from slmops.cli.common import json_argument, print_json, say

if TYPE_CHECKING:
    from slmops.flow.interop import Imported
    from slmops.flow.interop.rules import Finding

HELP = "make a slmops.yaml from a LLaMA-Factory, Axolotl or Olive configuration"

EPILOG = """\
every key that is ignored is named with the reason, here and at the end of the file; so is every
key whose meaning differs. Paths of data and models are looked for from where you stand."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `import` takes."""
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="YAML or JSON, or a text with one `olive finetune` command"
    )
    parser.add_argument(
        "--from", dest="trainer", default="auto", choices=("auto", "llamafactory", "axolotl", "olive"),
        help="whose file it is (default: auto, told by its keys)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("slmops.yaml"), metavar="FILE", help="file to write (default: slmops.yaml)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the file if it is there")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="refuse a file if a key is ignored without which something else is learned",
    )
    json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Translate, write, read back."""
    from slmops.errors import UsageError
    from slmops.flow.interop import read
    from slmops.flow.project import load

    out: Path = options.out
    if out.is_dir():
        out = out / "slmops.yaml"
    if out.exists() and not options.force:
        raise UsageError(f"{out} is there already", "give another --out, or --force to overwrite it")
    imported = read(options.file, options.trainer, out)
    if options.strict and imported.lost:
        listing = "\n".join(f"  {_line(finding, options.file.name)}" for finding in imported.lost)
        raise UsageError(
            f"{len(imported.lost)} keys would be lost, without which something else is learned:\n{listing}",
            "take them out of the file, or import without --strict; nothing was written",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(imported.text, encoding="utf-8")
    load(out)
    if options.json:
        print_json(_json(imported, options.file, out))
    else:
        print(out)
    _tell(imported, options.file.name)
    say(f"\nnext:  look at the guess in task.type, then  slmops plan -f {out}")
    return 0


def _json(imported: Imported, file: Path, out: Path) -> dict[str, object]:
    found: dict[str, list[dict[str, object]]] = {"translated": [], "changed": [], "assumed": [], "ignored": []}
    for finding in imported.findings:
        entry = asdict(finding)
        found[entry.pop("kind")].append(entry)
    values = {path: setting.value for path, setting in imported.settings.items()}
    return {"trainer": imported.trainer, "file": str(file), "out": str(out), "settings": values, **found}


def _line(finding: Finding, file: str) -> str:
    where = f"{file}:{finding.line}: " if finding.line else f"{file}: "
    to = f" → {', '.join(finding.to)}" if finding.to else ""
    return f"{where}{finding.key}{to}{f': {finding.note}' if finding.note else ''}"


def _tell(imported: Imported, file: str) -> None:
    kinds: dict[str, list[Finding]] = {kind: [f for f in imported.findings if f.kind == kind] for kind in
                                       ("translated", "changed", "assumed", "ignored")}  # fmt: skip
    say(f"{file}: {imported.name}, {len(kinds['translated']) + len(kinds['changed'])} keys translated")
    for title, findings in (
        ("translated, with another meaning", kinds["changed"]),
        ("ignored, so that something else is learned", list(imported.lost)),
        ("ignored, without effect on what is learned", [f for f in kinds["ignored"] if not f.changes]),
    ):
        if findings:
            say(f"\n{title}:")
            for finding in findings:
                say(f"  {_line(finding, file)}")
    if kinds["assumed"]:
        say("\nnot in the file, taken as the trainer would or as slmops needs it:")
        for finding in kinds["assumed"]:
            value = imported.settings.get(finding.to[0])
            what = f" = {value.value}" if value is not None else ""
            say(f"  {finding.to[0]}{what}{f': {finding.note}' if finding.note else ''}")

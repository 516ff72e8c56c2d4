"""`slmops cache`: what is stored, whether it is sound, and removing what is not needed."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from slmops.cli.common import json_argument, open_project, print_json, project_arguments, say, size
from slmops.core.layout import columns
from slmops.errors import IntegrityError, SlmopsError

if TYPE_CHECKING:
    from slmops.flow.project import Project

HELP = "list, verify or clean the stored results (ls, verify, gc)"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `cache` takes."""
    parser.add_argument(
        "action",
        choices=("ls", "verify", "gc"),
        help="ls: list; verify: read every byte; gc: remove what the project file does not need",
    )
    parser.add_argument(
        "--repair", action="store_true", help="verify: forget what is damaged, so that it is made again"
    )
    parser.add_argument("--dry-run", action="store_true", help="gc: only say what would be removed")
    project_arguments(parser)
    json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Do the action."""
    from slmops.flow.state import State
    from slmops.store.files import exclusive, read_json, remove_tree

    project = open_project(options)
    state = State(project)
    store = state.store
    if options.action == "ls":
        names: dict[str, list[str]] = {}
        for path in sorted((state.root / "steps").glob("*.json")):
            record = read_json(path) or {}
            names.setdefault(record.get("output", ""), []).append(record.get("step", "?"))
        entries = [(digest, store.artifact(digest)) for digest in store.digests()]
        if options.json:
            print_json(
                [
                    {"digest": d, "kind": a.kind, "bytes": a.size, "files": len(a.files), "steps": names.get(d, [])}
                    for d, a in entries
                ]
            )
            return 0
        rows = [["digest", "kind", "size", "files", "made by"]]
        rows += [
            [d[7:19], a.kind, size(a.size), str(len(a.files)), ", ".join(dict.fromkeys(names.get(d, ["-"])))]
            for d, a in entries
        ]
        print("\n".join(columns(rows, right=(2, 3))))
        return 0
    with exclusive(state.root / "lock", f"a slmops run is at work on {project.root}"):
        if options.action == "verify":
            damaged = {digest: bad for digest in store.digests() if (bad := store.damaged(digest))}
            for digest in damaged if options.repair else ():
                store.remove(digest)
            if options.json:
                print_json({"artifacts": len(store.digests()), "damaged": damaged})
            elif not damaged:
                print(f"{len(store.digests())} artifacts, every byte as recorded")
            if damaged and not options.repair:
                listing = "; ".join(f"{digest[7:19]}: {', '.join(bad)}" for digest, bad in damaged.items())
                raise IntegrityError(
                    f"damaged: {listing}", "`slmops cache verify --repair` forgets them; `slmops run` makes them again"
                )
            for digest in damaged:
                say(f"forgotten: {digest[7:19]}")
            return 0
        keep = state.needed([State(other).survey(other.plan()) for other in _siblings(project)])
        unneeded = [digest for digest in store.digests() if digest not in keep]
        if options.dry_run:
            print("\n".join(digest[7:19] for digest in unneeded) or "nothing to remove")
            return 0
        removed, freed = store.gc(keep)
        remove_tree(state.root / "scratch")
        print(f"{removed} artifacts removed, {size(freed)} freed")
    return 0


def _siblings(project: Project) -> list[Project]:
    """The project and those of the other files of its folder: they share one store."""
    from slmops.flow.project import load

    found = [project]
    for path in sorted(project.root.glob("*.yaml")):
        try:
            found.append(load(path))
        except SlmopsError:
            continue
    return found

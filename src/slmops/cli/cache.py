"""`slmops cache`: what is stored, whether it is sound, and removing what is not needed; also the environments of tools."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from slmops.cli.common import json_argument, open_project, print_json, project_arguments, say, size
from slmops.core.layout import columns
from slmops.errors import IntegrityError, SlmopsError, UsageError

if TYPE_CHECKING:
    from slmops.flow.project import Project

HELP = "list, verify or clean the stored results (ls, verify, gc), and the environments of tools"

EPILOG = """\
environments: those that slmops made for tools whose packages clash with its own, such as Olive. They lie in the user's cache
folder, or where SLMOPS_ENVIRONMENTS says, and are made again when they are wanted.

  slmops cache environments
  slmops cache environments --remove olive"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `cache` takes."""
    parser.add_argument(
        "action",
        choices=("ls", "verify", "gc", "environments"),
        help="ls: list; verify: read every byte; gc: remove what the project file does not need; environments: list those of tools",
    )
    parser.add_argument(
        "--repair", action="store_true", help="verify: forget what is damaged, so that it is made again"
    )
    parser.add_argument("--dry-run", action="store_true", help="gc: only say what would be removed")
    parser.add_argument("--remove", metavar="NAME", help="environments: remove those of this name, or all")
    project_arguments(parser)
    json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Do the action."""
    if options.action == "environments":
        return _environments(options)
    if options.remove:
        raise UsageError("--remove is for environments", "for stored results: `slmops cache gc`")
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


def _environments(options: argparse.Namespace) -> int:
    """List the environments of tools, or remove some. They belong to no project."""
    import datetime

    from slmops.store import environments

    found = environments.all_found()
    if options.remove:
        chosen = [one for one in found if options.remove in (one.name, "all")]
        if not chosen and options.remove != "all":
            known = ", ".join(dict.fromkeys(one.name for one in found)) or "there are none"
            raise UsageError(f"there is no environment {options.remove}", f"in {environments.cache()}: {known}")
        for one in chosen:
            environments.remove(one)
        print(f"{len(chosen)} environments removed, {size(sum(one.size for one in chosen))} freed")
        return 0
    if options.json:
        print_json(
            [
                {
                    "name": one.name,
                    "folder": str(one.folder),
                    "packages": one.packages,
                    "bytes": one.size,
                    "whole": one.whole,
                }
                for one in found
            ]
        )
        return 0
    rows = [["environment", "packages", "size", "made", "folder"]]
    for one in found:
        made = datetime.datetime.fromtimestamp(one.made).strftime("%Y-%m-%d") if one.whole else "cut off"
        rows.append([one.name, str(one.packages), size(one.size), made, str(one.folder)])
    print("\n".join(columns(rows, right=(1, 2))) if found else f"no environments in {environments.cache()}")
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

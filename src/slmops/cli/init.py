"""`slmops init`: a project folder that runs as it is."""

from __future__ import annotations

import argparse
from pathlib import Path

from slmops.cli.common import say

HELP = "make a project folder with a commented slmops.yaml and data to try it on"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `init` takes."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to make; its name becomes the project's")
    parser.add_argument("--seed", type=int, default=0, help="seed of the example data (default: 0)")


def run(options: argparse.Namespace) -> int:
    """Write the project."""
    from slmops.templates import write_project

    folder: Path = options.folder
    made = write_project(folder, folder.resolve().name, options.seed)
    for path in made:
        print(path)
    say(f"\nnext:  cd {folder}  &&  slmops plan  &&  slmops run")
    return 0

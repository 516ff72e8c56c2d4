"""What several verbs share: finding the project, units for people."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slmops.flow.project import Project


def project_arguments(parser: argparse.ArgumentParser) -> None:
    """-f and --set."""
    parser.add_argument(
        "-f", "--file", type=Path, default=Path(), metavar="FILE", help="project file or folder (default: .)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override a key of the file, for instance --set train.epochs=3; may be given many times",
    )  # fmt: skip


def json_argument(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")


def on_argument(parser: argparse.ArgumentParser) -> None:
    """--on."""
    parser.add_argument(
        "--on", default="local", metavar="WHERE",
        help="where steps run: local (default); ray: a Ray started on this machine; ray://HOST:10001: a Ray cluster, "
        "whose nodes need slmops in this version and the project's folder at the same path, on a shared file system",
    )  # fmt: skip


def open_project(options: argparse.Namespace) -> Project:
    """The project that the options name."""
    from slmops.flow.project import load

    return load(options.file, options.overrides)


def print_json(value: Any) -> None:
    """JSON on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ram() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def say(text: str = "") -> None:
    """A line of talk, on standard error."""
    print(text, file=sys.stderr, flush=True)


def seconds(value: float) -> str:
    """A duration for people: `45 ms`, `4.2 s`, `3 min 20 s`, `2 h 05 min`."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    if value < 60:
        return f"{value:.1f} s"
    if value < 3600:
        return f"{int(value // 60)} min {int(value % 60):02d} s"
    return f"{int(value // 3600)} h {int(value % 3600 // 60):02d} min"


def size(value: float) -> str:
    """Bytes for people, in powers of 1000: `532 B`, `1.2 MB`."""
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"

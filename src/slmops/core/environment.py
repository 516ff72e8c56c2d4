"""An environment of its own: packages that a tool needs and that do not go with those of slmops.

Only what it is stands here; `slmops.store.environments` makes and runs it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from slmops.core.digest import digest_json

EXACT = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;=]+)$")


def normal(distribution: str) -> str:
    """A distribution's name as indexes compare it: `PyYAML` and `pyyaml` are one."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


@dataclass(frozen=True)
class Environment:
    """What an environment holds.

    Attributes:
        name: what users see and name, such as `olive`.
        requirements: `NAME==VERSION` of every package in it, so that it is the same one whenever it is made.
        size: bytes that it takes on disk, about; more are free before it is made.
    """

    name: str
    requirements: tuple[str, ...]
    size: int = 0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9-]*", self.name):
            raise ValueError(f"{self.name!r} is no name of an environment: small letters, digits and hyphens")
        loose = [requirement for requirement in self.requirements if not EXACT.match(requirement)]
        if loose:
            raise ValueError(f"environment {self.name}: {', '.join(loose)} must be NAME==VERSION")

    @cached_property
    def versions(self) -> dict[str, str]:
        """Normal name of each distribution to its version."""
        return dict(sorted((normal(m[1]), m[2]) for r in self.requirements if (m := EXACT.match(r))))

    def key(self, python: str) -> str:
        """64 hex digits: what decides whether two environments are one.

        Args:
            python: which Python on which machine, for instance `cpython-311 linux-x86_64`.
        """
        return digest_json({"python": python, "packages": self.versions}).removeprefix("sha256:")


def requirements(text: str) -> tuple[str, ...]:
    """The lines of a requirements file without comments."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return tuple(line for line in lines if line)

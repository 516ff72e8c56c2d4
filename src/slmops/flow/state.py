"""What is finished, what has to run and why: the plan held against the store.

.slmops/store/            artifacts (see `slmops.store`)
.slmops/steps/KEY.json    the record of one finished step: key parts, output digest, facts, times
.slmops/last/NAME/ID.json the key parts that step ID of project file NAME had when it last finished
.slmops/scratch/KEY/      a running or killed step's own folder: its checkpoints
.slmops/shared/           caches by content, such as paid endpoint answers
.slmops/sources.json      digests of the user's files with the stamps under which they hold
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from slmops.core.digest import digest_file, digest_json
from slmops.core.step import KeyParts, Step, explain, key_of, key_parts
from slmops.errors import IntegrityError, UsageError
from slmops.flow import methods
from slmops.flow.project import Project
from slmops.store import Store
from slmops.store.files import read_json, write_json


@dataclass(frozen=True)
class Status:
    """Where one step stands.

    Attributes:
        state: `cached`; `run`: it has to run, now or when its inputs are there.
        key: 64 hex digits, or None while an input is not there.
        output: digest of the finished artifact, if cached.
        why: what changed since the step last finished; for a step whose inputs are not there, which of them.
    """

    step: Step
    state: Literal["cached", "run"]
    key: str | None
    parts: KeyParts | None
    output: str | None
    why: tuple[str, ...]


class State:
    """The state folder of a project.

    Args:
        cores: threads of the machine that runs the steps; default: those of this one.
        notes: whether finished steps are noted for `why`; a search's trials are not what the project last was.
    """

    def __init__(self, project: Project, cores: int | None = None, *, notes: bool = True) -> None:
        self.project = project
        self.notes = notes
        self.root = project.state
        self.store = Store(self.root / "store")
        self.cores = cores or len(os.sched_getaffinity(0))
        self._sources: dict[str, Any] = read_json(self.root / "sources.json") or {}
        self._sources_changed = False

    def threads(self, step: Step) -> int:
        """The threads that a step gets on this machine."""
        return min(step.threads or self.cores, self.cores)

    def record(self, key: str) -> dict[str, Any] | None:
        """The record of a finished step whose output is still whole in the store (touched files are read again)."""
        record: dict[str, Any] | None = read_json(self.root / "steps" / f"{key}.json")
        if record is None:
            return None
        try:
            self.store.path(record["output"])
        except IntegrityError:
            return None
        return record

    def forget_damaged(self, key: str) -> None:
        """Take a step's damaged output out of the store, so that the one made again is not mixed with it."""
        record = read_json(self.root / "steps" / f"{key}.json")
        if record is not None and self.record(key) is None:
            with contextlib.suppress(IntegrityError):  # it is not in the store at all
                self.store.remove(record["output"])

    def save(self, step: Step, key: str, record: dict[str, Any]) -> None:
        """Remember that a step finished. The record is written last: only then does the step count as done."""
        write_json(self.root / "steps" / f"{key}.json", record)
        self.remember(step, record["parts"])

    def remember(self, step: Step, parts: KeyParts) -> None:
        """Note the key parts under the step's name, for `why`."""
        path = self.root / "last" / self.project.spec.name / f"{step.id}.json"
        if self.notes and read_json(path) != parts:
            write_json(path, parts)

    def last(self, step: Step) -> KeyParts | None:
        """The key parts that the step had when it last finished."""
        parts: KeyParts | None = read_json(self.root / "last" / self.project.spec.name / f"{step.id}.json")
        return parts

    def source_digest(self, path: Path, covers: Callable[[Path], Iterable[Path]] | None = None) -> str:
        """Content digest of a user's file or folder. A file whose size, time and inode are known is not read again.

        Args:
            covers: the files that the path stands for; default: itself, or everything in it that is not hidden.

        Raises:
            UsageError: it is not there or cannot be read.
        """
        if not path.exists():
            raise UsageError(f"there is no {path}", "correct the path in slmops.yaml, or give it with --set")
        if covers is not None:
            files = sorted(covers(path))
        elif path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        else:
            files = [path]
        base = path if path.is_dir() else path.parent
        return digest_json([[p.relative_to(base).as_posix(), self._file_digest(p)] for p in files])

    def source_digests(self, step: Step) -> dict[str, str]:
        """Digests of a step's sources. A method may have `covers(params, path)`: the files that it will read."""
        method = methods.get(step.method)
        reads = getattr(method, "covers", None)
        covers = None
        if reads is not None and step.sources:
            covers = functools.partial(reads, method.Params.model_validate(step.params, strict=False))
        return {name: self.source_digest(self.project.resolve(path), covers) for name, path in step.sources.items()}

    def _file_digest(self, path: Path) -> str:
        try:
            stat = path.stat()
            stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
            known = self._sources.get(str(path))
            if known is not None and known["stamp"] == stamp:
                return str(known["digest"])
            digest = digest_file(path)
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}", "check its permissions") from error
        self._sources[str(path)] = {"stamp": stamp, "digest": digest}
        self._sources_changed = True
        return digest

    def flush(self) -> None:
        """Keep the digests of sources for the next time."""
        if self._sources_changed:
            write_json(self.root / "sources.json", self._sources)
            self._sources_changed = False

    def status(self, step: Step, outputs: dict[str, str]) -> Status:
        """Where a step stands, given the output digests of the steps that are finished.

        Args:
            outputs: step id to artifact digest.
        """
        waiting = sorted({source for source in step.inputs.values() if source not in outputs})
        if waiting:
            return Status(step, "run", None, None, None, tuple(f"waits for {name}" for name in waiting))
        digests = {name: outputs[source] for name, source in step.inputs.items()}
        digests |= self.source_digests(step)
        declaration = methods.get(step.method).DECLARATION
        environment = methods.environment(declaration, self.threads(step), step.params)
        parts = key_parts(step, declaration, digests, environment)
        key = key_of(parts)
        record = self.record(key)
        if record is not None:
            return Status(step, "cached", key, parts, record["output"], ())
        return Status(step, "run", key, parts, None, tuple(self._why(step, key, parts)))

    def _why(self, step: Step, key: str, parts: KeyParts) -> list[str]:
        lines = explain(self.last(step), parts)
        if not lines:
            lost = read_json(self.root / "steps" / f"{key}.json") is not None
            lines = ["its output is damaged or was removed" if lost else "its record was removed"]
        return lines

    def survey(self, steps: Sequence[Step]) -> list[Status]:
        """Where every step stands, in order."""
        outputs: dict[str, str] = {}
        found = []
        for step in steps:
            status = self.status(step, outputs)
            if status.output is not None:
                outputs[step.id] = status.output
            found.append(status)
        self.flush()
        return found

    def needed(self, surveys: Iterable[Sequence[Status]]) -> set[str]:
        """Digests of all artifacts that the given plans use."""
        return {status.output for survey in surveys for status in survey if status.output is not None}

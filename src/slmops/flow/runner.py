"""`run(project)`: bring every step of the plan to its end, reusing what is there.

Promises: a step's output becomes visible whole or not at all; a run that is killed anywhere goes on where it was; two
runs on the same project at a time are refused; everything that can be refused is refused before the first step starts.
"""

from __future__ import annotations

import contextlib
import difflib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmops.core.method import Progress, SilentProgress
from slmops.core.step import Step
from slmops.engines.endpoint_address import check_endpoint
from slmops.errors import ResourceError, SlmopsError, StoppedError, UsageError
from slmops.flow import file_size, methods
from slmops.flow.executor import Ended, Executor, Task
from slmops.flow.planner import finished
from slmops.flow.state import State, Status
from slmops.store.files import exclusive, remove_tree


@dataclass
class Watcher:
    """What wants to know of a run while it goes: the terminal, a test. Every part may be left as it is.

    `progress` and `cached` may raise a `SlmopsError`, which then counts as the step's own. `failed` says whether the run
    goes on without a step that failed, and without all that needs it.
    """

    progress: Callable[[Step], Progress] = lambda step: SilentProgress()
    started: Callable[[Step, Status], None] = lambda step, status: None
    cached: Callable[[Step, dict[str, Any]], None] = lambda step, record: None
    finished: Callable[[Step, dict[str, Any]], None] = lambda step, record: None
    failed: Callable[[Step, SlmopsError], bool] = lambda step, error: False


@dataclass
class Result:
    """Output digests and records by step id, and how many steps really ran."""

    outputs: dict[str, str] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    """How to run. `jobs` 0: as many steps beside each other as there are cores for."""

    strict: bool = False
    budget: float | None = None
    jobs: int = 0
    until: tuple[str, ...] = ()


def preflight(state: State, survey: Sequence[Status], disk_bytes: int = 0, budget: float | None = None) -> None:
    """Refuse what cannot end well, before any model is loaded.

    Args:
        disk_bytes: estimate of what the steps to run will write.
        budget: as in `Options`.

    Raises:
        UsageError: an endpoint that cannot be asked (bad address, no key, a budget without prices), or a source that is not there
            or cannot be used.
        SpecError: see `slmops.flow.file_size`.
        MissingExtraError: a step's packages are not installed.
        ResourceError: not enough disk.
    """
    file_size.require(state, survey)
    for status in survey:
        if status.state == "run":
            declaration = methods.get(status.step.method).DECLARATION
            methods.require(declaration, status.step.params)
            params = methods.get(status.step.method).Params.model_validate(status.step.params, strict=False)
            if status.step.sources and status.step.inputs:  # else the survey has looked at them
                state.source_digests(status.step)
            endpoint = getattr(params, "endpoint", None)
            if endpoint is not None:
                check_endpoint(endpoint, budget)
    folder = state.root if state.root.exists() else state.project.root
    free = shutil.disk_usage(folder).free
    if free < disk_bytes:
        raise ResourceError(
            f"the run needs about {disk_bytes / 1e6:.0f} MB on disk, {free / 1e6:.0f} MB are free",
            "free some space; `slmops cache gc` removes what no current plan needs",
        )


def selected(steps: Sequence[Step], until: Sequence[str]) -> list[Step]:
    """The steps that the named ones need, themselves included; all of them if none is named.

    Raises:
        UsageError: there is no step of a name; the hint names the nearest.
    """
    if not until:
        return list(steps)
    by_id = {step.id: step for step in steps}
    for name in until:
        if name not in by_id:
            close = difflib.get_close_matches(name, by_id, n=1)
            hint = f"did you mean {close[0]}?" if close else f"steps: {', '.join(by_id)}"
            raise UsageError(f"there is no step {name}", hint)
    wanted: set[str] = set()
    stack = list(until)
    while stack:
        id = stack.pop()
        if id not in wanted:
            wanted.add(id)
            stack.extend(by_id[id].inputs.values())
    return [step for step in steps if step.id in wanted]


def run(
    state: State, steps: Sequence[Step], executor: Executor, watcher: Watcher | None = None, options: Options | None = None
) -> Result:  # fmt: skip
    """Run the plan to its end.

    Raises:
        SlmopsError: the first error of a step, after the steps beside it have been ended; finished work is kept.
    """
    with alone(state):
        return run_alone(state, steps, executor, watcher, options)


def alone(state: State) -> contextlib.AbstractContextManager[None]:
    """Hold the project, so that nobody else runs steps in it.

    Raises:
        SlmopsError: somebody does.
    """
    state.root.mkdir(parents=True, exist_ok=True)
    return exclusive(state.root / "lock", f"another slmops run is at work on {state.project.root}")


def run_alone(
    state: State, steps: Sequence[Step], executor: Executor, watcher: Watcher | None = None, options: Options | None = None
) -> Result:  # fmt: skip
    """`run`, for a caller that holds the project by `alone`."""
    return _Run(state, steps, executor, watcher or Watcher(), options or Options()).go()


class _Run:
    def __init__(
        self, state: State, steps: Sequence[Step], executor: Executor, watcher: Watcher, options: Options
    ) -> None:
        self.state, self.executor, self.watcher, self.options = state, executor, watcher, options
        self.waiting = list(steps)
        self.running: dict[str, Status] = {}
        self.begun: dict[str, float] = {}
        self.result = Result()
        self.spent = 0.0

    def go(self) -> Result:
        try:
            while self.waiting or self.running:
                self._start_ready()
                if self.running:
                    self._end(self.executor.next())
                elif self.waiting:
                    names = ", ".join(step.id for step in self.waiting)
                    raise SlmopsError(f"steps that wait for each other: {names}", "this is a defect of the plan")
        finally:
            self.executor.stop()
            self.state.flush()
        return self.result

    def _start_ready(self) -> None:
        progress = True
        while progress:
            progress = False
            for step in list(self.waiting):
                if step not in self.waiting:
                    continue  # dropped with what it needs
                if any(source not in self.result.outputs for source in step.inputs.values()):
                    continue
                status = self.state.status(step, self.result.outputs)
                if status.output is not None and status.key is not None and status.parts is not None:
                    self.waiting.remove(step)
                    self.state.remember(step, status.parts)
                    remove_tree(self.state.root / "scratch" / status.key)  # left where a kill came after the record
                    record = self.state.record(status.key) or {}
                    try:
                        self.watcher.cached(step, record)
                    except SlmopsError as error:
                        self._failed(step, error)
                    else:
                        self._done(step, status.output, record)
                    progress = True
                elif any(other.key == status.key for other in self.running.values()):
                    continue  # the same work under another name: its result will do
                elif self._fits(step):
                    self.waiting.remove(step)
                    self._start(step, status)

    def _fits(self, step: Step) -> bool:
        if not self.running:
            return True
        if self.options.jobs and len(self.running) >= self.options.jobs:
            return False
        used = sum(self.state.threads(status.step) for status in self.running.values())
        return used + self.state.threads(step) <= (self.executor.capacity or self.state.cores)

    def _failed(self, step: Step, error: SlmopsError) -> None:
        """Go on without a step and all that needs it, or end the run with its error."""
        if not self.watcher.failed(step, error):
            raise error
        lost = {step.id}
        for other in self.waiting:  # in the plan's order, in which each comes after its inputs
            if lost & set(other.inputs.values()):
                lost.add(other.id)
        self.waiting = [other for other in self.waiting if other.id not in lost]

    def _start(self, step: Step, status: Status) -> None:
        assert status.key is not None
        self.state.forget_damaged(status.key)
        scratch = self.state.root / "scratch" / status.key
        out = scratch / "out"
        remove_tree(out)
        out.mkdir(parents=True)
        inputs = {name: self.state.store.path(self.result.outputs[source]) for name, source in step.inputs.items()}
        inputs |= {name: self.state.project.resolve(path) for name, path in step.sources.items()}
        task = Task(
            id=step.id, method=step.method, params=step.params, inputs=inputs, out=out, scratch=scratch / "work",
            shared=self.state.root / "shared", seed=step.seed, threads=self.state.threads(step),
            strict=self.options.strict, budget=None if self.options.budget is None else max(0.0, self.options.budget - self.spent),
        )  # fmt: skip
        task.scratch.mkdir(parents=True, exist_ok=True)
        task.shared.mkdir(parents=True, exist_ok=True)
        self.running[step.id] = status
        self.begun[step.id] = time.time()
        self.watcher.started(step, status)
        self.executor.start(task, self.watcher.progress(step))

    def _end(self, ended: Ended) -> None:
        status = self.running.pop(ended.task.id)
        if ended.error is not None:
            if isinstance(ended.error, StoppedError):
                remove_tree(ended.task.scratch.parent)
            return self._failed(status.step, ended.error)
        step = status.step
        assert status.key is not None and status.parts is not None
        declaration = methods.get(step.method).DECLARATION
        ledger = (ended.facts or {}).get("teacher")
        if isinstance(ledger, dict):
            self.spent += float(ledger.get("cost", 0.0)) + float(ledger.get("unsure", 0.0))
        artifact = self.state.store.put(ended.task.out, declaration.makes)
        record = {
            "step": step.id,
            "parts": status.parts,
            "output": artifact.digest,
            "kind": artifact.kind,
            "size": artifact.size,
            "facts": ended.facts or {},
            "reproducible": declaration.reproducible,
            "started": self.begun[step.id],
            "seconds": round(ended.seconds, 3),
        }
        self.state.save(step, status.key, record)
        remove_tree(ended.task.scratch.parent)
        self.result.ran.append(step.id)
        self._done(step, artifact.digest, record)
        self.watcher.finished(step, record)

    def _done(self, step: Step, output: str, record: dict[str, Any]) -> None:
        self.result.outputs[step.id] = output
        self.result.records[step.id] = record


def export(state: State, result: Result) -> dict[str, Path]:
    """Copy what users look for (student, bundle, report, adapters) from the store to the project's outputs folder.

    Returns:
        name to path: `student` (a folder for transformers), `bundle` and `adapters` (folders), `report.html`,
        `report.json`, `adapters.json` (scores), as far as the plan made them.
    """
    out = state.project.outputs
    made: dict[str, Path] = {}
    if "report" in result.outputs:
        source = state.store.path(result.outputs["report"])
        for name in ("report.html", "report.json"):
            made[name] = _copy(source / name, out / name)
    also = state.project.spec.convert.also
    for name in ("adapters", *(f"adapters-{form}" for form in also)):
        if name in result.outputs:
            scores = state.store.path(result.outputs[name]) / "adapters.json"
            made[f"{name}.json"] = _copy(scores, out / f"{name}.json")
    shipped = finished(state.project.spec)
    student = shipped if shipped in result.outputs else "student"  # a run that was to end with the training
    folders: dict[str, str] = {form: f"student-{form}" for form in also}
    folders |= {f"adapters-{form}": f"student-adapters-{form}" for form in also}
    folders |= {f"olive-{name}": f"student-olive-{name}" for name in state.project.spec.convert.olive}
    folders |= {"student": student, "bundle": "bundle", "adapters": "student-adapters"}
    for name, step in folders.items():
        if step in result.outputs:
            made[name] = _copy_folder(state.store.path(result.outputs[step]), out / name, result.outputs[step])
    return made


def _copy_folder(source: Path, target: Path, digest: str) -> Path:
    marker = target.with_name(f".{target.name}")
    if not target.is_dir() or not marker.exists() or marker.read_text() != digest:
        fresh = target.with_name(f".{target.name}-new")
        remove_tree(fresh)
        shutil.copytree(source, fresh)
        remove_tree(target)
        fresh.rename(target)
        marker.write_text(digest)
    return target


def _copy(source: Path, target: Path) -> Path:
    if not target.exists() or target.read_bytes() != source.read_bytes():
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f".{target.name}.new")
        shutil.copyfile(source, fresh)
        fresh.replace(target)
    return target

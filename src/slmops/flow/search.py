"""`search(project)`: run trials through the step cache until there are enough, and say which did best.

Promises: a trial runs only the steps that nobody ran before with the same parameters; whatever ends first, the trials and
the best of them are the same on one worker or many, here or on Ray; a trial whose own steps fail is noted and the search
goes on; a search that is killed goes on where it was. Test data is never looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from slmops.core.method import Progress, SilentProgress
from slmops.core.search import FIRST_WHOLE, Direction, Outcome, Trial, front, hopeless
from slmops.core.step import Step
from slmops.errors import (
    BudgetError,
    DataError,
    EndpointError,
    IntegrityError,
    MissingExtraError,
    ResourceError,
    SlmopsError,
    SpecError,
    StoppedError,
    UsageError,
)
from slmops.flow.executor import Executor
from slmops.flow.project import Project, spec_problems
from slmops.flow.runner import Watcher, alone, preflight, run_alone, selected
from slmops.flow.search_plan import (
    LOCAL,
    STUDENT,
    Merged,
    check_validation,
    curve_of,
    identity,
    merge,
    objectives_of,
    trial_steps,
    values_of,
)
from slmops.flow.search_space import MOVES_LOSS, Dimension, dimensions, override, touches, with_values
from slmops.flow.search_study import Study, optimise
from slmops.flow.state import State

FATAL = (BudgetError, EndpointError, IntegrityError, MissingExtraError, ResourceError, UsageError)
"""Errors that the next trial would meet as well: they end the search, and the trial is still to be run."""


@dataclass
class Display:
    """What wants to know of a search while it goes. Every part may be left as it is."""

    began: Callable[[str, int, int], None] = lambda study, ended, total: None
    note: Callable[[str], None] = lambda text: None
    progress: Callable[[Step], Progress] = lambda step: SilentProgress()
    told: Callable[[Trial], None] = lambda trial: None


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        study: name of the trials in the storage.
        metrics, ways: the objectives.
        best: the trials that none dominates; with one objective that is one, or none where no trial is complete.
        importance: shares of the parameters, most first; empty where it cannot be said.
        pruning: why trainings were not ended early; "" where they were.
    """

    study: str
    metrics: tuple[str, ...]
    ways: tuple[Direction, ...]
    space: tuple[Dimension, ...]
    trials: tuple[Trial, ...]
    best: tuple[Trial, ...]
    importance: Mapping[str, float]
    pruning: str = ""


def overrides(project: Project, trial: Trial) -> list[str]:
    """What `--set` takes to make the project that a trial was."""
    found = []
    for key, value in trial.parameters.items():
        path = key in ("teacher.base", "student.base") and isinstance(value, str) and not value.startswith("hf:")
        found.append(override(key, str(project.resolve(value)) if path else value))
    return found


def no_pruning(project: Project) -> str:
    """Why trainings are not ended early, in words; "" if they are."""
    search = project.spec.search
    assert search is not None
    if search.pruning == "off":
        return "search.pruning is off"
    if len(objectives_of(project.spec)) > 1:
        return "with several objectives a training's loss does not say which trials are bad"
    moves = [key for key in search.parameters if any(touches(key, m) for m in MOVES_LOSS)]
    if moves:
        return f"{', '.join(moves)} {'changes' if len(moves) == 1 else 'change'} what training losses are counted on"
    return ""


def search(
    project: Project, make_executor: Callable[[], Executor], *,
    trials: int | None = None, parallel: int | None = None, display: Display | None = None, cores: int | None = None,
) -> Found:  # fmt: skip
    """Run the project's search to its end; see the module.

    Args:
        make_executor: is called once everything that can be refused was; the executor is stopped at the end.
        trials, parallel: instead of those of the file.
        cores: as in `State`.

    Raises:
        UsageError: the file has no search section.
        DataError: there is no validation data.
        SlmopsError: an error that every trial would meet; ended trials are kept.
    """
    spec, display = project.spec, display or Display()
    if spec.search is None:
        raise UsageError("the project file has no search section", "say what to try under `search: {parameters: …}`")
    trials, parallel = trials or spec.search.trials, parallel or spec.search.parallel
    base, space, objectives = project.plan(), dimensions(spec), objectives_of(spec)
    state = State(project, cores, notes=False)
    preflight(state, state.survey(trial_steps(with_values(spec, {d.key: d.ends[0] for d in space}))))
    name = f"{spec.name}-{identity(spec, space, state)[:16]}"
    metrics, ways = tuple(o.metric for o in objectives), tuple(o.way for o in objectives)
    with alone(state):
        url = spec.search.storage or _own_file(state.root / "search" / f"{spec.name}.db")
        study = Study(name, space, ways, url=url, sampler=spec.search.sampler, seed=spec.seed)
        display.began(name, sum(t.state != "running" for t in study.trials()), trials)
        reason = no_pruning(project)
        runner = _Trials(project, state, base, make_executor, display, prunes=not reason)

        def told(trial: Trial) -> None:
            display.told(trial)
            failed = [t for t in study.trials() if t.state == "failed"]
            if len(failed) >= FIRST_WHOLE and not any(t.state in ("complete", "pruned") for t in study.trials()):
                hint = "correct the file, or narrow search.parameters to what can work"
                raise SlmopsError(f"{len(failed)} trials failed and none has worked; the first: {failed[0].why}", hint)

        try:
            optimise(study, trials, parallel, runner.run, told)
        finally:
            runner.stop()
            state.flush()
        ended = tuple(t for t in study.trials() if t.state != "running")
        return Found(name, metrics, ways, space, ended, front(ended, ways), study.importance(), reason)


def _own_file(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{path}"


@dataclass
class _Batch:
    """Trials that run now, and what is known of them."""

    merged: Merged
    trials: dict[int, Trial]
    earlier: list[tuple[float, ...]]
    curves: dict[str, list[float]] = field(default_factory=dict)
    outcomes: dict[int, Outcome] = field(default_factory=dict)


class _Trials:
    """Runs batches of trials as plans of steps."""

    def __init__(
        self, project: Project, state: State, base: Sequence[Step], make_executor: Callable[[], Executor],
        display: Display, prunes: bool,
    ) -> None:  # fmt: skip
        self.project, self.state, self.base, self.display, self.prunes = project, state, base, display, prunes
        self.make_executor = make_executor
        self.executor: Executor | None = None
        metrics = [objective.metric for objective in objectives_of(project.spec)]
        space = dimensions(project.spec)
        corners = {i: trial_steps(with_values(project.spec, {d.key: d.ends[-i] for d in space})) for i in (0, 1)}
        names = merge(base, corners).names
        self.shared = set(names[0].values()) & set(names[1].values())
        self.judged = any(metric not in LOCAL or metric == "validation_loss" for metric in metrics)

    def stop(self) -> None:
        """Free the executor."""
        if self.executor is not None:
            self.executor.stop()

    def run(self, trials: Sequence[Trial], ended: Sequence[Trial]) -> dict[int, Outcome]:
        """Run a batch to its end; every trial of it gets an outcome."""
        self.executor = self.executor or self.make_executor()
        plans: dict[int, list[Step]] = {}
        broken: dict[int, Outcome] = {}
        for trial in trials:
            try:
                plans[trial.number] = trial_steps(with_values(self.project.spec, trial.parameters))
            except (ValidationError, SpecError) as error:
                problems = error.problems if isinstance(error, SpecError) else spec_problems(error)
                broken[trial.number] = Outcome("failed", why=str(problems[0]))
        merged = merge(self.base, plans)
        earlier = [t.curve for t in ended if t.state == "complete" and t.number < trials[0].batch and t.curve]
        batch = _Batch(merged, {trial.number: trial for trial in trials}, earlier)
        self._data(merged)
        watcher = Watcher(
            progress=lambda step: _Watched(self, batch, step),
            cached=lambda step, record: self._cached(batch, step, record),
            failed=lambda step, error: self._failed(batch, step, error),
        )
        result = run_alone(self.state, merged.steps, self.executor, watcher)
        for number in plans:
            if number not in batch.outcomes:
                names = merged.names[number]
                outputs = {own: self.state.store.path(result.outputs[id]) for own, id in names.items()}
                batch.outcomes[number] = self._outcome(batch.trials[number], outputs, earlier)
        return broken | batch.outcomes

    def _data(self, merged: Merged) -> None:
        """Look for validation data before anything is trained for it."""
        steps = [step for step in merged.steps if step.method == "data.prepare"]
        if not steps or not self.judged:
            return
        assert self.executor is not None
        apart = {step.id for step in steps if step.id not in self.shared}  # their errors are those of their trials
        watcher = Watcher(progress=self.display.progress, failed=lambda step, error: step.id in apart)
        result = run_alone(self.state, selected(merged.steps, [step.id for step in steps]), self.executor, watcher)
        for step in steps:
            if step.id in result.outputs:
                check_validation(self.state.store.path(result.outputs[step.id]))

    def _outcome(
        self, trial: Trial, outputs: Mapping[str, Path], earlier: Sequence[tuple[float, ...]]
    ) -> Outcome:  # fmt: skip
        curve = curve_of(outputs[STUDENT])
        ends = [i for i in range(len(curve)) if self.prunes and hopeless(curve[: i + 1], earlier)]
        if ends:  # its last words came after its end: the same is done as where they came in time
            return Outcome("pruned", None, curve[: ends[0] + 1])
        try:
            values = values_of(with_values(self.project.spec, trial.parameters), outputs)
        except DataError as error:
            return Outcome("failed", None, curve, error.message)
        if not all(math.isfinite(value) for value in values):
            return Outcome("failed", None, curve, "an objective is not a number")
        return Outcome("complete", values, curve)

    def _cached(self, batch: _Batch, step: Step, record: Mapping[str, Any]) -> None:
        """A training that somebody finished before is given up where it would have been."""
        if self._is_student(batch, step):
            for loss in curve_of(self.state.store.path(record["output"])):
                self.look(batch, step, loss)

    def _is_student(self, batch: _Batch, step: Step) -> bool:
        return any(names[STUDENT] == step.id for names in batch.merged.names.values())

    def look(self, batch: _Batch, step: Step, loss: float) -> None:
        """Note a validation loss of a training.

        Raises:
            StoppedError: it is to be given up.
        """
        curve = batch.curves.setdefault(step.id, [])
        curve.append(loss)
        if self.prunes and self._is_student(batch, step) and hopeless(curve, batch.earlier):
            raise StoppedError(f"{step.id} is given up: its loss is above the median of earlier trials")

    def _failed(self, batch: _Batch, step: Step, error: SlmopsError) -> bool:
        """Note what a failed step means for its trials; False ends the search."""
        numbers = [n for n in batch.merged.trials_of(step.id) if n not in batch.outcomes]
        stopped = isinstance(error, StoppedError)
        if isinstance(error, FATAL) or (not stopped and step.id in self.shared):
            return False
        for number in numbers:
            curve = tuple(batch.curves.get(batch.merged.names[number][STUDENT], ()))
            why = "" if stopped else f"{step.id.partition('@')[0]}: {error.message}"
            batch.outcomes[number] = Outcome("pruned" if stopped else "failed", None, curve, why)
        return True


class _Watched:
    """Progress of a step of a trial: passed on, but for lines of talk; validation losses go to the search."""

    def __init__(self, trials: _Trials, batch: _Batch, step: Step) -> None:
        self.trials, self.batch, self.step = trials, batch, step
        self.inner = trials.display.progress(step)
        self.last = 0

    def start(self, label: str, total: int | None = None, unit: str = "") -> None:
        self.inner.start(label, total, unit)

    def advance(self, done: int = 1, note: str = "") -> None:
        self.inner.advance(done, note)

    def stop(self) -> None:
        self.inner.stop()

    def log(self, text: str) -> None:
        if "@" not in self.step.id:
            self.inner.log(text)

    def point(self, step: int, values: Mapping[str, float]) -> None:
        if "validation_loss" in values and step > self.last:
            self.last = step
            try:
                self.trials.look(self.batch, self.step, values["validation_loss"])
            except StoppedError:
                self.inner.stop()
                raise

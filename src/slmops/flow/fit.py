"""`fit(project)`: the form of the student that does its job within a budget, by as few measurements as may be.

Promises: everything runs through the step cache, so a killed fit goes on where it was and a second one does nothing; test data is
never looked at; what is chosen is what exhaustive measurement would choose, but for the chance that `slmops.core.fit` names.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmops.catalog.devices import Device, Slowdown, measure_here, slowdown
from slmops.core.fit import Budget, Budgeted, front, kept, nearest, parts
from slmops.core.method import Progress, SilentProgress
from slmops.core.spec import Metric, Spec
from slmops.core.step import Step
from slmops.core.words import Prefer
from slmops.errors import UsageError
from slmops.flow import fit_plan
from slmops.flow.executor import Executor
from slmops.flow.fit_plan import Candidate
from slmops.flow.project import Project
from slmops.flow.runner import Watcher, alone, preflight, run_alone, selected
from slmops.flow.search_plan import check_validation, merge
from slmops.flow.state import State

USUAL = ("gguf-q4_0", "gguf-q4_k_m", "gguf-q6_k", "gguf-q8_0", "gguf-fp16")
"""Forms that are tried where llama.cpp is installed and the file names none."""


@dataclass
class Display:
    """What wants to know of a fit while it goes."""

    note: Callable[[str], None] = lambda text: None
    progress: Callable[[Step], Progress] = lambda step: SilentProgress()
    told: Callable[[Budgeted], None] = lambda row: None


@dataclass(frozen=True)
class Fitted:
    """What a fit came to.

    Attributes:
        rows: every candidate, those that were looked at first.
        chosen, near: the name of the one chosen; else that of the nearest.
        front: names of those that no other beats.
        reference, metric, reference_score, examples: what quality is a share of, and how many validation examples there are.
        measured: answers that were asked of candidates; timed: candidates whose speed was measured.
        basis: where times come from.
    """

    rows: tuple[Budgeted, ...]
    chosen: str | None
    near: str | None
    front: tuple[str, ...]
    reference: str
    metric: str
    reference_score: float
    examples: int
    measured: int
    timed: int
    basis: str
    says: str
    values: dict[str, Any] = field(default_factory=dict)
    form: str = ""


def fit(
    project: Project, make_executor: Callable[[], Executor], budget: Budget, *, prefer: Prefer = "smallest",
    device: Device | None = None, threads: int = 1, exhaustive: bool = False, display: Display | None = None,
) -> Fitted:  # fmt: skip
    """Choose; see the module.

    Args:
        device: what it is for; None: this machine.
        threads: with which candidates are timed.
        exhaustive: measure every candidate whole.

    Raises:
        UsageError: no combination makes a project, or the metric is not a mean over examples.
        DataError: there is no validation data.
        SlmopsError: a step failed; what is finished is kept.
    """
    return _Fit(project, make_executor, budget, prefer, device, threads, exhaustive, display or Display()).go()


class _Fit:
    def __init__(
        self, project: Project, make_executor: Callable[[], Executor], budget: Budget, prefer: Prefer, device: Device | None,
        threads: int, exhaustive: bool, display: Display,
    ) -> None:  # fmt: skip
        self.project, self.spec, self.make_executor = project, project.spec, make_executor
        self.budget, self.prefer, self.threads, self.exhaustive, self.display = (
            budget,
            prefer,
            threads,
            exhaustive,
            display,
        )
        self.state = State(project, notes=False)
        self.base = project.plan()
        self.metric = _metric(self.spec)
        self.space = fit_plan.space(self.spec, forms(self.spec))
        merged = merge(self.base, {one.number: one.steps for one in self.space.candidates})
        self.steps, self.names = list(merged.steps), dict(merged.names)
        self.rows: dict[int, Budgeted] = {}
        self.scores: dict[int, dict[str, float]] = {}
        self.measured = self.timed = 0
        self.executor: Executor | None = None
        if device is None:
            self.slower = Slowdown(
                1.0, f"times were measured on this machine, with {threads} thread{'s' if threads > 1 else ''}"
            )
        else:
            self.slower = slowdown(device, measure_here())
            ram = device.ram_bytes if budget.ram_bytes is None else min(budget.ram_bytes, device.ram_bytes)
            self.budget = dataclasses.replace(budget, ram_bytes=ram)

    def go(self) -> Fitted:
        with alone(self.state):
            try:
                return self._go()
            finally:
                if self.executor is not None:
                    self.executor.stop()
                self.state.flush()

    def _go(self) -> Fitted:
        candidates = self.space.candidates
        wanted = [step.id for step in self.steps if not step.id.startswith("predict")]
        preflight(self.state, self.state.survey(selected(self.steps, wanted)))
        data = self.run(self.base, ["data"])["data"]
        check_validation(data)
        self.labels = self.spec.task.labels or _labels(data)
        self.count = sum(1 for line in (data / "validation.jsonl").open(encoding="utf-8") if line.strip())
        reference, self.reference = self._reference()
        whole = sum(self.reference.values()) / len(self.reference)
        self.display.note(
            f"{len(candidates)} candidates; quality is a share of {reference}'s {100 * whole:.1f} % on {self.count:,} validation examples"
        )
        for candidate in candidates:
            self.rows[candidate.number] = Budgeted(
                name=candidate.name, values=dict(candidate.values), form=candidate.form, runtime=candidate.runtime
            )
        chosen = self._choose(candidates)
        if chosen is not None:
            self.set(chosen, quiet=True, state="chosen")
        rows = [
            *sorted(self.rows.values(), key=lambda row: (row.state == "not needed", row.file_bytes or 0)),
            *self.space.impossible,
        ]
        close = None if chosen else nearest(rows, self.budget)
        row = self.rows[chosen.number] if chosen else close
        return Fitted(
            tuple(rows), row.name if chosen and row else None, close.name if close else None, tuple(front(rows)), reference,
            self.metric, whole, self.count, self.measured, self.timed, self.slower.basis,
            self._says(row if chosen else None, close), dict(row.values) if row else {}, row.form if row else "",
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------- choosing

    def _choose(self, candidates: Sequence[Candidate]) -> Candidate | None:
        """The candidate that comes first by `prefer` of those that fit."""
        best: Candidate | None = None
        for group in _students(candidates):
            if best is not None and self.prefer == "smallest" and not self.exhaustive and self._larger(group, best):
                for candidate in group:
                    self.set(
                        candidate, says="its student has too many parameters for a file as small as the one chosen"
                    )
                continue
            self._make(group)
            inside = [c for c in group if not self._beyond(c)]
            if self.prefer == "best":
                found = self._race(inside)
            else:
                order = self._size if self.prefer == "smallest" else self._time
                found = self._first(sorted(inside, key=order), best, order)
            if found is not None and (best is None or self._better(found, best)):
                if best is not None:
                    self.set(best, state="fits")
                best = found
        return best

    def _first(
        self, ordered: Sequence[Candidate], best: Candidate | None, order: Callable[[Candidate], Any]
    ) -> Candidate | None:
        """The first that fits, in their order; those after it are not needed."""
        found = None
        for candidate in ordered:
            beaten = best is not None and order(candidate) >= order(best)
            if (found is not None or beaten) and not self.exhaustive:
                continue
            if self._beyond(candidate, timed=True):
                continue
            if self._fits(candidate) and found is None and not beaten:
                found = candidate
        return found

    def _race(self, inside: Sequence[Candidate]) -> Candidate | None:
        """The one with the best score: all answer part after part, and those that cannot be the best any more are given up."""
        alive = [c for c in inside if not self._beyond(c, timed=True)]
        for end in parts(self.count):
            outlooks = {}
            for candidate in alive:
                self._answer(candidate, end)
                outlooks[candidate.number] = self._look(candidate)
            best = max((low for low, _ in outlooks.values()), default=0.0)
            for candidate in list(alive):
                if outlooks[candidate.number][1] < best and not self.exhaustive:
                    alive.remove(candidate)
                    self.set(candidate, state="quality", says=f"another is surely better, after {end:,} examples")
        good = [c for c in alive if self._fits(c)]
        return max(good, key=lambda c: (self.rows[c.number].score or 0.0, -self._size(c)), default=None)

    def _fits(self, candidate: Candidate) -> bool:
        """Whether it keeps its share of the reference's score; it answers no more than it takes to say no."""
        ends = parts(self.count)
        for end in ends:
            if self.exhaustive and end != ends[-1]:
                continue
            self._answer(candidate, end)
            self._look(candidate)
            if self.budget.quality is not None:
                mine, theirs = self._pairs(candidate)
                surely = kept(mine, theirs, self.budget.quality, self.count)
                if surely.high < 0:
                    row = self.rows[candidate.number]
                    self.set(candidate, state="quality", says=(
                        f"{100 * (row.kept or 0):.1f} % of {100 * self.budget.quality:g} % of the reference's score, after {end:,} examples"
                    ))  # fmt: skip
                    return False
        self.set(candidate, state="fits")
        return True

    def _beyond(self, candidate: Candidate, timed: bool = False) -> bool:
        """Whether a cost is beyond its budget: the file, and with `timed` memory and time, which are measured then."""
        row = self.rows[candidate.number]
        if row.state in ("file", "memory", "time"):
            return True
        broken = self.budget.broken(file_bytes=row.file_bytes)
        if not broken and (row.file_bytes or 0) > (self.budget.ram_bytes or float("inf")):
            broken = "memory"  # a file that does not fit is not tried
        if not broken and timed:
            self._clock(candidate)
            row = self.rows[candidate.number]
            broken = self.budget.broken(ram_bytes=row.ram_bytes, p95_s=row.p95_s)
        if broken:
            self.set(candidate, state=broken, says=f"beyond the budget of {broken}")
        return bool(broken)

    def _larger(self, group: Sequence[Candidate], best: Candidate) -> bool:
        """Whether every form of a student that is not made yet is surely larger than the one chosen so far."""
        return all(candidate.least_bytes >= self._size(best) for candidate in group)

    def _better(self, one: Candidate, other: Candidate) -> bool:
        if self.prefer == "best":
            return (self.rows[one.number].score or 0) > (self.rows[other.number].score or 0)
        order = self._size if self.prefer == "smallest" else self._time
        return order(one) < order(other)

    def _size(self, candidate: Candidate) -> float:
        return float(self.rows[candidate.number].file_bytes or 0)

    def _time(self, candidate: Candidate) -> float:
        self._clock(candidate)
        return self.rows[candidate.number].p95_s or 0.0

    # ------------------------------------------------------------------------------------------------ measuring

    def run(self, steps: Sequence[Step], wanted: Sequence[str]) -> dict[str, Path]:
        """Run steps and what they need; their folders by id."""
        self.executor = self.executor or self.make_executor()
        watcher = Watcher(progress=self.display.progress)
        result = run_alone(self.state, selected(list(steps), wanted), self.executor, watcher)
        return {id: self.state.store.path(result.outputs[id]) for id in wanted}

    def _step(self, candidate: Candidate, step: Step) -> Path:
        """Run one more step of a candidate."""
        names = self.names[candidate.number]
        id = f"{step.id}@{candidate.number}"
        own = dataclasses.replace(step, id=id, inputs={name: names[other] for name, other in step.inputs.items()})
        return self.run([*self.steps, own], [id])[id]

    def _make(self, group: Sequence[Candidate]) -> None:
        """Make the models of candidates; how large they are is known then."""
        from slmops.evaluate.inputs import model_bytes

        ids = {c.number: self.names[c.number][c.model] for c in group}
        folders = self.run(self.steps, list(dict.fromkeys(ids.values())))
        for candidate in group:
            folder = folders[ids[candidate.number]]
            self.set(candidate, quiet=True, file_bytes=model_bytes(folder))

    def _clock(self, candidate: Candidate) -> None:
        """Time a candidate, once."""
        from slmops.evaluate.inputs import read_measurement

        if self.rows[candidate.number].p95_s is not None:
            return
        folder = self._step(candidate, fit_plan.timing(candidate, self.spec, self.threads))
        found = read_measurement(folder).variants["student"]
        medians = sorted(statistics.median(times) for times in zip(*found.total_s, strict=True))
        p95 = medians[min(len(medians) - 1, round(0.95 * (len(medians) - 1)))]
        self.timed += 1
        self.set(candidate, quiet=True, p95_s=p95 * self.slower.factor, ram_bytes=statistics.mean(found.peak_bytes))

    def _answer(self, candidate: Candidate, end: int) -> None:
        """Have a candidate answer the examples up to `end`."""
        known = self.scores.setdefault(candidate.number, {})
        if len(known) >= end:
            return
        folder = self._step(candidate, fit_plan.answers(candidate, len(known), end))
        self.measured += end - len(known)
        known |= self._scored(folder)

    def _scored(self, folder: Path) -> dict[str, float]:
        """Score by example."""
        from slmops.evaluate import metrics
        from slmops.evaluate.inputs import read_predictions

        rows = read_predictions(folder)
        found = metrics.columns(
            self.metric, [r.gold for r in rows], [r.answer for r in rows], self.spec.task, self.labels
        )
        return {row.id: above for row, above in zip(rows, found.above, strict=True)}

    def _pairs(self, candidate: Candidate) -> tuple[list[float], list[float]]:
        known = self.scores[candidate.number]
        return [*known.values()], [self.reference[id] for id in known]

    def _look(self, candidate: Candidate) -> tuple[float, float]:
        """Note a candidate's score so far; where its mean less the reference's surely lies."""
        mine, theirs = self._pairs(candidate)
        surely = kept(mine, theirs, 1.0, self.count)
        mean, base = statistics.fmean(mine), statistics.fmean(self.reference.values())
        low, high = (1 + end / base if base else 0.0 for end in (surely.low, surely.high))
        self.set(
            candidate, quiet=True, answered=len(mine), score=mean, low=low, high=high,
            kept=mean / statistics.fmean(theirs) if any(theirs) else None,
        )  # fmt: skip
        return surely.low, surely.high

    def _reference(self) -> tuple[str, dict[str, float]]:
        """What quality is a share of: a local teacher, else the student of the file in full precision; and its scores by example."""
        name = "teacher" if any(step.id == "teacher" for step in self.base) else "student"
        asked = next(step for step in self.base if step.id == f"predict-{name}-fp32")
        candidate = Candidate(-1, f"{name}-fp32", {}, fit_plan.ONNX, tuple(self.base), asked)
        step = fit_plan.answers(candidate, 0, self.count)
        return candidate.name, self._scored(self.run([*self.base, step], [step.id])[step.id])

    def set(self, candidate: Candidate, quiet: bool = False, **changes: Any) -> None:
        """Note something about a candidate, and tell of it."""
        self.rows[candidate.number] = self.rows[candidate.number].model_copy(update=changes)
        if not quiet:
            self.display.told(self.rows[candidate.number])

    def _says(self, chosen: Budgeted | None, close: Budgeted | None) -> str:
        from slmops.evaluate.fit_text import chosen_because, nothing_fits

        if chosen is not None:
            return chosen_because(chosen, self.prefer, list(self.rows.values()), self.budget)
        return nothing_fits(close, self.budget)


def _students(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Candidates by their student, those that may be smallest first."""
    groups: dict[Any, list[Candidate]] = {}
    for candidate in candidates:
        student = next(step for step in candidate.steps if step.id == "student")
        groups.setdefault((str(student.params), str(student.inputs)), []).append(candidate)
    return sorted(groups.values(), key=lambda group: min(candidate.least_bytes for candidate in group))


def forms(spec: Spec) -> tuple[str, ...]:
    """The forms beside the one that ships."""
    from importlib.util import find_spec

    if spec.fit.also is not None:
        return spec.fit.also
    return tuple(dict.fromkeys([*spec.convert.also, *(USUAL if find_spec("llama_cpp") else ())]))


def _metric(spec: Spec) -> Metric:
    """The first metric of the report that is a mean over examples.

    Raises:
        UsageError: none is.
    """
    from slmops.evaluate.metrics import DEFAULTS

    metrics: Sequence[Metric] = spec.evaluate.metrics or DEFAULTS[spec.task.type]
    means = [m for m in metrics if m not in ("macro_f1", "field_f1", "in_scope_accuracy", "out_of_scope_recall")]
    if not means:
        raise UsageError(
            f"a fit compares means over examples, which {', '.join(metrics)} are not",
            "add another to evaluate.metrics, such as accuracy or exact_match",
        )
    return means[0]


def _labels(data: Path) -> tuple[str, ...]:
    from slmops.store.files import read_json

    return tuple((read_json(data / "info.json") or {}).get("labels") or ())

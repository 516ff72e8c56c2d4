"""Telling TensorBoard and MLflow what a run found: each training's curve, parameters and facts, and the report.

It promises that tracking changes nothing but what it writes: no step key and no exit code depend on it, and a tracker that
cannot write becomes one line of warning. The work is done on a thread beside the run; when the run ends it is waited for,
but not for long. A step is told once, known by its key; what could not be told is told by the next run.

What a tracker gets is an `Entry`; how it is written is in `tracking_tensorboard` and `tracking_mlflow`.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from slmops.core import spec
from slmops.core.step import Step, key_of
from slmops.errors import MissingExtraError
from slmops.flow.methods import version_of
from slmops.flow.project import Project
from slmops.flow.runner import Watcher
from slmops.flow.state import State
from slmops.store.files import read_json

CURVES = ("train_loss", "validation_loss", "learning_rate")
PACKAGES = {"tensorboard": ("tensorboard", "numpy"), "mlflow": ("mlflow-skinny", "sqlalchemy", "alembic")}
PATIENCE_S = 20.0
"""How long a finished run waits for what is still to be written."""


@dataclass(frozen=True)
class Entry:
    """What is told of one finished step.

    Attributes:
        step: its id; `key`: of the step, 64 hex digits; `method`: that made it.
        started: seconds since the epoch; `seconds`: how long it took.
        params: parameters by dotted path, as text.
        curve: (name, optimiser step, value), in order.
        values: single numbers by name.
        texts: words by name: digests, versions, verdicts.
        files: what is kept beside it.
    """

    step: str
    key: str
    method: str
    started: float
    seconds: float
    params: Mapping[str, str]
    curve: tuple[tuple[str, int, float], ...] = ()
    values: Mapping[str, float] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    @property
    def last(self) -> int:
        """The last optimiser step of the curve; 0 without one."""
        return max((at for _name, at, _value in self.curve), default=0)

    def time_of(self, at: int) -> float:
        """Seconds since the epoch of an optimiser step, as if all of them had taken equally long."""
        return self.started + self.seconds * (at / self.last if self.last else 1.0)


class Backend(Protocol):
    """One place that entries are written to."""

    name: str
    hint: str

    def has(self, entry: Entry) -> bool:
        """Whether the entry is known to be there. Quick: nothing heavy is imported, no server is asked."""

    def write(self, entry: Entry) -> None:
        """Write the entry, unless it turns out to be there. Any error means that it is not, or not whole."""


def flat(value: Any, path: str = "") -> dict[str, str]:
    """Nested JSON values as text by dotted path; a list is one value."""
    if isinstance(value, Mapping):
        found: dict[str, str] = {}
        for name, inner in value.items():
            found |= flat(inner, f"{path}.{name}" if path else str(name))
        return found
    return {path: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}


def entry_of(step: Step, record: Mapping[str, Any], folder: Path) -> Entry | None:
    """What to tell of a step: of a training and of the report; None for any other.

    Args:
        record: as `State.record` has it.
        folder: the step's output.
    """
    report = read_json(folder / "report.json") if record["kind"] == "report" else None
    training = read_json(folder / "training.json") if record["kind"] != "bundle" else None
    if training is None and report is None:
        return None
    parts = record["parts"]
    texts = {"output": str(record["output"]), "kind": str(record["kind"])}
    texts |= {f"input.{name}": str(digest) for name, digest in parts["inputs"].items()}
    texts |= {f"environment.{name}": str(value) for name, value in parts["environment"].items()}
    entry = Entry(
        step.id, key_of(parts), step.method, float(record["started"]), float(record["seconds"]),
        flat({**step.params, "seed": step.seed}), texts=texts,
    )  # fmt: skip
    return _report(entry, report, folder) if report is not None else _training(entry, record, training or {})


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _training(entry: Entry, record: Mapping[str, Any], training: Mapping[str, Any]) -> Entry:
    curve = [
        (name, int(point["step"]), float(point[name]))
        for point in training.get("points", ())
        for name in CURVES
        if point.get(name) is not None
    ]
    facts = {name: value for name, value in record.get("facts", {}).items() if value is not None}
    values = {f"fact/{name}": float(value) for name, value in facts.items() if _number(value)}
    texts = {f"fact.{name}": str(value) for name, value in facts.items() if isinstance(value, str | bool)}
    return replace(entry, curve=tuple(curve), values=values, texts={**entry.texts, **texts})


def _report(entry: Entry, report: Mapping[str, Any], folder: Path) -> Entry:
    values = {f"headline/{name}": figure["value"] for name, figure in report["headline"].items()}
    for variant in report["variants"]:
        values |= {f"score/{variant['name']}/{metric}": s["value"] for metric, s in variant["scores"].items()}
    texts = {"verdict": str(report["verdict"]), "says": str(report["says"])}
    for number, gate in enumerate(report["gates"], start=1):
        texts[f"gate.{number}.{gate['metric']}"] = f"{gate['verdict']}: {gate['says']}"
    known = {name: float(value) for name, value in values.items() if value is not None}
    return replace(entry, values=known, texts={**entry.texts, **texts}, files=(folder / "report.html",))


def require(tracking: spec.Tracking) -> None:
    """Refuse a tracker whose packages are not installed.

    Raises:
        MissingExtraError: names the first missing package and the pip line.
    """
    for name, packages in PACKAGES.items():
        for package in packages if getattr(tracking, name) else ():
            if version_of(package) is None:
                raise MissingExtraError(f"{package} (for tracking.{name})", name)


def backends(project: Project) -> list[Backend]:
    """The places that the project file asks for."""
    from slmops.flow.tracking_mlflow import MLflow
    from slmops.flow.tracking_tensorboard import TensorBoard

    tracking = project.spec.tracking
    experiment = tracking.experiment or project.spec.name
    found: list[Backend] = []
    if tracking.tensorboard:
        found.append(TensorBoard(project.state, experiment))
    if tracking.mlflow:
        found.append(MLflow(project.state, experiment))
    return found


class Tracker:
    """Passes on what finished steps have to tell, on a thread of its own.

    Args:
        say: shows a line to the user; called from the thread.
    """

    def __init__(self, state: State, places: Iterable[Backend], say: Callable[[str], None]) -> None:
        self.state, self.say = state, say
        self._places = list(places)
        self._seen: set[str] = set()
        self._queue: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def watch(self, watcher: Watcher) -> Watcher:
        """The watcher, with each finished step told besides."""

        def finished(step: Step, record: dict[str, Any]) -> None:
            watcher.finished(step, record)
            self.see(step, record)

        return replace(watcher, finished=finished) if self._places else watcher

    def see(self, step: Step, record: Mapping[str, Any] | None) -> None:
        """Take note of a finished step; one that every place has already costs next to nothing."""
        if not self._places or record is None:
            return
        try:
            entry = entry_of(step, record, self.state.store.path(record["output"]))
        except Exception as error:
            self.say(f"warning: {step.id} is not tracked: {_first(error)}; the run goes on")
            return
        if entry is None or entry.key in self._seen:
            return
        self._seen.add(entry.key)
        if any(not place.has(entry) for place in self._places):
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="slmops tracking", daemon=True)
                self._thread.start()
            self._queue.put(entry)

    def close(self, patience_s: float = PATIENCE_S) -> None:
        """Wait for what is still to be written, up to `patience_s` seconds."""
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(patience_s)
        if self._thread.is_alive():
            names = " and ".join(place.name for place in self._places)
            self.say(f"warning: {names} did not take everything within {patience_s:g} s; the next run tells the rest")
        self._thread = None

    def _work(self) -> None:
        while (entry := self._queue.get()) is not None:
            for place in list(self._places):
                try:
                    if not place.has(entry):
                        place.write(entry)
                except Exception as error:
                    self._places.remove(place)
                    self.say(
                        f"warning: {place.name} does not take {entry.step}: {_first(error)}; the run and its result are as "
                        f"they would be without it ({place.hint}, then run again: what is missing is written then)"
                    )


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__

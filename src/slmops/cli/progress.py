"""What a run shows while it goes: bars on a terminal, one line a step elsewhere. All of it on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from slmops.cli.common import seconds, size
from slmops.core.method import Progress
from slmops.core.step import Step
from slmops.flow.runner import Watcher
from slmops.flow.state import Status


class Terminal:
    """The display of one run; use it as a context manager.

    Args:
        total: steps in the plan.
    """

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        # That of the run: a step that catches what a library prints must not catch another thread's line.
        self.stream = sys.stderr
        self.console = Console(file=self.stream, highlight=False)
        self.live = self.console.is_terminal
        self.total, self.done, self.reused = total, 0, 0
        self.bars = Bars(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TimeElapsedColumn(), TimeRemainingColumn(compact=True), TextColumn("{task.fields[note]}"),
            console=self.console, transient=True, disable=not self.live,
        )  # fmt: skip

    def __enter__(self) -> Terminal:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def line(self, text: str) -> None:
        """A line that stays."""
        if self.live:
            self.console.print(text, markup=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    def watcher(self) -> Watcher:
        """The parts that a run calls."""
        return Watcher(self.progress, self._started, self._cached, self._finished)

    def progress(self, step: Step) -> Progress:
        """A bar for a step."""
        return _Bar(self, step)

    def _started(self, step: Step, status: Status) -> None:
        self.line(f"[{self.done + 1}/{self.total}] {step.id}: {step.about}")

    def _cached(self, step: Step, record: dict[str, Any]) -> None:
        self.done += 1
        self.reused += 1

    def _finished(self, step: Step, record: dict[str, Any]) -> None:
        self.done += 1
        self.line(f"      {step.id} done in {seconds(record['seconds'])}, {size(record['size'])}")


class _Bar(Progress):
    """One step's progress."""

    def __init__(self, terminal: Terminal, step: Step) -> None:
        self.terminal, self.step = terminal, step
        self.task: Any = None
        self.label, self.count, self.of = "", 0, 0
        self.spoken = time.monotonic()

    def start(self, label: str, total: int | None = None, unit: str = "") -> None:
        self.stop()
        self.label, self.count, self.of = label, 0, total or 0
        self.task = self.terminal.bars.add_task(f"{self.step.id}: {label}", total=total, note="")

    def advance(self, done: int = 1, note: str = "") -> None:
        self.count += done
        if self.task is not None:
            self.terminal.bars.update(self.task, advance=done, note=note)
        if not self.terminal.live and time.monotonic() - self.spoken > 15:
            self.spoken = time.monotonic()
            of = f"/{self.of}" if self.of else ""
            self.terminal.line(f"      {self.step.id}: {self.label} {self.count}{of}  {note}")

    def stop(self) -> None:
        if self.task is not None:
            self.terminal.bars.remove_task(self.task)
            self.task = None

    def log(self, text: str) -> None:
        for line in text.splitlines():
            self.terminal.line(f"      {self.step.id}: {line}")

    def point(self, step: int, values: Mapping[str, float]) -> None:
        pass

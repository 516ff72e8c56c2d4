"""The command line as users meet it, in this process: exit code, both streams, and which steps ran."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from slmops.cli.main import main
from slmops.core.method import Progress
from slmops.flow import executor
from slmops.flow.executor import InlineExecutor, Task
from tests.tiny import write_project


@dataclass(frozen=True)
class Outcome:
    """How one command ended. `started` are the steps that began, in order."""

    code: int
    out: str
    err: str
    started: list[str] = field(default_factory=list)

    @property
    def message(self) -> str:
        """The error, from `error:` up to the hint."""
        return self.err.partition("error: ")[2].partition("\nhint: ")[0]

    @property
    def hint(self) -> str:
        """What the user is told to do."""
        return self.err.partition("\nhint: ")[2].strip()

    def refused(self, code: int, *says: str) -> None:
        """Assert that this is an error that helps: its code, its words, a hint, no trace."""
        assert self.code == code, self.err or self.out
        assert "Traceback" not in self.err + self.out
        assert "unexpected error" not in self.err
        for text in says:
            assert text in self.err
        assert self.message.strip(), self.err
        assert len(self.hint) > 5, self.err


Slmops = Callable[..., Outcome]


@pytest.fixture
def slmops(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Slmops:
    """`slmops("run", "data", folder=project)` runs a command, its steps in this process."""
    started: list[str] = []

    class Noting(InlineExecutor):
        def start(self, task: Task, progress: Progress) -> None:
            started.append(task.id)
            super().start(task, progress)

    monkeypatch.setattr(executor, "LocalExecutor", Noting)

    def call(*words: str, folder: Path | None = None) -> Outcome:
        started.clear()
        capsys.readouterr()
        try:
            code = main([*words, *(("-f", str(folder)) if folder is not None else ())])
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
        streams = capsys.readouterr()
        return Outcome(code, streams.out, streams.err, list(started))

    return call


@pytest.fixture(scope="session")
def read_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny project whose first step, reading the data, is finished."""
    folder = write_project(tmp_path_factory.mktemp("good") / "project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "LocalExecutor", InlineExecutor)
        assert main(["run", "data", "-f", str(folder)]) == 0
    return folder


@pytest.fixture
def project(read_once: Path, tmp_path: Path) -> Path:
    """A copy of that project for one test."""
    folder = tmp_path / "project"
    shutil.copytree(read_once, folder)
    return folder

"""Steps on a Ray of this machine: results, progress, errors, ends; and what a cluster must have."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from slmops.cli.main import main
from slmops.core.method import SilentProgress
from slmops.core.spec import Data, Task, Training
from slmops.errors import DataError, MissingExtraError, ResourceError, SlmopsError, StepError, StoppedError, UsageError
from slmops.flow import ray_executor
from slmops.flow.executor import InlineExecutor
from slmops.flow.executor import Task as Work
from slmops.flow.ray_executor import RayExecutor, check_on
from tests.tiny import rows, write_project

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayExecutor]:
    executor = RayExecutor(tmp_path_factory.mktemp("root") / ".slmops", cpus=2)
    yield executor
    executor.close()


def work(folder: Path, method: str, params: dict[str, object], inputs: Mapping[str, Path], threads: int = 1) -> Work:
    """A task with folders of its own."""
    for name in ("out", "work", "shared"):
        (folder / name).mkdir(parents=True)
    return Work("step", method, params, inputs, folder / "out", folder / "work", folder / "shared", 0, threads)


def reading(folder: Path, content: str | None = None) -> Work:
    """A task that reads data."""
    folder.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows(120)) if content is None else content
    (folder / "rows.jsonl").write_text(text)
    params = {
        "data": Data(path="rows.jsonl").model_dump(mode="json", exclude={"augment"}),
        "task": Task(type="classification").model_dump(mode="json"),
        "needs_teacher": False,
    }
    return work(folder, "data.prepare", params, {"source": folder / "rows.jsonl"})


def here(task: Work) -> Path:
    """Run a task in this process; the folder that it made."""
    inline = InlineExecutor()
    inline.start(task, SilentProgress())
    assert inline.next().error is None
    return task.out


def training(folder: Path) -> Work:
    """A task that trains for as long as it is let."""
    data = here(reading(folder / "data"))
    tokenizer = here(work(folder / "tokenizer", "train.tokenizer", {"vocabulary": 300}, {"data": data}))
    params: dict[str, object] = {
        "training": Training(epochs=1e5, evaluations=10**5, patience=0, holdout=0.2).model_dump(mode="json"),
        "architecture": {"layers": 1, "hidden": 16, "heads": 1, "context": 64},
        "files": ["data/gold.jsonl"],
    }
    return work(folder / "train", "train.sft", params, {"data": data, "tokenizer": tokenizer})


class Counts(SilentProgress):
    """Progress that ends the task after some looks at validation data."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.points: list[int] = []
        self.most = most

    def point(self, step: int, values: Mapping[str, float]) -> None:
        self.points.append(step)
        if len(self.points) == self.most:
            raise StoppedError("enough")


def test_a_step_gives_what_it_gives_here(ray: RayExecutor, tmp_path: Path) -> None:
    there, progress = reading(tmp_path / "there"), SilentProgress()
    ray.start(there, progress)
    ended = ray.next()
    assert ended.error is None and ended.facts and ended.seconds > 0
    made = sorted(here(reading(tmp_path / "here")).iterdir())
    assert made
    for path in made:
        assert path.read_bytes() == (there.out / path.name).read_bytes()
    assert progress.lines and ray.capacity == 2


def test_run_on_ray(ray: RayExecutor, tmp_path: Path) -> None:
    folder = write_project(tmp_path / "project")
    assert main(["run", "data", "--on", "ray", "-f", str(folder)]) == 0
    assert main(["run", "data", "-f", str(folder)]) == 0, "and nothing is left to do"
    assert [path.name for path in (folder / ".slmops").iterdir() if path.name.startswith("ray")] == []
    assert not list((folder / ".slmops" / "scratch").iterdir())


def test_an_error_comes_back_with_its_hint(ray: RayExecutor, tmp_path: Path) -> None:
    ray.start(reading(tmp_path / "bad", '{"messages": 5}\n'), SilentProgress())
    error = ray.next().error
    assert isinstance(error, DataError) and error.hint and "rows.jsonl" in error.message


def test_a_watcher_ends_a_training_and_the_next_one_runs(ray: RayExecutor, tmp_path: Path) -> None:
    progress = Counts(3)
    ray.start(training(tmp_path), progress)
    ended = ray.next()
    assert isinstance(ended.error, StoppedError) and ended.error.message == "enough"
    assert len(progress.points) == 3 and ended.seconds < 100
    ray.start(reading(tmp_path / "next"), SilentProgress())
    assert ray.next().error is None


def test_a_worker_that_dies_is_a_step_error(ray: RayExecutor, tmp_path: Path) -> None:
    class Kills(SilentProgress):
        def point(self, step: int, values: Mapping[str, float]) -> None:
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    line = (process / "cmdline").read_bytes()
                    ours = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1]) in family
                except OSError:
                    continue
                if line.startswith(b"ray::") and b"slmops step" in line and ours:
                    os.kill(int(process.name), signal.SIGKILL)

    family = _descendants(os.getpid())
    ray.start(training(tmp_path), Kills())
    error = ray.next().error
    assert isinstance(error, StepError) and "step" in error.message and "died" in error.message and error.hint


def _descendants(of: int) -> set[int]:
    """Process ids below one, itself included."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    found = {of}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def test_more_threads_than_any_node_has_are_refused(ray: RayExecutor, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="takes 3 threads, the largest node has 2"):
        ray.start(work(tmp_path / "wide", "data.prepare", {}, {}, threads=3), SilentProgress())


def test_a_node_that_does_not_see_the_project_is_named(
    ray: RayExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marker is not where the node looks: as on a disk that it does not share."""
    monkeypatch.setattr(ray_executor, "write_atomic", lambda path, data: None)
    with pytest.raises(SlmopsError, match="does not see") as caught:
        RayExecutor(tmp_path / ".slmops")
    assert str(tmp_path) in caught.value.message and "file system that every node mounts" in caught.value.hint


def test_a_node_with_other_packages_is_named(ray: RayExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor, "_facts", lambda: {"torch": "1.0"})
    with pytest.raises(SlmopsError, match=r"differs: torch \S+, here 1\.0"):
        RayExecutor(tmp_path / ".slmops")
    assert not list(tmp_path.rglob("marker*"))


def test_places() -> None:
    assert [check_on(on) for on in ("local", "ray", "ray://head:10001")] == [None, "", "ray://head:10001"]
    with pytest.raises(UsageError, match="not a place to run"):
        check_on("rya")


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError) as caught:
        RayExecutor(tmp_path / ".slmops")
    assert "slmops[ray]" in caught.value.hint

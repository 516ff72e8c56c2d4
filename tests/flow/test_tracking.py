"""TensorBoard and MLflow: what they hold is what the training wrote; nothing twice; a dead server is a line of warning."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from slmops.core.method import Context, Facts
from slmops.core.spec import Spec, Tracking
from slmops.core.step import Step
from slmops.errors import MissingExtraError
from slmops.flow import tracking
from slmops.flow.executor import InlineExecutor
from slmops.flow.planner import plan
from slmops.flow.project import Project
from slmops.flow.runner import Result, Watcher, run
from slmops.flow.state import State
from slmops.flow.tracking import Backend, Entry, Tracker, backends, require
from slmops.flow.tracking_mlflow import KEY, MLflow
from slmops.flow.tracking_tensorboard import TensorBoard
from tests.cli.conftest import Slmops, slmops  # noqa: F401
from tests.tiny import SPEC as TINY
from tests.tiny import write_project

Fake = dict[str, types.SimpleNamespace]

POINTS = [
    {"step": 2, "train_loss": 1.5, "validation_loss": None, "learning_rate": 0.01},
    {"step": 4, "train_loss": 0.75, "validation_loss": 0.875, "learning_rate": 0.002},
]
STEPS = [
    Step("read", "a", {"text": "1"}, {}, {"source": "data.txt"}),
    Step("student", "b", {"text": "2"}, {"x": "read"}, seed=5),
]


def spec(**settings: Any) -> Spec:
    words = {"name": "t", "task": {"type": "chat"}, "data": {"path": "d"}, "student": {"model": {}}}
    return Spec.model_validate_json(json.dumps({**words, "tracking": settings}))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server but the one that a test names, and short waits for it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_LOGGING_LEVEL", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR"):
        monkeypatch.setenv(name, {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "WARNING"}.get(name, "1"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def training(fake: Fake) -> Fake:
    """Method b trains: it writes a curve."""

    def train(params: Any, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Facts:
        (out / "training.json").write_text(json.dumps({"points": POINTS, "best_step": 4}))
        return {"seconds": 2.5, "tokens_per_s": 1000.0, "parameters": 77, "precision": "fp32", "stopped_early": False}

    fake["b"].run = train
    return fake


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow takes seconds to make its tables; tests copy these."""
    place = MLflow(tmp_path_factory.mktemp("store"), "x")
    place.open()
    return place.folder / "mlflow.db"


@pytest.fixture
def made(tmp_path: Path, empty_store: Path) -> None:
    """The tables of this test's project are there."""
    (tmp_path / ".slmops" / "mlflow").mkdir(parents=True)
    shutil.copyfile(empty_store, tmp_path / ".slmops" / "mlflow" / "mlflow.db")


def project_at(folder: Path, **settings: Any) -> Project:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.txt").write_text("row")
    return Project(folder / "slmops.yaml", folder, spec(**settings))


def go(
    project: Project, steps: list[Step] | None = None, places: list[Backend] | None = None
) -> tuple[Result, list[str]]:
    """Run with tracking, as the command does. Returns the result and the warnings."""
    said: list[str] = []
    state = State(project)
    tracker = Tracker(state, backends(project) if places is None else places, said.append)
    result = run(state, steps or STEPS, InlineExecutor(), tracker.watch(Watcher()))
    for step in steps or STEPS:
        tracker.see(step, result.records.get(step.id))
    tracker.close()
    return result, said


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def client_of(project: Project) -> Any:
    return MLflow(project.state, project.spec.tracking.experiment or project.spec.name).open()


def runs_of(project: Project) -> list[Any]:
    client = client_of(project)
    experiment = client.get_experiment_by_name(project.spec.tracking.experiment or project.spec.name)
    return list(client.search_runs([experiment.experiment_id]))


def test_tensorboard_holds_the_curve_the_facts_and_the_parameters(tmp_path: Path, training: Fake) -> None:
    project = project_at(tmp_path, tensorboard=True, experiment="team/desk")
    result, said = go(project)
    assert said == []
    key = tracking.key_of(result.records["student"]["parts"])
    folder = project.state / "tensorboard" / "team-desk" / f"student-{key[:8]}"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # the data step has nothing to tell
    found = events(folder)
    for name in tracking.CURVES:
        expected = [(p["step"], p[name]) for p in POINTS if p[name] is not None]
        assert {e.step: e.value for e in found.Scalars(name)} == pytest.approx(dict(expected))
    assert found.Scalars("fact/tokens_per_s")[0].value == 1000
    assert found.Scalars("fact/parameters")[0].value == 77
    text = found.Tensors("parameters")[0].tensor_proto.string_val[0].decode()
    assert "| text | 2 |" in text and "| seed | 5 |" in text
    about = found.Tensors("about")[0].tensor_proto.string_val[0].decode()
    assert key in about and result.outputs["student"] in about and result.outputs["read"] in about


def test_mlflow_holds_the_same(tmp_path: Path, made: None, training: Fake) -> None:
    project = project_at(tmp_path, mlflow=True)
    result, said = go(project)
    assert said == []
    (found,) = runs_of(project)
    key = tracking.key_of(result.records["student"]["parts"])
    assert found.info.run_name == f"student-{key[:8]}"
    assert found.info.status == "FINISHED"
    assert found.data.tags[KEY] == key
    assert found.data.tags["slmops.output"] == result.outputs["student"]
    assert found.data.tags["slmops.input.x"] == result.outputs["read"]
    assert found.data.params == {"text": "2", "seed": "5"}
    assert found.data.metrics["fact/tokens_per_s"] == 1000
    for name in tracking.CURVES:
        history = client_of(project).get_metric_history(found.info.run_id, name)
        assert [(m.step, m.value) for m in history] == [(p["step"], p[name]) for p in POINTS if p[name] is not None]
    assert (project.state / "mlflow" / "mlflow.db").is_file()


def test_nothing_is_told_twice_and_what_is_new_is(tmp_path: Path, made: None, training: Fake) -> None:
    project = project_at(tmp_path, tensorboard=True, mlflow=True)
    go(project)
    before = {p: p.stat().st_mtime_ns for p in (project.state / "tensorboard").rglob("*")}
    assert go(project)[0].ran == []
    tree = project.state / "mlflow" / "told"
    for path in tree.rglob("*"):  # forgotten: the store itself is asked
        if path.is_file():
            path.unlink()
    go(project)
    assert len(runs_of(project)) == 1
    assert {p: p.stat().st_mtime_ns for p in (project.state / "tensorboard").rglob("*")} == before
    other = Step("student", "b", {"text": "3"}, {"x": "read"}, seed=5)
    go(project, [STEPS[0], other])
    assert {r.data.params["text"] for r in runs_of(project)} == {"2", "3"}
    assert len(list((project.state / "tensorboard" / "t").iterdir())) == 2


def test_steps_that_were_finished_before_are_told_when_tracking_comes(tmp_path: Path, training: Fake) -> None:
    result, _ = go(project_at(tmp_path), places=[])
    assert result.ran and not (tmp_path / ".slmops" / "tensorboard").exists()
    project = project_at(tmp_path, tensorboard=True)
    assert go(project)[0].ran == []
    assert len(list((project.state / "tensorboard" / "t").iterdir())) == 1


def test_a_closed_port_is_one_warning(
    tmp_path: Path, made: None, training: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    project = project_at(tmp_path, tensorboard=True, mlflow=True)
    more = [*STEPS, Step("few", "b", {"text": "4"}, {"x": "read"})]
    result, said = go(project, more)
    assert sorted(result.ran) == ["few", "read", "student"]
    assert len(said) == 1
    assert said[0].startswith("warning: MLflow does not take student: ") and f":{port}" in said[0]
    assert "MLFLOW_TRACKING_URI" in said[0] and "run again" in said[0]
    assert len(list((project.state / "tensorboard" / "t").iterdir())) == 2  # the other tracker has everything
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert go(project, more)[1] == []
    assert len(runs_of(project)) == 2  # and the next run told what was missing


def test_a_server_that_never_answers_is_not_waited_for(
    tmp_path: Path, training: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        import mlflow  # noqa: F401  so that only the waiting is timed

        project = project_at(tmp_path, mlflow=True)
        begin = time.monotonic()
        result, said = go(project)
        assert result.ran == ["read", "student"]
        assert len(said) == 1 and said[0].startswith("warning: MLflow ")
        assert time.monotonic() - begin < 15


def test_a_tracker_that_hangs_does_not_hold_the_run(tmp_path: Path, training: Fake) -> None:
    import threading

    class Stuck:
        name, hint = "Stuck", "wait"

        def __init__(self) -> None:
            self.released = threading.Event()

        def has(self, entry: Entry) -> bool:
            return False

        def write(self, entry: Entry) -> None:
            self.released.wait(30)

    project, place, said = project_at(tmp_path), Stuck(), []
    state = State(project)
    tracker = Tracker(state, [place], said.append)
    result = run(state, STEPS, InlineExecutor(), tracker.watch(Watcher()))
    begin = time.monotonic()
    tracker.close(patience_s=0.2)
    assert time.monotonic() - begin < 5
    assert result.ran == ["read", "student"]
    assert said == ["warning: Stuck did not take everything within 0.2 s; the next run tells the rest"]
    place.released.set()


def test_half_written_events_are_not_taken_for_whole(tmp_path: Path) -> None:
    entry = Entry("student", "ab" * 32, "b", 1.0, 2.0, {}, (("train_loss", 1, 0.5),), files=(tmp_path / "absent.html",))
    place = TensorBoard(tmp_path, "x")
    with pytest.raises(FileNotFoundError):
        place.write(entry)
    assert not place.has(entry)
    (tmp_path / "absent.html").write_text("now it is there")
    place.write(entry)
    assert place.has(entry)
    assert [e.value for e in events(place.place(entry)).Scalars("train_loss")] == [0.5]


def test_long_and_odd_names_and_values_fit_mlflow(tmp_path: Path, made: None) -> None:
    params = {f"p{i}": "x" * 9000 for i in range(130)} | {"a+b|c": "1"}
    curve = tuple(("loss", i, float(i)) for i in range(1, 1500))
    place = MLflow(tmp_path / ".slmops", "x")
    place.write(Entry("student", "cd" * 32, "b", 1.0, 2.0, params, curve, {"score/a@b": 0.5}, {"says": "y" * 9000}))
    client = place.open()
    (found,) = client.search_runs([client.get_experiment_by_name("x").experiment_id])
    assert len(found.data.params) == 131 and found.data.params["a_b_c"] == "1"
    assert found.data.metrics["loss"] == 1499 and found.data.metrics["score/a_b"] == 0.5
    assert len(client.get_metric_history(found.info.run_id, "loss")) == 1499


def test_tracking_is_in_no_step(tmp_path: Path) -> None:
    assert plan(spec()) == plan(spec(tensorboard=True, mlflow=True, experiment="other"))


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboard"), ("mlflow", "mlflow-skinny"), ("mlflow", "alembic")]
)
def test_a_missing_extra_is_refused(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "version_of", lambda wanted: None if wanted == package else "9")
    with pytest.raises(MissingExtraError, match=package) as error:
        require(Tracking.model_validate({name: True}))
    assert f"slmops[{name}]" in error.value.hint
    require(Tracking())


def test_nothing_is_imported_when_tracking_is_off(tmp_path: Path) -> None:
    folder = write_project(tmp_path / "project")
    code = (
        "import sys; from slmops.cli.main import main; "
        f"code = main(['run', 'data', '-f', {str(folder)!r}]); "
        "print(code, [m for m in ('mlflow', 'tensorboard', 'sqlalchemy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


@pytest.mark.slow
def test_a_real_project_is_told_whole(tmp_path: Path, slmops: Slmops, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    folder = write_project(tmp_path / "project", TINY + "tracking: {tensorboard: true, mlflow: true}\n")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    first = slmops("run", folder=folder)
    assert first.err.count("warning: MLflow") == 1
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    again = slmops("run", folder=folder)
    assert again.code == first.code  # a dead server changed nothing
    assert again.started == []
    assert "nothing to do" in again.err and "warning" not in again.err
    from slmops.flow.project import load

    project = load(folder)
    state = State(project)
    steps = {s.step.id: s for s in state.survey(project.plan())}
    found = {run.data.tags["slmops.step"]: run for run in runs_of(project)}
    assert set(found) == {"teacher", "student", "few", "all", "report"}
    client = client_of(project)
    for id in ("teacher", "student", "few", "all"):
        status = steps[id]
        assert status.output is not None and status.key is not None
        curve = json.loads((state.store.path(status.output) / "training.json").read_text())["points"]
        scalars = events(project.state / "tensorboard" / "tiny" / f"{id}-{status.key[:8]}")
        for name in tracking.CURVES:
            expected = [(p["step"], p[name]) for p in curve if p[name] is not None]
            assert expected
            history = client.get_metric_history(found[id].info.run_id, name)
            assert [(m.step, m.value) for m in history] == expected
            assert {e.step: e.value for e in scalars.Scalars(name)} == pytest.approx(dict(expected))
        assert found[id].data.params["training.learning_rate"] == str(status.step.params["training"]["learning_rate"])
        assert found[id].data.metrics["fact/tokens_per_s"] > 0
    report = json.loads((project.outputs / "report.json").read_text())
    told = found["report"].data
    assert told.tags["slmops.verdict"] == report["verdict"]
    assert told.tags["slmops.gate.1.accuracy"].startswith(report["gates"][0]["verdict"])
    assert told.metrics["headline/size_reduction_vs_fp32"] == report["headline"]["size_reduction_vs_fp32"]["value"]
    scores = {v["name"]: v["scores"]["accuracy"]["value"] for v in report["variants"]}
    assert {n: told.metrics[f"score/{n}/accuracy"] for n in scores} == scores
    copy = Path(client.download_artifacts(found["report"].info.run_id, "report.html", str(tmp_path)))
    assert copy.read_bytes() == (project.outputs / "report.html").read_bytes()
    runs, written = len(found), sorted((project.state / "tensorboard").rglob("*"))
    assert slmops("run", folder=folder).code == first.code
    assert (len(runs_of(project)), sorted((project.state / "tensorboard").rglob("*"))) == (runs, written)

"""Running a plan: what is reused, what reruns, what a failure leaves behind."""

from __future__ import annotations

import dataclasses
import os
import types
from pathlib import Path

import pytest

from slmops.core.method import Context, Progress, SilentProgress
from slmops.core.spec import Spec
from slmops.core.step import Step
from slmops.errors import SlmopsError, StepError, StoppedError
from slmops.flow.executor import InlineExecutor, Task
from slmops.flow.project import Project
from slmops.flow.runner import Result, Watcher, run
from slmops.flow.state import State

Fake = dict[str, types.SimpleNamespace]

SPEC = Spec.model_validate_json(
    '{"name": "t", "task": {"type": "chat"}, "data": {"path": "d"}, "student": {"model": {}}}'
)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "data.txt").write_text("row")
    return Project(tmp_path / "slmops.yaml", tmp_path, SPEC)


def steps(**changes: dict[str, object]) -> list[Step]:
    plan = [
        Step("one", "a", {"text": "1"}, {}, {"source": "data.txt"}),
        Step("two", "b", {"text": "2"}, {"x": "one"}),
        Step("three", "c", {"text": "3"}, {"x": "two"}),
        Step("side", "b", {"text": "s"}, {"x": "one"}),
    ]
    return [dataclasses.replace(s, params={**s.params, **changes.get(s.id, {})}) for s in plan]


def go(project: Project, plan: list[Step]) -> Result:
    return run(State(project), plan, InlineExecutor())


def test_second_run_does_nothing_and_gives_the_same(project: Project, fake: Fake) -> None:
    first = go(project, steps())
    second = go(project, steps())
    assert first.ran == ["one", "two", "side", "three"] or sorted(first.ran) == ["one", "side", "three", "two"]
    assert second.ran == []
    assert second.outputs == first.outputs


def test_a_late_parameter_reruns_only_what_depends_on_it(project: Project, fake: Fake) -> None:
    go(project, steps())
    changed = steps(two={"text": "other"})
    survey = {s.step.id: s for s in State(project).survey(changed)}
    assert survey["two"].why == ("text changed: 2 → other",)
    assert survey["three"].why == ("waits for two",)
    assert sorted(go(project, changed).ran) == ["three", "two"]


def test_a_change_without_effect_stops_spreading(project: Project, fake: Fake) -> None:
    """Another version of a method that makes the same bytes: what comes after is reused."""
    go(project, steps())
    fake["b"].DECLARATION = dataclasses.replace(fake["b"].DECLARATION, version="2")
    survey = {s.step.id: s for s in State(project).survey(steps())}
    assert survey["two"].why == ("the method b itself changed: version 1 → 2",)
    assert sorted(go(project, steps()).ran) == ["side", "two"]


def test_neutral_parameters_do_not_rerun(project: Project, fake: Fake) -> None:
    go(project, steps())
    assert go(project, steps(two={"quiet": 7})).ran == []


def test_touching_a_source_reruns_nothing_changing_it_reruns_all(project: Project, fake: Fake) -> None:
    go(project, steps())
    source = project.root / "data.txt"
    os.utime(source, (1, 1))
    assert go(project, steps()).ran == []
    source.write_text("new row")
    survey = {s.step.id: s for s in State(project).survey(steps())}
    assert survey["one"].why[0].startswith("input source has other content")
    assert len(go(project, steps()).ran) == 4


def test_damaged_output_is_made_again(project: Project, fake: Fake) -> None:
    first = go(project, steps())
    file = State(project).store.path(first.outputs["two"]) / "out.txt"
    file.chmod(0o644)
    file.write_text("damage")
    state = State(project)
    status = {s.step.id: s for s in state.survey(steps())}["two"]
    assert status.why == ("its output is damaged or was removed",)
    state.store.remove(first.outputs["two"])
    second = go(project, steps())
    assert second.ran == ["two"]
    assert second.outputs == first.outputs


def test_a_failure_keeps_what_finished(project: Project, fake: Fake) -> None:
    with pytest.raises(StepError, match="step three failed: ZeroDivisionError: on purpose") as caught:
        go(project, steps(three={"fail": True}))
    assert "error.log" in caught.value.hint
    result = go(project, steps())
    assert "one" not in result.ran and "two" not in result.ran


def test_leftovers_of_a_killed_step_do_not_reach_the_output(project: Project, fake: Fake) -> None:
    state = State(project)
    status = state.survey(steps())[0]
    rest = state.root / "scratch" / str(status.key) / "out"
    rest.mkdir(parents=True)
    (rest / "half").write_text("half-written")
    result = go(project, steps())
    assert [p.name for p in state.store.path(result.outputs["one"]).iterdir()] == ["out.txt"]


def test_seed_and_params_make_other_keys(project: Project, fake: Fake) -> None:
    state = State(project)
    keys = {
        state.survey([dataclasses.replace(steps()[0], seed=seed, params={"text": text})])[0].key
        for seed in (0, 1)
        for text in ("x", "y")
    }
    assert len(keys) == 4


def test_a_watcher_may_go_on_without_a_failed_step(project: Project, fake: Fake) -> None:
    failed = []

    def note(step: Step, error: SlmopsError) -> bool:
        failed.append((step.id, error.message))
        return True

    result = run(State(project), steps(two={"fail": True}), InlineExecutor(), Watcher(failed=note))
    assert sorted(result.ran) == ["one", "side"], "what needs the failed step is left out, the rest is run"
    assert [id for id, _message in failed] == ["two"] and "on purpose" in failed[0][1]


def test_a_watcher_ends_a_step_by_an_error_and_nothing_of_it_stays(project: Project, fake: Fake) -> None:
    class Ends(SilentProgress):
        def log(self, text: str) -> None:
            raise StoppedError("enough")

    original = fake["b"].run

    def talks(params: object, inputs: object, out: Path, ctx: Context) -> object:
        ctx.progress.log("half way")
        return original(params, inputs, out, ctx)

    fake["b"].run = talks
    ended = []
    watcher = Watcher(progress=lambda step: Ends(), failed=lambda step, error: bool(ended.append(step.id)) or True)
    state = State(project)
    assert run(state, steps(), InlineExecutor(), watcher).ran == ["one"]
    assert sorted(ended) == ["side", "two"]
    assert not list((state.root / "scratch").iterdir())
    assert "three" in go(project, steps()).ran, "the next run starts them anew"


def test_a_watcher_may_refuse_what_is_cached(project: Project, fake: Fake) -> None:
    go(project, steps())

    def refuse(step: Step, record: dict[str, object]) -> None:
        if step.id == "two":
            raise StoppedError("not this one")

    watcher = Watcher(cached=refuse, failed=lambda step, error: step.id == "two")
    result = run(State(project), steps(), InlineExecutor(), watcher)
    assert set(result.outputs) == {"one", "side"} and result.ran == []


def test_the_same_work_under_two_names_is_done_once(project: Project, fake: Fake) -> None:
    """Even where both could start at the same time: they would share one scratch folder."""

    class Patient(InlineExecutor):
        capacity = 8

        def start(self, task: Task, progress: Progress) -> None:
            started.append(task.id)
            super().start(task, progress)

    started: list[str] = []
    first = Step("first", "a", {"text": "1"}, {}, {"source": "data.txt"})
    plan = [first, dataclasses.replace(first, id="second"), Step("end", "b", {}, {"x": "first", "y": "second"})]
    result = run(State(project), plan, Patient())
    assert started == ["first", "end"]
    assert result.outputs["first"] == result.outputs["second"]


def test_a_search_leaves_no_notes_for_why(project: Project, fake: Fake) -> None:
    run(State(project, notes=False), steps(), InlineExecutor())
    assert State(project).last(steps()[0]) is None
    go(project, steps())
    assert State(project).last(steps()[0]) is not None

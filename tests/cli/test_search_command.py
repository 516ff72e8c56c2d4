"""`slmops search` refuses what cannot work before anything is trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from slmops.store.files import exclusive
from tests.cli.conftest import Slmops
from tests.flow.search_projects import write

METRIC = "objectives: [{metric: validation_loss}]"


def test_a_file_without_a_search_section(project: Path, slmops: Slmops) -> None:
    slmops("search", folder=project).refused(2, "no search section", "search: {parameters")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--trials", "0"), "--trials must be at least 1"),
        (("--jobs", "-1"), "--jobs must be at least 1"),
        (("--on", "rya"), "--on rya: not a place to run"),
        (("--set", "search.sampler=tpee"), "did you mean tpe?"),
    ],
)
def test_bad_options(tmp_path: Path, slmops: Slmops, words: tuple[str, ...], says: str) -> None:
    outcome = slmops("search", *words, folder=write(tmp_path / "p"))
    outcome.refused(2, says)
    assert not outcome.started


@pytest.mark.parametrize("metric", ["validation_loss", "accuracy"])
def test_without_validation_data_nothing_is_trained(tmp_path: Path, slmops: Slmops, metric: str) -> None:
    few = ("rows.jsonl, ", "rows.jsonl, splits: {validation: 0.00001}, ")
    folder = write(tmp_path / "p", few, (METRIC, METRIC.replace("validation_loss", metric)))
    outcome = slmops("search", folder=folder)
    outcome.refused(2, "validation split", "test data is never looked at", "data.splits.validation")
    assert outcome.started == ["data"]


def test_no_validation_share_is_found_before_anything_runs(tmp_path: Path, slmops: Slmops) -> None:
    folder = write(tmp_path / "p", ("rows.jsonl, ", "rows.jsonl, splits: {validation: 0.0}, "))
    outcome = slmops("search", folder=folder)
    outcome.refused(2, "slmops.yaml:3: data.splits.validation", "too small to choose by")
    assert not outcome.started


def test_without_optuna_the_extra_is_named(tmp_path: Path, slmops: Slmops, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "p")
    monkeypatch.setitem(sys.modules, "optuna", None)
    outcome = slmops("search", folder=folder)
    outcome.refused(1, "optuna is not installed", "slmops[search]")
    assert not outcome.started


def test_without_ray_the_extra_is_named(project: Path, slmops: Slmops, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    slmops("run", "student", "--on", "ray", folder=project).refused(1, "ray is not installed", "slmops[ray]")


def test_another_run_in_the_project_is_not_disturbed(tmp_path: Path, slmops: Slmops) -> None:
    folder = write(tmp_path / "p")
    (folder / ".slmops").mkdir()
    with exclusive(folder / ".slmops" / "lock", "held"):
        slmops("search", folder=folder).refused(1, "another slmops run is at work")


@pytest.mark.slow
def test_trials_that_fail_are_noted_and_the_search_goes_on(tmp_path: Path, slmops: Slmops) -> None:
    """A rate at which training diverges; the step cache serves what the project trained before."""
    folder = write(
        tmp_path / "p",
        ("{low: 0.0003, high: 0.03, log: true}", "{choices: [0.01, 10000.0]}"),
        ("    train.dropout: {choices: [0.0, 0.1, 0.3]}\n    train.weight_decay: {low: 0, high: 0.2}\n", ""),
        ("parallel: 2", "parallel: 1"),
    )
    assert slmops("run", "student", "--set", "train.learning_rate=0.01", folder=folder).code == 0
    outcome = slmops("search", "--json", "--trials", "6", folder=folder)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    states = {(t["parameters"]["train.learning_rate"], t["state"]) for t in found["trials"]}
    assert states == {(0.01, "complete"), (10000.0, "failed")}, "both were tried"
    failed = [t["number"] for t in found["trials"] if t["state"] == "failed"]
    assert all("the loss" in found["trials"][n]["why"] for n in failed)
    assert found["set"] == {str(found["best"]): ["train.learning_rate=0.01"]}
    assert [id for id in outcome.started if id.startswith("student")] == [f"student@{n}" for n in failed]
    assert outcome.started.count(f"validate-loss@{found['best']}") == 1 == str(outcome.started).count("validate-loss")
    page = (folder / "outputs" / "tiny" / "search.html").read_text()
    assert "the loss" in page


@pytest.mark.slow
def test_scores_and_sizes_are_of_what_ships_on_validation_data(tmp_path: Path, slmops: Slmops) -> None:
    """With several objectives no training is given up, and the trials that none beats are told."""
    both = "objectives: [{metric: accuracy}, {metric: file_mb}, {metric: parameters}]"
    folder = write(
        tmp_path / "p",
        ("    train.dropout: {choices: [0.0, 0.1, 0.3]}\n", "    student.model.layers: {choices: [1, 2]}\n"),
        (METRIC, both),
    )
    outcome = slmops("search", "--json", "--trials", "3", folder=folder)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert "several objectives" in found["no_pruning"] and found["best"] is None and found["front"]
    records = {r["step"]: r for r in map(json.loads, (p.read_text() for p in (folder / ".slmops" / "steps").glob("*")))}
    trees = folder / ".slmops" / "store" / "trees"

    def output(step: str) -> Path:
        return trees / str(records[step]["output"]).removeprefix("sha256:")

    wanted = [json.loads(line)["messages"][0]["content"] for line in (output("data") / "validation.jsonl").open()]
    for trial in found["trials"]:
        rows = [json.loads(line) for line in (output(f"validate@{trial['number']}") / "predictions.jsonl").open()]
        right = sum(row["answer"].strip() == row["gold"] for row in rows) / len(rows)
        accuracy, megabytes, parameters = trial["values"]
        assert accuracy == pytest.approx(right) and [row["prompt"] for row in rows] == wanted
        files = output(f"student-int4@{trial['number']}").rglob("*.onnx*")
        assert megabytes == pytest.approx(sum(f.stat().st_size for f in files) / 1e6)
        layers = trial["parameters"]["student.model.layers"]
        assert parameters > (20_000 if layers == 2 else 10_000)
    assert not any(step.startswith("predict") for step in records), "nothing is judged on test data"

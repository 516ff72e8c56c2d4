"""The report: what is in it, what it refuses, and that its numbers are the ones a reader would compute."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from benchmarks.headline import table

from slmops.core.method import Context
from slmops.core.report import Report
from slmops.errors import DataError, UsageError
from slmops.evaluate import report
from tests.evaluate import made_up

TASK = {"type": "classification", "out_of_scope": "out_of_scope"}
Inputs = dict[str, Path]


def make(
    inputs: Inputs, out: Path, gates: list[dict[str, Any]] | None = None, task: dict[str, Any] | None = None, shipped: str = "student-int4"
) -> dict[str, Any]:  # fmt: skip
    params = report.Params.model_validate(
        {
            "name": "support-desk", "version": "3", "task": task or TASK, "shipped": shipped,
            "evaluate": {"gates": gates or [], "resamples": 300},
        },
        strict=False,
    )  # fmt: skip
    out.mkdir(parents=True)
    report.run(params, inputs, out, Context(seed=0, scratch=out, shared=out))
    value: dict[str, Any] = json.loads((out / "report.json").read_text())
    return value


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return made_up.classification(tmp_path_factory.mktemp("made-up"))


@pytest.fixture(scope="module")
def whole(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make(inputs, tmp_path_factory.mktemp("whole") / "out")


def rows_of(inputs: Inputs, variant: str) -> list[dict[str, Any]]:
    text = (inputs[f"predictions.{variant}"] / "predictions.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def share(rows: list[dict[str, Any]]) -> float:
    return sum(row["gold"] == row["answer"] for row in rows) / len(rows)


def test_scores_are_those_of_the_answers(inputs: Inputs, whole: dict[str, Any]) -> None:
    names = [variant["name"] for variant in whole["variants"]]
    assert names == ["teacher-torch", "teacher-fp32", "student-fp32", "student-int4", "all-int4", "few-int4"] or names == [
        "teacher-torch", "teacher-fp32", "student-fp32", "student-int4", "few-int4", "all-int4",
    ]  # fmt: skip
    for variant in whole["variants"]:
        score = variant["scores"]["accuracy"]
        assert score["value"] == pytest.approx(share(rows_of(inputs, variant["name"])))
        assert score["low"] < score["value"] < score["high"] and score["n"] == 900


def test_headline_is_like_for_like(inputs: Inputs, whole: dict[str, Any]) -> None:
    head = whole["headline"]
    kept = share(rows_of(inputs, "student-int4")) / share(rows_of(inputs, "teacher-fp32"))
    assert head["accuracy_retained"]["value"] == pytest.approx(kept)
    assert head["inference_time_reduction"]["value"] == pytest.approx(1 - 3.5 / 30, abs=0.01)
    assert head["memory_reduction"]["value"] == pytest.approx(1 - 1.1 / 34, abs=0.002)
    assert head["size_reduction_vs_fp32"]["value"] == pytest.approx(1 - 141 / 1000)
    assert head["size_reduction_vs_fp16"]["value"] == pytest.approx(1 - 141 / 480)
    for figure in head.values():
        assert figure["low"] <= figure["value"] <= figure["high"] and figure["basis"]
    assert "teacher-fp32" in head["inference_time_reduction"]["basis"]
    assert "not a confidence interval" in head["memory_reduction"]["basis"]
    assert "no fp16 file was made" in head["size_reduction_vs_fp16"]["basis"]


def test_deltas_add_up(whole: dict[str, Any]) -> None:
    steps = {c["name"]: c for c in whole["comparisons"]}
    assert list(steps) == ["distilling", "quantising", "both", "as_shipped"]
    parts = steps["distilling"]["accuracy"]["value"] + steps["quantising"]["accuracy"]["value"]
    assert steps["both"]["accuracy"]["value"] == pytest.approx(parts)
    assert steps["both"]["size_reduction"]["value"] == pytest.approx(1 - 141 / 21_000)
    assert steps["as_shipped"]["reference"] == "teacher-torch"
    assert steps["as_shipped"]["size_reduction"]["value"] is None
    for step in steps.values():
        d = step["accuracy"]
        assert d["low"] <= d["value"] <= d["high"] and 0 < d["detectable"] < 0.1 and d["test"] == "mcnemar_exact"


def test_baselines_say_whether_the_teacher_helped(tmp_path: Path, whole: dict[str, Any]) -> None:
    few = whole["no_teacher_baseline"]["few"]
    assert few["finding"] == "helped" and few["gold_labels"] == 160 and "the teacher helped" in few["says"]
    worse = made_up.classification(tmp_path / "in", skill={**made_up.SKILL, "student-int4": 0.5, "all-int4": 0.501})
    found = make(worse, tmp_path / "out")["no_teacher_baseline"]
    assert found["few"]["finding"] == "hurt" and "harm" in found["few"]["says"]
    assert found["all"]["finding"] == "no difference found" and "would show" in found["all"]["says"]


def test_gates(inputs: Inputs, tmp_path: Path) -> None:
    gates = [
        {"metric": "accuracy", "at_least": 0.9},
        {"metric": "accuracy", "at_least": 0.99},
        {"metric": "accuracy", "at_least": 0.955},
        {"metric": "memory_reduction", "at_least": 0.95},
        {"metric": "p95_ms", "at_most": 1.0},
        {"metric": "file_mb", "at_most": 0.2},
        {"metric": "quantization_loss", "at_most": 0.05},
    ]
    made = make(inputs, tmp_path / "out", gates)
    verdicts = [gate["verdict"] for gate in made["gates"]]
    assert verdicts == ["passed", "failed", "undecided", "passed", "failed", "passed", "passed"]
    needed = made["gates"][2]["needed"]
    assert needed["unit"] == "examples" and needed["count"] > 0 and f"{needed['count']:,}" in made["gates"][2]["says"]
    assert made["verdict"] == "failed" and "2 of 7" in made["says"]
    assert made["gates"][6]["value"] == pytest.approx(-made["comparisons"][1]["accuracy"]["value"])


def test_one_round_cannot_decide_memory(inputs: Inputs, tmp_path: Path) -> None:
    one = dict(inputs)
    one["measurement"] = made_up.write(tmp_path / "m", "measurement.json", made_up.measurement(rounds=1))
    made = make(one, tmp_path / "out", [{"metric": "memory_reduction", "at_least": 0.5}])
    assert made["verdict"] == "undecided" and "evaluate.measure.rounds" in made["gates"][0]["says"]
    assert made["headline"]["memory_reduction"]["value"] > 0.9 and made["headline"]["memory_reduction"]["low"] is None


def test_no_measurement_no_claims(inputs: Inputs, tmp_path: Path) -> None:
    less = {name: path for name, path in inputs.items() if name.startswith(("predictions", "data"))}
    made = make(less, tmp_path / "out", [{"metric": "inference_time_reduction", "at_least": 0.5}])
    head = made["headline"]
    assert [name for name, f in head.items() if f["value"] is not None] == ["accuracy_retained"]
    assert all("not" in f["basis"] for name, f in head.items() if f["value"] is None)
    assert made["gates"][0]["verdict"] == "undecided" and "Not measured" in made["gates"][0]["says"]
    assert made["synthesis"] is None and made["training"] == [] and made["self_check"] is None
    assert "not measured" in report.render_text(made)


def test_remote_teacher(inputs: Inputs, tmp_path: Path) -> None:
    remote = {n: p for n, p in inputs.items() if not n.endswith(("teacher-fp32", "teacher-torch", "training.teacher"))}
    remote["predictions.teacher-endpoint"] = inputs["predictions.teacher-torch"]
    made = make(remote, tmp_path / "out")
    assert [c["name"] for c in made["comparisons"]] == ["quantising", "as_shipped"]
    assert made["headline"]["accuracy_retained"]["value"] is not None
    assert "remote teacher" in made["headline"]["memory_reduction"]["basis"]
    assert made["variants"][0]["runtime"] == "endpoint"


def test_no_teacher_at_all(inputs: Inputs, tmp_path: Path) -> None:
    alone = {n: p for n, p in inputs.items() if "teacher" not in n and "few" not in n and "all" not in n}
    made = make(alone, tmp_path / "out")
    assert made["headline"]["accuracy_retained"]["value"] is None
    assert made["no_teacher_baseline"] == {"few": None, "all": None}
    assert [c["name"] for c in made["comparisons"]] == ["quantising"]
    report.render_text(made)


def test_fp32_ships(inputs: Inputs, tmp_path: Path) -> None:
    made = make(inputs, tmp_path / "out", shipped="student-fp32")
    assert "quantising" not in [c["name"] for c in made["comparisons"]]
    assert made["headline"]["size_reduction_vs_fp32"]["value"] == 0.0


def test_sections_of_side_facts(whole: dict[str, Any]) -> None:
    assert whole["synthesis"]["seen"] == 7040
    assert {d["filter"]: d["count"] for d in whole["synthesis"]["dropped"]}["duplicate"] == 377
    assert whole["data"]["removed"] == {"train_exact": 12, "train_near": 31}
    assert whole["data"]["counts"]["gold"] == 160 and whole["data"]["labels"] == len(made_up.LABELS)
    assert [t["name"] for t in whole["training"]] == ["teacher", "student", "few", "all"]
    assert len(whole["training"][0]["train"]) == 50 and len(whole["training"][0]["validation"]) == 10
    assert whole["wrong_count"] == round(900 * (1 - whole["variants"][3]["scores"]["accuracy"]["value"]))
    assert len(whole["wrong"]) == 20 and whole["wrong"] == sorted(whole["wrong"], key=lambda w: w["id"])
    worst = whole["confusions"][0]
    assert worst["recall"] == min(c["recall"] for c in whole["confusions"]) and worst["taken_count"] >= 1


def test_same_inputs_same_bytes(inputs: Inputs, tmp_path: Path) -> None:
    make(inputs, tmp_path / "a")
    make(inputs, tmp_path / "b")
    for name in ("report.json", "report.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_extraction(tmp_path: Path) -> None:
    def row(i: int, city: str) -> dict[str, Any]:
        gold = json.dumps({"name": "weather", "arguments": {"city": "Rome", "days": i}})
        answer = json.dumps({"arguments": {"city": city, "days": i}, "name": "weather"}) if city else "sorry"
        return {"id": f"{i:016x}", "prompt": f"weather {i}", "gold": gold, "answer": answer, "finished": bool(city)}

    good = [row(i, "Rome") for i in range(100)]
    bad = [row(i, "Rome" if i % 5 else "Paris" if i % 10 else "") for i in range(100)]
    inputs = {
        "predictions.teacher-fp32": made_up.predictions(tmp_path / "t", good),
        "predictions.student-int4": made_up.predictions(tmp_path / "s", bad),
    }
    made = make(inputs, tmp_path / "out", task={"type": "extraction"})
    student = made["variants"][1]
    assert made["metric"] == "exact_match" and student["scores"]["exact_match"]["value"] == pytest.approx(0.8)
    assert student["scores"]["valid"]["value"] == pytest.approx(0.9) and student["unfinished"] == 10
    fields = {f["field"]: f for f in student["fields"]}
    assert student["fields"][0]["field"] == "arguments.city" and fields["name"]["n"] == 100
    assert fields["arguments.city"]["f1"] == pytest.approx(2 * 80 / (2 * 80 + 10 + 20))
    assert made["comparisons"][0]["accuracy"]["worse"] == 20


def test_free_text_scores_between_0_and_1(tmp_path: Path) -> None:
    rows = [{"id": f"{i:016x}", "prompt": "p", "gold": "red green blue", "answer": "red green"} for i in range(50)]
    inputs = {
        "predictions.teacher-fp32": made_up.predictions(tmp_path / "t", [{**r, "answer": r["gold"]} for r in rows]),
        "predictions.student-int4": made_up.predictions(
            tmp_path / "s", rows[:25] + [{**r, "answer": "x"} for r in rows[25:]]
        ),
    }
    made = make(inputs, tmp_path / "out", task={"type": "summarisation"})
    difference = made["comparisons"][0]["accuracy"]
    assert made["metric"] == "rouge_l" and difference["test"] == "bootstrap" and difference["better"] is None
    assert difference["value"] == pytest.approx(0.4 - 1) and difference["p"] < 0.01 and made["wrong_count"] == 50


# What is refused


def test_other_examples_are_refused(inputs: Inputs, tmp_path: Path) -> None:
    rows = rows_of(inputs, "teacher-fp32")
    for name, changed, word in (
        ("fewer", rows[:-1], "share 899"),
        ("order", [rows[1], rows[0], *rows[2:]], "another order"),
        ("gold", [{**rows[0], "gold": "fees!"}, *rows[1:]], "gold answers"),
    ):
        wrong = inputs | {"predictions.teacher-fp32": made_up.predictions(tmp_path / name, changed)}
        with pytest.raises(DataError, match=word) as caught:
            make(wrong, tmp_path / f"out-{name}")
        assert caught.value.hint


@pytest.mark.parametrize(
    "line", ["not json", "[]", '{"id": "1"}', '{"id": "1", "prompt": "p", "gold": 1, "answer": ""}']
)
def test_broken_predictions_name_the_line(inputs: Inputs, tmp_path: Path, line: str) -> None:
    good = json.dumps({"id": "1", "prompt": "p", "gold": "g", "answer": "a"})
    broken = inputs | {"predictions.few-int4": made_up.write(tmp_path / "p", "predictions.jsonl", f"{good}\n{line}\n")}
    with pytest.raises(DataError, match=r"predictions\.jsonl:2: not a prediction"):
        make(broken, tmp_path / "out")


def test_broken_measurement_and_missing_subject(inputs: Inputs, tmp_path: Path) -> None:
    broken = inputs | {"measurement": made_up.write(tmp_path / "m", "measurement.json", {"variants": {"x": {}}})}
    with pytest.raises(DataError, match="not a measurement"):
        make(broken, tmp_path / "out")
    with pytest.raises(DataError, match="no predictions of student-int8"):
        make(inputs, tmp_path / "other", shipped="student-int8")
    with pytest.raises(UsageError, match="out of scope"):
        made = [{"metric": "out_of_scope_recall", "at_least": 0.5}]
        make(inputs, tmp_path / "third", made, task={"type": "classification"})


# Schema, text, import


def test_report_json_is_the_documented_schema(whole: dict[str, Any]) -> None:
    read = Report.model_validate_json(json.dumps(whole))
    assert read.model_dump(mode="json") == whole and whole["schema"] == 1
    with pytest.raises(ValueError, match="surprise"):
        Report.model_validate_json(json.dumps(whole | {"surprise": 1}))


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_schema_page_is_up_to_date() -> None:
    script = load(Path(__file__).parents[2] / "docs" / "report_schema.py")
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run: python docs/report_schema.py"


def test_every_field_of_the_schema_says_what_it_is() -> None:
    page = load(Path(__file__).parents[2] / "docs" / "report_schema.py").page()
    assert not [line for line in page.splitlines() if line.startswith("|") and line.endswith("|  |")]


def test_text(whole: dict[str, Any]) -> None:
    text = report.render_text(whole)
    assert "NO GATES" in text and "the teacher helped" in text and "quantising alone" in text
    assert max(map(len, text.splitlines())) <= 120


def test_the_method_module_is_light() -> None:
    code = (
        "import sys; import slmops.evaluate.report, slmops.evaluate.compare; "
        "print([m for m in ('numpy', 'scipy', 'jinja2', 'rouge_score', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_benchmark_reads_what_the_report_says(inputs: Inputs, whole: dict[str, Any]) -> None:
    first, second, mean = table({0: whole, 1: whole}).splitlines()[2:]
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert first[3:] == second[3:] and cells[0] == "0"
    scores = [share(rows_of(inputs, name)) for name in ("teacher-torch", "student-int4", "few-int4", "all-int4")]
    assert cells[-4:] == [f"{100 * score:.1f}" for score in scores]
    assert [cell.strip() for cell in mean.strip("|").split("|")][-4:] == cells[-4:]
    assert cells[3].startswith(f"{100 * whole['headline']['accuracy_retained']['value']:.1f} [")
    change = share(rows_of(inputs, "student-int4")) - share(rows_of(inputs, "student-fp32"))
    assert cells[6].startswith(f"{100 * change:+.2f} [")

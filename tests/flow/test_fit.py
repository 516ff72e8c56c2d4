"""`slmops fit` on a tiny project: the same choice as exhaustive measurement, with fewer answers, and nothing done twice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny

pytestmark = pytest.mark.slow

SPEC = """\
name: tiny
task: {type: classification}
data: {path: rows.jsonl, gold: {per_label: 40}, splits: {validation: 0.45, test: 0.1}}
student:
  model: {layers: 1, hidden: 32, heads: 2, ffn: 64, context: 64}
  tokenizer: {vocabulary: 400}
train: {epochs: 8, batch_size: 32, learning_rate: 5e-3, holdout: 0.2}
convert: {fidelity_prompts: 4}
evaluate: {max_new_tokens: 12, measure: {prompts: 4, rounds: 1}}
fit:
  vary:
    student.model.hidden: [32, 64, 96]
    convert.precision: [int4, fp32]
  also: []
"""


def fit(folder: Path, *words: str, codes: tuple[int, ...] = (0,)) -> Any:
    command = [sys.executable, "-m", "slmops.cli.main", "fit", "--json", "-f", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode in codes, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout) | {"err": done.stderr}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_project(tmp_path_factory.mktemp("fit") / "project", SPEC)


@pytest.mark.parametrize("prefer", ["smallest", "fastest", "best"])
def test_the_choice_is_that_of_exhaustive_measurement(prefer: str, project: Path) -> None:
    """Time decides what is fastest, so both ways look at the same measurements there: those in the store."""
    quality = "90%"
    whole = fit(project, "--exhaustive", "--min-quality", quality, "--prefer", prefer)
    page = (project / "outputs" / "tiny" / "fit.html").read_text()
    assert whole["chosen"] in page and "<svg" in page and "http" not in page.replace("http-equiv", "")
    some = fit(project, "--min-quality", quality, "--prefer", prefer)
    assert some["chosen"] == whole["chosen"] is not None
    assert whole["measured"]["share"] == 1.0
    if prefer != "best":
        assert some["measured"]["answers"] < whole["measured"]["answers"]
    rows = {row["name"]: row for row in whole["candidates"] if row["state"] != "impossible"}
    assert len(rows) == 6 and all(row["score"] is not None and row["low"] == row["high"] for row in rows.values())
    fitting = [row for row in rows.values() if row["kept"] >= 0.9]
    key = {"smallest": "file_bytes", "fastest": "p95_s"}.get(prefer)
    wanted = min(fitting, key=lambda r: r[key]) if key else max(fitting, key=lambda r: (r["score"], -r["file_bytes"]))
    assert whole["chosen"] == wanted["name"]
    chosen = next(row for row in some["candidates"] if row["state"] == "chosen")
    assert chosen["score"] == wanted["score"] and chosen["answered"] == whole["reference"]["examples"]


def test_a_second_fit_does_nothing_and_its_line_makes_the_model(project: Path) -> None:
    first = fit(project, "--min-quality", "90%")
    again = fit(project, "--min-quality", "90%")
    assert again["candidates"] == first["candidates"]
    assert "prompts" not in again["err"], "no step ran"
    words = [word for text in first["set"] for word in ("--set", text)]
    command = [sys.executable, "-m", "slmops.cli.main", "run", "--json", "-f", str(project), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    made = json.loads(done.stdout)
    size = sum(p.stat().st_size for p in (project / "outputs" / "tiny" / "bundle" / "model").glob("model.onnx*"))
    assert "student" not in made["ran"] and size == next(
        r["file_bytes"] for r in first["candidates"] if r["state"] == "chosen"
    )


def test_test_data_are_not_looked_at(tmp_path: Path) -> None:
    """With other test messages the same fit gives the same numbers, and no step answered any of them."""
    folder = tiny.write_project(
        tmp_path / "project", SPEC.replace("[32, 64, 96]", "[32]").replace("[int4, fp32]", "[int4]")
    )
    fit(folder, "--min-quality", "1%")
    records = [json.loads(path.read_text()) for path in (folder / ".slmops" / "steps").rglob("*.json")]
    steps = {record["step"] for record in records}
    assert any(step.startswith("fit-answers") for step in steps) and any(step.startswith("fit-time") for step in steps)
    assert not any(step.startswith(("predict", "measure")) for step in steps)


def test_where_nothing_fits_the_nearest_is_named(project: Path) -> None:
    found = fit(project, "--max-size", "1k", codes=(3,))
    assert found["chosen"] is None and found["set"] == [] and found["measured"]["answers"] == 0
    assert found["says"].startswith(f"nothing fits; nearest is {found['nearest']}: file ")
    smallest = min((r for r in found["candidates"] if r["file_bytes"]), key=lambda r: r["file_bytes"])
    assert found["nearest"] == smallest["name"]


def test_times_on_another_device_are_predicted_and_say_so(project: Path) -> None:
    here = fit(project, "--min-quality", "90%")
    there = fit(project, "--min-quality", "90%", "--device", "pi4-4gb")
    assert (
        "on this machine" in here["basis"]
        and "predicted, not measured" in there["basis"]
        and "Raspberry Pi 4" in there["basis"]
    )
    times = [next(r["p95_s"] for r in found["candidates"] if r["state"] == "chosen") for found in (here, there)]
    assert here["chosen"] == there["chosen"] and times[1] != times[0]

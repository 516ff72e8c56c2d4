"""The headline numbers of an example over several seeds: a table and JSON.

    python benchmarks/headline.py examples/clinc150/slmops.yaml --set data.path=DATA --seeds 0 1 2

The teacher keeps the seed of the file's `teacher.seed` (0 unless set), so that every student is compared with the same
teacher; data splits never depend on the seed. Runs go through `slmops run`, so finished steps are reused.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from slmops.flow.project import load

HEADLINE = (
    ("inference_time_reduction", "time"),
    ("memory_reduction", "memory"),
    ("accuracy_retained", "kept"),
    ("size_reduction_vs_fp32", "size/fp32"),
    ("size_reduction_vs_fp16", "size/fp16"),
)


def run(file: Path, overrides: list[str], seed: int) -> dict[str, Any]:
    """One seed's report."""
    changes = [f"seed={seed}", *overrides]
    if not any(change.startswith("teacher.seed=") for change in changes):
        changes.append("teacher.seed=0")
    command = [sys.executable, "-m", "slmops.cli.main", "run", "-f", str(file)]
    for change in changes:
        command += ["--set", change]
    code = subprocess.run(command, check=False).returncode
    if code not in (0, 3, 4):
        raise SystemExit(f"slmops run ended with {code}")
    report: dict[str, Any] = json.loads((load(file, changes).outputs / "report.json").read_text())
    return report


def table(reports: Mapping[int, Mapping[str, Any]]) -> str:
    """A Markdown table: a row a seed, then the means; figures in percent, intervals in brackets."""
    columns = [short for _name, short in HEADLINE] + [
        "quantising (points)",
        "teacher",
        "student",
        "few gold",
        "all gold",
    ]
    lines = ["| seed | " + " | ".join(columns) + " |", "| ---: |" + " ---: |" * len(columns)]
    for seed, report in reports.items():
        cells = [_cell(report["headline"].get(name)) for name, _short in HEADLINE]
        cells += [_points(report), *(_share(value) for value in _scores(report))]
        lines.append(f"| {seed} | " + " | ".join(cells) + " |")
    figures = [[(r["headline"].get(name) or {}).get("value") for name, _short in HEADLINE] for r in reports.values()]
    means = [_share(_mean(column)) for column in zip(*figures, strict=True)]
    scores = [_share(_mean(column)) for column in zip(*map(_scores, reports.values()), strict=True)]
    return "\n".join([*lines, "| mean | " + " | ".join([*means, "", *scores]) + " |"])


def _scores(report: Mapping[str, Any]) -> tuple[float | None, ...]:
    """What the teacher, the shipped student, and the same student on few and on all gold labels score, by the metric."""
    by_name = {v["name"]: v["scores"][report["metric"]]["value"] for v in report["variants"]}
    baselines = report["no_teacher_baseline"] or {}
    without = (baselines.get(name) or {} for name in ("few", "all"))
    teacher = next((value for name, value in by_name.items() if name.startswith("teacher")), None)
    return teacher, by_name.get(report["subject"]["variant"]), *(b.get("value") for b in without)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return mean(known) if known else None


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _cell(value: Mapping[str, Any] | None) -> str:
    if not value or value.get("value") is None:
        return "not known"
    text = f"{100 * value['value']:.1f}"
    if value.get("low") is not None:
        text += f" [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"
    return text


def _points(report: Mapping[str, Any]) -> str:
    for step in report["comparisons"]:
        if step["name"] == "quantising":
            d = step["accuracy"]
            return f"{100 * d['value']:+.2f} [{100 * d['low']:+.2f}, {100 * d['high']:+.2f}]"
    return ""


def main() -> None:
    """Run the seeds, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    reports: dict[int, dict[str, Any]] = {}
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        reports[seed] = run(options.file, options.overrides, seed)
        name = reports[seed]["subject"]["name"]
        (options.out / f"headline-{name}.json").write_text(json.dumps(reports, indent=1))
        (options.out / f"{name}-seed{seed}.html").write_bytes(
            (load(options.file, options.overrides).outputs / "report.html").read_bytes()
        )
    print(table(reports))


if __name__ == "__main__":
    main()

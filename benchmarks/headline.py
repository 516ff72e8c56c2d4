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


def table(reports: dict[int, dict[str, Any]]) -> str:
    """Rows by seed, then the mean."""
    lines = ["| seed | " + " | ".join(short for _name, short in HEADLINE) + " | quantising (points) |"]
    lines.append("| ---: |" + " ---: |" * (len(HEADLINE) + 1))
    for seed, report in reports.items():
        cells = [_cell(report["headline"].get(name)) for name, _short in HEADLINE]
        lines.append(f"| {seed} | " + " | ".join(cells) + f" | {_points(report)} |")
    cells = []
    for name, _short in HEADLINE:
        values = [
            r["headline"][name]["value"]
            for r in reports.values()
            if (r["headline"].get(name) or {}).get("value") is not None
        ]
        cells.append(f"{100 * mean(values):.1f} %" if values else "")
    lines.append("| mean | " + " | ".join(cells) + " | |")
    return "\n".join(lines)


def _cell(value: dict[str, Any] | None) -> str:
    if not value or value.get("value") is None:
        return "not known"
    text = f"{100 * value['value']:.1f}"
    if value.get("low") is not None:
        text += f" [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"
    return text


def _points(report: dict[str, Any]) -> str:
    delta = (report.get("comparisons") or {}).get("quantising")
    if not delta:
        return ""
    score = delta["score"]
    return f"{100 * score['difference']:+.2f} [{100 * score['low']:+.2f}, {100 * score['high']:+.2f}]"


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

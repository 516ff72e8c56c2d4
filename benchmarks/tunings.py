"""Full fine-tuning beside LoRA, QLoRA, DoRA and a bottleneck adapter, from one small base: a table and JSON.

    python benchmarks/tunings.py --base FOLDER --clinc150 FILE --banking77 FOLDER

FOLDER of the base comes from examples/wordnet. For each task and tuning the learning rate is the one of three with the
least validation loss after one epoch; the test data is looked at once, with that rate and all epochs. Every training is a
process of its own, in turns over the tunings; speed is the median of the one-epoch trainings, memory the most of any. All
cores are used; `taskset -c 0 python …` gives it one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
RATES = {
    "full": (3e-4, 1e-3, 3e-3),
    "lora": (1e-3, 3e-3, 1e-2),
    "qlora": (1e-3, 3e-3, 1e-2),
    "dora": (1e-3, 3e-3, 1e-2),
    "adapter": (1e-3, 3e-3, 1e-2),
}
BATCH = 32


class Task:
    """One project file of examples/tunings, with its data and the base."""

    def __init__(self, name: str, data: Path, base: Path, folder: Path) -> None:
        self.name = name
        self.folder = folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "slmops.yaml").write_text((ROOT / "examples" / "tunings" / f"{name}.yaml").read_text())
        self.fixed = [f"data.path={data.resolve()}", f"student.base={base.resolve()}", f"train.batch_size={BATCH}"]

    def run(self, steps: list[str], changes: list[str]) -> float:
        """`slmops run` in a process of its own; the most memory that it held, bytes."""
        command = [sys.executable, "-m", "slmops.cli.main", "run", *steps, "--jobs", "1", "--json", "-f", "slmops.yaml"]
        for change in [*self.fixed, *changes]:
            command += ["--set", change]
        child = subprocess.Popen(command, cwd=self.folder, stdout=subprocess.PIPE)
        assert child.stdout is not None
        said = child.stdout.read()
        _pid, status, usage = os.wait4(child.pid, 0)
        if os.waitstatus_to_exitcode(status):
            raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
        self.student: str = json.loads(said)["outputs"]["student"]
        return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def training(self) -> dict[str, Any]:
        """The facts of the training that the last run made or found."""
        records = (json.loads(file.read_text()) for file in (self.folder / ".slmops" / "steps").glob("*.json"))
        facts: dict[str, Any] = next(r["facts"] for r in records if r["output"] == self.student)
        return facts

    def report(self) -> dict[str, Any]:
        """The last report."""
        report: dict[str, Any] = json.loads((self._outputs() / "report.json").read_text())
        return report

    def _outputs(self) -> Path:
        return next((self.folder / "outputs").iterdir())


def chosen(task: Task, tunings: list[str], epochs: float) -> dict[str, dict[str, Any]]:
    """By tuning: its rate by validation loss, its speed in examples per second, its peak memory in bytes."""
    tried: dict[str, list[dict[str, Any]]] = {tuning: [] for tuning in tunings}
    for place in range(3):
        for tuning in tunings:
            rate = RATES[tuning][place]
            peak = task.run(
                ["student"], [f"train.tuning={tuning}", f"train.learning_rate={rate}", f"train.epochs={epochs}"]
            )
            told = task.training()
            tried[tuning].append({
                "rate": rate, "validation_loss": told["best_validation_loss"], "peak_bytes": peak,
                "examples_per_s": told["steps"] * BATCH / told["seconds"],
            })  # fmt: skip
    out = {}
    for tuning, rows in tried.items():
        best = min(rows, key=lambda row: row["validation_loss"])
        out[tuning] = {
            "rate": best["rate"], "tried": rows, "peak_bytes": max(row["peak_bytes"] for row in rows),
            "examples_per_s": median(row["examples_per_s"] for row in rows),
        }  # fmt: skip
    return out


def measure(task: Task, tunings: list[str], epochs: float, trial_epochs: float) -> dict[str, dict[str, Any]]:
    """The row of each tuning."""
    rows = chosen(task, tunings, trial_epochs)
    for tuning, row in rows.items():
        changes = [f"train.tuning={tuning}", f"train.learning_rate={row['rate']}", f"train.epochs={epochs}"]
        row["peak_bytes"] = max(row["peak_bytes"], task.run(["student"], changes))
        told = task.training()
        task.run([], changes)
        report = task.report()
        score = next(v for v in report["variants"] if v["name"] == report["subject"]["variant"])["scores"]["accuracy"]
        row |= {"accuracy": score["value"], "low": score["low"], "high": score["high"], "n": score["n"]}
        row |= {"trained_parameters": told["trained_parameters"], "parameters": told["parameters"]}
    return rows


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A Markdown table."""
    lines = [
        "| task | tuning | accuracy (95 %) | trained parameters | peak memory | examples/s | learning rate |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for task, rows in results.items():
        for tuning, row in rows.items():
            accuracy = f"{100 * row['accuracy']:.1f} % ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
            share = row["trained_parameters"] / row["parameters"]
            lines.append(
                f"| {task} | {tuning} | {accuracy} | {row['trained_parameters'] / 1e6:.2f} M ({100 * share:.0f} %) "
                f"| {row['peak_bytes'] / 1e6:.0f} MB | {row['examples_per_s']:.0f} | {row['rate']:g} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run what is asked for, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--clinc150", type=Path, help="data_full.json")
    parser.add_argument("--banking77", type=Path, help="the folder with train.csv and test.csv")
    parser.add_argument("--tunings", nargs="+", choices=tuple(RATES), default=list(RATES))
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--trial-epochs", type=float, default=1)
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for name in ("clinc150", "banking77"):
        data = getattr(options, name)
        if data is None:
            continue
        task = Task(name, data, options.base, options.out / "tunings")
        results[name] = measure(task, options.tunings, options.epochs, options.trial_epochs)
        (options.out / "tunings.json").write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()

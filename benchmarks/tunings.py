"""Full fine-tuning beside LoRA, QLoRA, DoRA and a bottleneck adapter, from one small base: a table and JSON.

    python benchmarks/tunings.py --base FOLDER --clinc150 FILE --banking77 FOLDER

FOLDER of the base comes from examples/wordnet. For each tuning the learning rate is the one of three with the least
validation loss on the first task, after all epochs or `--trial-epochs`, or what `--rates` says; the test data is looked at
once, with that rate and all epochs. Every training is a process of its own. Speed is the median over a task's trainings,
which on the first one are run in turns over the tunings; memory is the most of any. All cores are used;
`taskset -c 0 python …` gives it one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
RATES = {
    "full": (3e-4, 1e-3, 3e-3),
    "lora": (1e-3, 2e-3, 4e-3),
    "qlora": (1e-3, 2e-3, 4e-3),
    "dora": (1e-3, 2e-3, 4e-3),
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

    def run(self, steps: list[str], changes: list[str]) -> int:
        """`slmops run` in a process of its own; the most that one of its processes held, bytes (0: not seen)."""
        command = [sys.executable, "-m", "slmops.cli.main", "run", *steps, "--jobs", "1", "--json", "-f", "slmops.yaml"]
        for change in [*self.fixed, *changes]:
            command += ["--set", change]
        child = subprocess.Popen(command, cwd=self.folder, stdout=subprocess.PIPE)
        peaks: list[int] = []
        watcher = threading.Thread(target=watch, args=(child, peaks))
        watcher.start()
        said, _ = child.communicate()
        watcher.join()
        if child.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {child.returncode}")
        self.student: str = json.loads(said)["outputs"]["student"]
        return max(peaks, default=0)

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


def watch(child: subprocess.Popen[bytes], peaks: list[int]) -> None:
    """Look at the largest peak among a process's descendants until it ends. Linux tells the peak itself (VmHWM)."""
    while child.poll() is None:
        for process in psutil.Process(child.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error, OSError, IndexError):
                status = Path(f"/proc/{process.pid}/status")
                peak = int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 if status.exists() else None
                peaks.append(peak or process.memory_info().rss)
        time.sleep(0.2)


def tried(task: Task, tunings: list[str], epochs: float) -> dict[str, list[dict[str, Any]]]:
    """By tuning, for each rate: validation loss, peak memory in bytes, speed in examples per second."""
    rows: dict[str, list[dict[str, Any]]] = {tuning: [] for tuning in tunings}
    for place in range(3):
        for tuning in tunings:
            rows[tuning].append(train(task, tuning, RATES[tuning][place], epochs))
    return rows


def train(task: Task, tuning: str, rate: float, epochs: float) -> dict[str, Any]:
    """One training."""
    peak = task.run(["student"], changes(tuning, rate, epochs))
    told = task.training()
    return {
        "rate": rate, "validation_loss": told["best_validation_loss"], "peak_bytes": peak,
        "examples_per_s": told["steps"] * BATCH / told["seconds"],
        "trained_parameters": told["trained_parameters"], "parameters": told["parameters"],
    }  # fmt: skip


def changes(tuning: str, rate: float, epochs: float) -> list[str]:
    """What is set in the project file."""
    return [f"train.tuning={tuning}", f"train.learning_rate={rate}", f"train.epochs={epochs}"]


def measure(
    task: Task, rates: dict[str, float], epochs: float, trials: dict[str, list[dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """The row of each tuning.

    Args:
        trials: earlier trainings on this task, by tuning.
    """
    rows = {}
    for tuning, rate in rates.items():
        last = train(task, tuning, rate, epochs)
        task.run([], changes(tuning, rate, epochs))
        report = task.report()
        score = next(v for v in report["variants"] if v["name"] == report["subject"]["variant"])["scores"]["accuracy"]
        every = [*trials.get(tuning, []), last]
        rows[tuning] = last | {
            "accuracy": score["value"], "low": score["low"], "high": score["high"], "n": score["n"], "trials": every,
            "peak_bytes": max(row["peak_bytes"] for row in every),
            "examples_per_s": median(row["examples_per_s"] for row in every),
        }  # fmt: skip
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


def given_rate(text: str) -> tuple[str, float]:
    """`TUNING=RATE`."""
    tuning, _, value = text.partition("=")
    if tuning not in RATES:
        raise argparse.ArgumentTypeError(f"{tuning} is none of {', '.join(RATES)}")
    return tuning, float(value)


def main() -> None:
    """Run what is asked for, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--clinc150", type=Path, help="data_full.json")
    parser.add_argument("--banking77", type=Path, help="the folder with train.csv and test.csv")
    parser.add_argument("--tunings", nargs="+", choices=tuple(RATES), default=list(RATES))
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--trial-epochs", type=float, help="default: all; with few, rates that are too high look good")
    parser.add_argument(
        "--rates", nargs="+", default=[], type=given_rate, metavar="TUNING=RATE", help="tried by you before"
    )
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    rates: dict[str, float] = dict(options.rates)
    for name in ("clinc150", "banking77"):
        data = getattr(options, name)
        if data is None:
            continue
        task = Task(name, data, options.base, options.out / "tunings")
        unknown = [tuning for tuning in options.tunings if tuning not in rates]
        trials = tried(task, unknown, options.trial_epochs or options.epochs)
        for tuning, rows in trials.items():
            rates[tuning] = min(rows, key=lambda row: row["validation_loss"])["rate"]
        results[name] = measure(task, {t: rates[t] for t in options.tunings}, options.epochs, trials)
        (options.out / "tunings.json").write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()

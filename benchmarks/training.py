"""Training speed and memory of slmops, TRL and LLaMA-Factory, side by side on the CPU or a GPU: a table and JSON.

    python benchmarks/training.py            # three rounds of each case
    python benchmarks/training.py --quick    # one round of a few steps
    python benchmarks/training.py --llamafactory .venv-llamafactory/bin/python
    python benchmarks/training.py --cuda     # larger models on a GPU, in bf16, without LLaMA-Factory

It promises that all train the same model from the same first weights on the same token ids, batch size, epochs,
optimiser, learning rates, precision and threads, each in a fresh process, in turns (slmops, TRL, slmops, TRL, …), and
it stops if their tokens or steps differ. README.md beside it says what the columns mean and how the others are set up.

The first process imports nothing heavy: it starts workers, which are this same file with `--worker`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from training_systems import BATCH, SHAPES, TEACHER, VOCABULARY, Case, Job, make_inputs, work

BUILD = Path(__file__).resolve().parent.parent / "build" / "bench"
NAMES = {"slmops": "slmops", "trl": "TRL", "llamafactory": "LLaMA-Factory", "trainer": "transformers Trainer"}


def tuned(count: int, epochs: int, large: str = "5M", small: str = "0.7M") -> tuple[Case, ...]:
    """The tunings and the other methods, from a model that knows something already."""
    return (
        *(Case(f"{t} {large}", large, count, epochs, tuning=t, taught=True) for t in ("lora", "dora", "qlora")),
        Case(f"on_policy {large} to {small}", small, count, epochs, large, "on_policy", taught=True, rate=5e-4),
        Case(f"dpo {large}", large, count, epochs, method="dpo", taught=True, rate=1e-4),
        Case(f"orpo {large}", large, count, epochs, method="orpo", taught=True, rate=1e-4),
    )


FULL = (
    Case("sft 0.7M", "0.7M", 2048, 3),
    Case("sft 5M", "5M", 512, 2),
    Case("logits 5M to 0.7M", "0.7M", 512, 5, "5M", "logits"),
    *tuned(512, 2),
)
LARGE = (Case("logits 11M to 0.7M", "0.7M", 512, 5, "11M", "logits"),)  # with `--large`: its teacher takes minutes
QUICK = (
    Case("sft 0.7M", "0.7M", 512, 3),
    Case("sft 5M", "5M", 256, 1),
    Case("logits 5M to 0.7M", "0.7M", 256, 5, "5M", "logits"),
    *tuned(256, 1),
)
CUDA = (
    Case("sft 304M", "304M", 2048, 1),
    Case("logits 304M to 41M", "41M", 2048, 2, "304M", "logits"),
    *tuned(2048, 1, "304M", "41M"),
)
SAME = Case("one batch", "0.7M", BATCH, 20)  # one batch an epoch: the order of the data cannot matter


# -- the rounds --------------------------------------------------------------------------------------------------------


def start(job: Job, more: list[str], threads: int, log: Path) -> dict[str, Any]:
    """Run a worker in a fresh process and read what it wrote."""
    result = log.with_suffix(".result.json")
    result.unlink(missing_ok=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    if job.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, __file__, "--worker", json.dumps(asdict(job)), "--result", str(result), *more]
    with log.open("w", encoding="utf-8") as file:
        worker = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = worker.wait()
        finally:
            if worker.poll() is None:  # interrupted: with all that the worker has started
                os.killpg(worker.pid, signal.SIGKILL)
    if code or not result.exists():
        tail = "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-15:])
        raise SystemExit(f"the worker for {job.system}, {job.case.name} ended with {code}:\n{tail}\n(all of it: {log})")
    found: dict[str, Any] = json.loads(result.read_text("utf-8"))
    return found


def machine(threads: int, device: str) -> dict[str, Any]:
    """What the numbers belong to."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    packages = {name: version(name) for name in ("torch", "transformers", "trl", "accelerate", "datasets")}
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {
        "cpu": model, "cores": os.cpu_count(), "threads": threads, "load_before": load, "python": platform.python_version(),
        "packages": packages, "gpu": gpu_name() if device == "cuda" else None,
    }  # fmt: skip


def covers(system: str, case: Case) -> bool:
    """Whether a system can train the case: LLaMA-Factory has no distillation, the plain Trainer the cross-entropy alone."""
    if system == "llamafactory":
        return case.method in ("sft", "dpo", "orpo")
    return system != "trainer" or (case.method, case.tuning) == ("sft", "full")


def gpu_name() -> str:
    """The GPU, as a process of its own sees it: this one stays free of torch."""
    code = "import torch; print(torch.cuda.get_device_name())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def summary(case: Case, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of all sides, the ratio of the medians and the lowest and highest ratio of a round."""
    middle: dict[str, dict[str, Any]] = {
        system: {k: median(r[k] for r in rows) for k, v in rows[0].items() if isinstance(v, float | int)}
        for system, rows in runs.items()
    }
    ratios: dict[str, Any] = {}
    for other in list(runs)[1:]:
        ratios[other] = {}
        for name in ("examples_per_s", "whole_s", "whole_cpu_s", "peak_mb", "gpu_mb"):
            if not middle["slmops"][name]:
                continue
            rounds = [a[name] / b[name] for a, b in zip(runs["slmops"], runs[other], strict=True)]
            value = middle["slmops"][name] / middle[other][name]
            ratios[other][name] = {"value": value, "low": min(rounds), "high": max(rounds)}
    return {**asdict(case), "batch_size": BATCH, "median": middle, "slmops_to": ratios, "rounds": runs}


def table(cases: list[dict[str, Any]]) -> str:
    """A Markdown table: for each case a row a system and the ratios to slmops."""
    lines = [
        "| case | system | examples/s | cache (s) | training (s) | whole job (s) | CPU (s) | peak MB | GPU MB | validation loss "
        "| KL to teacher |",
        "| --- | --- |" + " ---: |" * 9,
    ]
    for case in cases:
        for system, m in case["median"].items():
            cells = [
                f"{m['examples_per_s']:,.1f}", f"{m['cache_s']:.1f}" if m["cache_s"] else "", f"{m['train_s']:.1f}",
                f"{m['whole_s']:.1f}", f"{m['whole_cpu_s']:.1f}", f"{m['peak_mb']:,.0f}",
                f"{m['gpu_mb']:,.0f}" if m["gpu_mb"] else "", f"{m['loss']:.4f}",
                f"{m['kl']:.4f}" if "kl" in m else "",
            ]  # fmt: skip
            lines.append(
                f"| {case['name'] if system == 'slmops' else ''} | {NAMES[system]} | " + " | ".join(cells) + " |"
            )
        for other, ratio in case["slmops_to"].items():
            speed = ratio["examples_per_s"]
            cells = [f"**×{speed['value']:.2f}** ({speed['low']:.2f}–{speed['high']:.2f})", "", ""]
            for name in ("whole_s", "whole_cpu_s", "peak_mb", "gpu_mb"):
                cells.append(f"×{ratio[name]['value']:.2f}" if name in ratio else "")
            lines.append(f"| | slmops / {NAMES[other]} | " + " | ".join([*cells, "", ""]) + " |")
    return "\n".join(lines)


def check_same(case: Case, results: dict[str, dict[str, Any]], tolerance: float | None = None) -> None:
    """All sides must have made the same number of steps over the same tokens, and learned the same where that is due.

    Args:
        tolerance: how far the validation losses may lie apart; None: not looked at.
    """
    for name in ("steps", "tokens"):
        values = {system: result[name] for system, result in results.items()}
        if len(set(values.values())) > 1:
            raise SystemExit(f"{case.name}: the sides differ in {name}, so nothing can be compared: {values}")
    losses = {system: result["loss"] for system, result in results.items()}
    if tolerance is not None and max(losses.values()) - min(losses.values()) > tolerance:
        raise SystemExit(f"{case.name}: the sides do not learn the same: validation losses {losses}")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds of all cases."""
    offered = CUDA if options.cuda else QUICK if options.quick else FULL
    device = "cuda" if options.cuda else "cpu"
    offered += LARGE if options.large else ()
    cases = [c for c in offered if not options.only or any(text in c.name for text in options.only)]
    if not cases:
        raise SystemExit(f"no case is called {options.only}; there are: {', '.join(c.name for c in offered)}")
    rounds = options.rounds or (1 if options.quick else 3)
    found: dict[str, Any] = {
        "machine": machine(options.threads, device),
        "precision": options.precision,
        "quick": options.quick,
    }
    BUILD.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - begun:6.0f} s  {text}", file=sys.stderr, flush=True)

    made_of = json.dumps(
        [SHAPES, [asdict(c) for c in [*cases, SAME]], TEACHER[options.quick], options.seed, VOCABULARY]
    )
    inputs = BUILD / f"inputs-{hashlib.sha256(made_of.encode()).hexdigest()[:10]}"
    if not (inputs / "done").exists():
        say("making data, tokenizer, first weights and teachers (kept for the next time)")
        shutil.rmtree(inputs, ignore_errors=True)
        job = Job(
            "setup",
            cases[0],
            str(inputs),
            str(BUILD / "setup"),
            options.threads,
            options.precision,
            options.seed,
            device=device,
        )
        more = ["--setup", json.dumps([asdict(c) for c in [*cases, SAME]]), *(["--quick"] if options.quick else [])]
        start(job, more, options.threads, BUILD / "setup.log")
        (inputs / "done").touch()
    asked = {"trl": options.trl, "llamafactory": options.llamafactory, "trainer": options.trainer}
    systems = ("slmops", *(system for system, wanted in asked.items() if wanted))

    def one(system: str, case: Case, label: str) -> dict[str, Any]:
        shutil.rmtree(BUILD / "work", ignore_errors=True)
        out = str(BUILD / "work" / "model")
        python = str(options.llamafactory or "")
        job = Job(system, case, str(inputs), out, options.threads, options.precision, options.seed, python, device)
        result = start(job, [], options.threads, BUILD / f"{system}.log")
        if "packages" in result:
            found["machine"][f"{system}_packages"] = result.pop("packages")
        say(
            f"{label}  {case.name:<20} {NAMES[system]:<13} {result['examples_per_s']:8.1f} examples/s"
            f"  {result.get('gpu_mb') or result['peak_mb']:6.0f} MB  validation loss {result['loss']:.4f}"
        )
        return result

    same = {system: one(system, SAME, "check") for system in systems}
    check_same(SAME, same, 1e-3 if options.precision == "fp32" else 3e-2)
    found["same_batches_validation_loss"] = {system: result["loss"] for system, result in same.items()}
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {
        case.name: {system: [] for system in systems if covers(system, case)} for case in cases
    }
    for number in range(rounds):
        for case in cases:
            for system, results in runs[case.name].items():
                results.append(one(system, case, f"round {number + 1}/{rounds}"))
            check_same(case, {system: results[-1] for system, results in runs[case.name].items()})
    shutil.rmtree(BUILD / "work", ignore_errors=True)
    found["cases"] = [summary(case, runs[case.name]) for case in cases]
    found["seconds"] = round(time.perf_counter() - begun, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of a few steps: does it work, roughly how fast")
    parser.add_argument("--rounds", type=int, help="default: 3, with --quick 1")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads of all sides")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: fp32, with --cuda bf16")
    parser.add_argument("--cuda", action="store_true", help="larger models, on a GPU")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="cases whose name holds one of these")
    parser.add_argument("--large", action="store_true", help="also distillation from an 11 M teacher")
    parser.add_argument("--no-trl", dest="trl", action="store_false", help="leave TRL out")
    parser.add_argument("--trainer", action="store_true", help="also the plain Trainer of transformers, for SFT")
    parser.add_argument(
        "--llamafactory", type=Path, metavar="PYTHON", help="also LLaMA-Factory, with the interpreter that has it"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=BUILD / "training.json", help="where the numbers go")
    for hidden in ("--worker", "--result", "--setup"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cuda and options.llamafactory:
        raise SystemExit("--cuda: LLaMA-Factory is run on the CPU alone; leave --llamafactory out")
    options.precision = options.precision or ("bf16" if options.cuda else "fp32")
    if options.worker:
        told = json.loads(options.worker)
        job = Job(**{**told, "case": Case(**told["case"])})
        result: dict[str, Any] = {}
        if options.setup:
            make_inputs(job, [Case(**c) for c in json.loads(options.setup)], options.quick)
        else:
            result = work(job)
        Path(options.result).write_text(json.dumps(result), "utf-8")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worker is stopped too
    found = measure(options)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(table(found["cases"]))
    host, same = found["machine"], found["same_batches_validation_loss"]
    losses = ", ".join(f"{NAMES[system]} {loss:.6f}" for system, loss in same.items())
    print(f"\nValidation loss after {SAME.epochs} steps on one and the same batch: {losses}.")
    print(
        f"{host['gpu'] or host['cpu']}, {options.threads} threads, {options.precision}, load before {host['load_before']}"
    )
    print(f"wrote {options.json}")


if __name__ == "__main__":
    main()

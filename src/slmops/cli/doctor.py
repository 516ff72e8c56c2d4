"""`slmops doctor`: what this machine has, what is missing, and the line that installs it."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from slmops.cli.common import cores, json_argument, print_json, ram, size
from slmops.core.layout import columns

HELP = "show what this machine has, what is missing, and the line that installs it"

EPILOG = """\
--save takes a second or two. The file that it writes says what one core and the memory reached; copy it to another machine's folder of
devices (SLMOPS_DEVICES, or slmops/devices among the user's settings) to plan there for this one.

  slmops doctor --save gateway-7
  slmops catalog --fits gateway-7"""

INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "asimd", "bf16", "i8mm")


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `doctor` takes."""
    parser.add_argument(
        "--save", metavar="NAME",
        help="also measure one core and the memory, and keep this machine as a device of that name for fit and catalog",
    )  # fmt: skip
    json_argument(parser)


def run(options: argparse.Namespace) -> int:
    """Print the findings. Exit code 0: doctor reports, it does not judge."""
    if options.save is not None:
        from slmops.catalog.devices import check_name

        check_name(options.save)
    found = examine()
    if options.save is not None:
        found["device"] = _save(options.save, found["machine"])
    if options.json:
        print_json(found)
        return 0
    machine = found["machine"]
    rows = [
        ["system", f"{machine['system']}, Python {machine['python']}"],
        [
            "processor",
            f"{machine['cores']} cores, {machine['processor']} ({', '.join(machine['instructions']) or 'plain'})",
        ],
        ["memory", f"{size(machine['memory_bytes'])}, {size(machine['memory_free_bytes'])} free"],
        ["disk", f"{size(machine['disk_free_bytes'])} free here"],
        ["accelerator", machine["accelerator"] or "none found"],
    ]
    print("\n".join(columns(rows)))
    print()
    rows = [["extra", "", "for", "packages"]]
    for name, extra in found["extras"].items():
        missing = extra["missing"]
        state = "ok" if not missing else "if wanted" if name in FEW else f"{len(missing)} missing"
        listing = ", ".join(f"{p} {v}" if v else f"{p}: missing" for p, v in extra["packages"].items())
        rows.append([name, state, extra["for"], listing])
    print("\n".join(columns(rows)))
    print()
    if found["install"]:
        print(f"install what is missing:\n  {found['install']}")
    else:
        print("everything is here: `slmops init NAME` makes a first project")
    if options.save:
        device = found["device"]
        print(
            f"\nkept as {options.save}: a core reaches {device['core_gflops']:g} GFLOP/s, the memory {device['memory_gbytes']:g} GB/s\n"
            f"  {device['file']}\n  slmops catalog --fits {options.save}"
        )
    return 0


def _save(name: str, machine: dict[str, Any]) -> dict[str, Any]:
    """Measure this machine and keep it as a device; its profile, with the file.

    Raises:
        MissingExtraError: numpy, which measures, is not installed.
    """
    import importlib.util

    from slmops.catalog import devices
    from slmops.errors import MissingExtraError

    if importlib.util.find_spec("numpy") is None:
        raise MissingExtraError("numpy", "runtime")
    speed = devices.measure_here()
    facts = {
        "title": f"{name} ({machine['processor']})", "ram_gb": round(machine["memory_bytes"] / 1e9, 3), "cores": machine["cores"],
        "core_gflops": round(speed.gflops, 1), "memory_gbytes": round(speed.gbytes, 1),
        "instructions": list(machine["instructions"]), "accelerator": machine["accelerator"], "system": machine["system"],
    }  # fmt: skip
    return facts | {"name": name, "file": str(devices.save(name, facts))}


EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "data": ("near-duplicates", ("datasketch", "numpy")),
    "train": ("training", ("torch", "transformers", "tokenizers", "safetensors", "peft")),
    "qlora": ("training over a base in 4 bits", ("bitsandbytes",)),
    "convert": ("conversion", ("onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-genai")),
    "gguf": ("writing GGUF for llama.cpp", ("gguf",)),
    "runtime": ("running, chat", ("onnxruntime-genai", "onnxruntime", "tokenizers", "psutil")),
    "serve": ("serving", ("starlette", "uvicorn", "prometheus-client", "onnxruntime", "tokenizers", "llguidance")),
    "otel": ("traces of a server", ("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http")),
    "evaluate": ("judging", ("scipy", "rouge-score")),
    "azure": ("pulling from Azure AI Foundry", ("azure-ai-ml", "azure-identity", "azure-storage-blob")),
    "hub": ("Hugging Face hub", ("huggingface_hub", "datasets")),
    "search": ("hyperparameter search", ("optuna",)),
    "tensorboard": ("tracking in TensorBoard", ("tensorboard",)),
    "mlflow": ("tracking in MLflow", ("mlflow-skinny", "sqlalchemy", "alembic")),
    "ray": ("steps on a Ray cluster", ("ray",)),
    "llamacpp": ("GGUF in fewer bits, running GGUF; compiled here", ("llama-cpp-python", "gguf")),
    "mlx": ("writing and running MLX", ("mlx", "mlx-lm")),
    "openvino": ("writing and running OpenVINO", ("openvino",)),
    "litert": ("writing and running LiteRT", ("ai-edge-litert",)),
    "executorch": ("writing and running ExecuTorch", ("executorch", "torchao")),
}
FEW = ("ray", "azure", "llamacpp", "mlx", "openvino", "litert", "executorch")
"""Large extras that only some users want: they are missed only by those."""


def examine() -> dict[str, Any]:
    """Machine and packages as JSON values; sizes in bytes."""
    from slmops.flow.methods import version_of

    memory = _memory()
    extras: dict[str, Any] = {}
    for name, (purpose, packages) in EXTRAS.items():
        versions = {package: version_of(package) for package in packages}
        extras[name] = {"for": purpose, "packages": versions, "missing": [p for p, v in versions.items() if v is None]}
    missing = [name for name, extra in extras.items() if extra["missing"] and name not in FEW]
    torch = "torch==2.13.0 " if "train" in missing and version_of("torch") is None else ""
    return {
        "machine": {
            "system": platform.platform(terse=True),
            "python": platform.python_version(),
            "processor": _processor(),
            "cores": cores(),
            "instructions": _instructions(),
            "memory_bytes": memory.get("MemTotal", 0),
            "memory_free_bytes": memory.get("MemAvailable", 0),
            "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
            "accelerator": _accelerator(),
        },
        "extras": extras,
        "install": f"{Path(sys.executable).name} -m pip install {torch}'slmops[{','.join(missing)}]'"
        if missing
        else "",
    }


def _memory() -> dict[str, int]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # a Mac: it does not say what is free
        return {"MemTotal": ram()} if hasattr(os, "sysconf") else {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}


def _cpuinfo(key: str) -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.split(":")[0].strip() == key:
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return ""


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _instructions() -> list[str]:
    have = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return [name for name in INSTRUCTIONS if name in have]


def _accelerator() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    import subprocess

    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "; ".join(done.stdout.strip().splitlines()) if done.returncode == 0 else ""

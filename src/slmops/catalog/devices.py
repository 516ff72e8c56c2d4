"""Device profiles: what a device that is not here can hold, and how much slower than this machine it is likely to be.

A profile gives the peak of one core (float32 operations a second) and of the memory (bytes a second) as its makers state them. The
time that a model takes here is multiplied by the worse of the two ratios, both sides counted by the same rule of thumb: a program
reaches SHARE of either peak. This is a prediction and says so; a measurement on the device is worth more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML

from slmops.errors import UsageError

SHARE = 0.6
"""Of a peak, what a program is taken to reach on a device that was not measured."""
HERE = "this"


@dataclass(frozen=True)
class Device:
    """A device. `gflops`: of one core, 10^9 float32 operations a second; `gbytes`: of the memory, 10^9 bytes a second."""

    name: str
    title: str
    ram_bytes: float
    cores: int
    gflops: float
    gbytes: float


def known() -> dict[str, Device]:
    """The profiles that come with slmops, by name."""
    text = (Path(__file__).parent / "devices.yaml").read_text(encoding="utf-8")
    rows = YAML(typ="safe").load(text)
    return {
        name: Device(name, row["title"], row["ram_gb"] * 1e9, row["cores"], row["core_gflops"], row["memory_gbytes"])
        for name, row in rows.items()
    }


def find(name: str) -> Device | None:
    """A profile by name; None for this machine.

    Raises:
        UsageError: there is none of that name.
    """
    import difflib

    if name == HERE:
        return None
    found = known()
    if name not in found:
        close = difflib.get_close_matches(name, found, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UsageError(f"there is no device {name}", f"{hint}devices: {HERE}, {', '.join(found)}")
    return found[name]


@dataclass(frozen=True)
class Speed:
    """What one core of this machine reaches: 10^9 float32 operations and 10^9 bytes read a second."""

    gflops: float
    gbytes: float


def measure_here() -> Speed:
    """One core of this machine, measured in about a second in a process of its own that has one thread."""
    import json
    import os
    import subprocess
    import sys

    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-m", "slmops.catalog.devices"], env={**os.environ, **one, "PYTHONPATH": path},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return Speed(**json.loads(done.stdout))


def _measure() -> Speed:
    """Matrix products, and sums over 256 MB; best of seven each."""
    import numpy as np

    size = 512
    a, b = (np.random.default_rng(i).standard_normal((size, size), np.float32) for i in (0, 1))
    block = np.ones(32_000_000, np.float64)
    products, sums = (min(_timed(work) for _ in range(7)) for work in (lambda: a @ b, lambda: block.sum()))
    return Speed(2 * size**3 / products / 1e9, block.nbytes / sums / 1e9)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@dataclass(frozen=True)
class Slowdown:
    """How many times longer a model is likely to take on a device than here, and why."""

    factor: float
    basis: str


def slowdown(device: Device, here: Speed) -> Slowdown:
    """The worse of the ratios of cores and of memories."""
    cores, memory = here.gflops / (device.gflops * SHARE), here.gbytes / (device.gbytes * SHARE)
    factor = max(cores, memory)
    by = "cores" if cores >= memory else "memories"
    return Slowdown(
        factor,
        f"times on {device.title} are predicted, not measured: {factor:.1f} times those of this machine, the ratio of the {by}. One core "
        f"here reaches {here.gflops:.0f} GFLOP/s and reads {here.gbytes:.1f} GB/s (measured); there {SHARE:.0%} of "
        f"{device.gflops:g} GFLOP/s and of {device.gbytes:g} GB/s (as its makers state the peaks)",
    )


if __name__ == "__main__":
    import dataclasses
    import json

    print(json.dumps(dataclasses.asdict(_measure())))

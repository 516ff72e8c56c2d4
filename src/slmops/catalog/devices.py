"""Device profiles: what a device that is not here can hold, and how much slower than this machine it is likely to be.

A profile gives the peak of one core (float32 operations a second) and of the memory (bytes a second) as its makers state them. The
time that a model takes here is multiplied by the worse of the two ratios, both sides counted by the same rule of thumb: a program
reaches SHARE of either peak. This is a prediction and says so; a measurement on the device is worth more.

A machine that was measured (`slmops doctor --save NAME`) is a device too: a file in `folder()` that can be carried to another machine.
What one of its cores reaches is known then, so it is taken whole.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from slmops.errors import UsageError

SHARE = 0.6
"""Of a peak, what a program is taken to reach on a device that was not measured."""
HERE = "this"


@dataclass(frozen=True)
class Device:
    """A device. `gflops`: of one core, 10^9 float32 operations a second; `gbytes`: of the memory, 10^9 bytes a second; both the makers'
    peaks, or what a program reached there where they were `measured`. Of a `gpu`, memory and bandwidth are its own."""

    name: str
    title: str
    ram_bytes: float
    cores: int
    gflops: float
    gbytes: float
    measured: bool = False
    gpu: bool = False

    @property
    def share(self) -> float:
        """Of `gflops` and `gbytes`, what a program is taken to reach."""
        return 1.0 if self.measured else SHARE


def known() -> dict[str, Device]:
    """The profiles that come with slmops and those that were saved here, by name.

    Raises:
        UsageError: a saved one cannot be read.
    """
    text = (Path(__file__).parent / "devices.yaml").read_text(encoding="utf-8")
    found = {name: _device(name, row) for name, row in YAML(typ="safe").load(text).items()}
    for file in sorted(folder().glob("*.yaml")):
        try:
            found.setdefault(file.stem, _device(file.stem, YAML(typ="safe").load(file.read_text(encoding="utf-8"))))
        except (OSError, YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
            says = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UsageError(
                f"{file} is no device profile: {says}", "remove it, or save it again: slmops doctor --save NAME"
            ) from None
    return found


def _device(name: str, row: Mapping[str, Any]) -> Device:
    return Device(
        name, str(row["title"]), float(row["ram_gb"]) * 1e9, int(row["cores"]), float(row["core_gflops"]),
        float(row["memory_gbytes"]), bool(row.get("measured", False)), bool(row.get("gpu", False)),
    )  # fmt: skip


def folder() -> Path:
    """Where saved profiles lie: `slmops/devices` in the user's settings (XDG_CONFIG_HOME, or ~/.config), or as SLMOPS_DEVICES says."""
    own = os.environ.get("SLMOPS_DEVICES")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CONFIG_HOME") or ""
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".config") / "slmops" / "devices"


def check_name(name: str) -> None:
    """Refuse a name that a saved profile cannot have.

    Raises:
        UsageError: it is taken by a profile of slmops' own, or is no plain name.
    """
    own = YAML(typ="safe").load((Path(__file__).parent / "devices.yaml").read_text(encoding="utf-8"))
    if name == HERE or name in own:
        raise UsageError(f"{name} is a device of slmops' own", "take another name")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name):
        raise UsageError(f"{name!r} cannot name a device", "take small letters, digits, dots, dashes and underscores")


def save(name: str, facts: Mapping[str, Any]) -> Path:
    """Keep a profile of this machine, in the place of an older one of that name.

    Args:
        facts: `title`, `ram_gb`, `cores`, `core_gflops`, `memory_gbytes`, and whatever else is worth knowing.
    """
    import io

    from slmops.store.files import write_atomic

    check_name(name)
    text = io.StringIO()
    YAML(typ="safe", pure=True).dump({**facts, "measured": True}, text)
    file = folder() / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, text.getvalue().encode())
    return file


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
    cores, memory = here.gflops / (device.gflops * device.share), here.gbytes / (device.gbytes * device.share)
    factor = max(cores, memory)
    by = "cores" if cores >= memory else "memories"
    there = f"{SHARE:.0%} of {device.gflops:g} GFLOP/s and of {device.gbytes:g} GB/s (as its makers state the peaks)"
    if device.measured:
        there = f"{device.gflops:.0f} GFLOP/s and {device.gbytes:.1f} GB/s (measured there)"
    return Slowdown(
        factor,
        f"times on {device.title} are predicted, not measured: {factor:.1f} times those of this machine, the ratio of the {by}. One core "
        f"here reaches {here.gflops:.0f} GFLOP/s and reads {here.gbytes:.1f} GB/s (measured); there {there}",
    )


if __name__ == "__main__":
    import dataclasses
    import json

    print(json.dumps(dataclasses.asdict(_measure())))

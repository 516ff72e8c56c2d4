"""Methods by name: `train.sft` is the module slmops/train/sft.py, or one that another package registers.

Third parties add a method by an entry point of the group `slmops.methods` whose name is the method's name and whose
value is the module. Nothing heavy is imported by looking a method up.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

import slmops
from slmops.core import forms
from slmops.core.method import Declaration, Method
from slmops.errors import MissingExtraError, UsageError
from slmops.store import environments

GROUP = "slmops.methods"
GPUS = Path("/proc/driver/nvidia/gpus")
ROOMS = ("catalog", "data", "train", "compress", "convert", "evaluate", "bundle")


@cache
def get(name: str) -> Method:
    """The module of a method.

    Raises:
        UsageError: there is none of that name; the hint names the nearest.
    """
    room, _, file = name.partition(".")
    module = None
    if room in ROOMS and file.isidentifier():
        target = f"slmops.{room}.{file}"
        try:
            module = importlib.import_module(target)
        except ModuleNotFoundError as error:
            if error.name != target:
                raise
    if module is None or not hasattr(module, "DECLARATION"):
        for entry in importlib.metadata.entry_points(group=GROUP):
            if entry.name == name:
                return cast(Method, entry.load())
        close = difflib.get_close_matches(name, names(), n=1)
        raise UsageError(f"there is no method {name}", f"did you mean {close[0]}?" if close else "")
    return cast(Method, module)


def names() -> list[str]:
    """All methods that are installed, sorted. No module is imported."""
    found = {entry.name for entry in importlib.metadata.entry_points(group=GROUP)}
    base = Path(slmops.__file__).parent
    for room in ROOMS:
        for path in sorted((base / room).glob("*.py")):
            if "\nDECLARATION = " in path.read_text(encoding="utf-8"):
                found.add(f"{room}.{path.stem}")
    return sorted(found)


@cache
def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(declaration: Declaration, threads: int, params: Mapping[str, Any] | None = None) -> dict[str, str]:
    """What of this machine can change the result of a method with these parameters. A package that is missing shows as `absent`."""
    locked = {name: version_of(name) or "absent" for name in _packages(declaration, params or {})}
    if declaration.threads:
        locked |= {"threads": str(threads), "machine": platform.machine(), "bf16": bf16()}
        locked |= {"gpu": gpus()} if gpus() else {}
    if declaration.environment is not None:
        locked[f"environment {declaration.environment.name}"] = environments.identity(declaration.environment)[:16]
    return locked


def _packages(declaration: Declaration, params: Mapping[str, Any]) -> dict[str, str]:
    """The packages of a method and of the runtimes that it runs models in, each with its pip extra."""
    return dict.fromkeys(declaration.packages, declaration.extra) | forms.packages(declaration.runtimes(params))


@cache
def gpus() -> str:
    """The NVIDIA GPUs that a training would see, by name: it takes one where there is one. "" if there is none."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return ""
    files = sorted(GPUS.glob("*/information"))
    names = [
        line.partition(":")[2].strip()
        for f in files
        for line in f.read_text().splitlines()
        if line.startswith("Model:")
    ]
    return ", ".join(names)


@cache
def bf16() -> str:
    """Whether the processor multiplies bfloat16: `precision: auto` looks at it, and so results depend on it."""
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return "unknown"
    return "yes" if {"avx512_bf16", "amx_bf16"} & set(flags) else "no"


def require(declaration: Declaration, params: Mapping[str, Any] | None = None) -> None:
    """Refuse a method with these parameters whose packages are not installed, or whose environment cannot be had.

    Raises:
        MissingExtraError: names the first missing package and the pip line.
        SlmopsError: the environment; see `slmops.store.environments.require`.
    """
    for name, extra in _packages(declaration, params or {}).items():
        if version_of(name) is None:
            raise MissingExtraError(f"{name} (for {declaration.name})", extra or "all")
    if declaration.environment is not None:
        environments.require(declaration.environment)

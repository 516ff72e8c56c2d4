"""Steps on a Ray cluster, behind the executor protocol: each step is a Ray task that takes as many CPUs as it has threads.

Promises: a step gives the same bytes as on this machine, since a Ray worker runs it in the same kind of child process as
`LocalExecutor`; progress and errors come back; a worker that dies is a `StepError`. Files travel by path: the project's
folder must be on a file system that every node mounts at the same place, which is checked before the first step, as are
the versions that results depend on. Where no address is given a Ray of this machine alone is started, and ended with this
process. Each running step writes its progress to a file beside its scratch folder, which is read here; a file there ends
it. (`ray.cancel` is not used: in Ray 2.60 one that meets the task's own end aborts the calling process.)
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import slmops
from slmops.core.method import Declaration, Facts, Progress
from slmops.errors import MissingExtraError, ResourceError, SlmopsError, StepError, StoppedError, UsageError
from slmops.flow import methods
from slmops.flow.executor import Ended, LocalExecutor, Portable, Task, portable, rebuilt
from slmops.store.files import write_atomic

EVENTS, STOP = "events.jsonl", "stop"
POLL_S = 0.1
STOP_S = 30.0
LOCK_S = 60.0
LOOK_S = 120
OBJECTS = 100 << 20  # bytes of shared memory: only short results go through it, files do not
PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "numpy", "peft", "onnx", "onnxruntime", "onnxruntime-genai",
)  # fmt: skip
SHARED = "put the project on a file system that every node mounts at the same path (NFS, Lustre, FSx, …)"


def check_on(on: str) -> str | None:
    """The Ray address that `--on` names, None for `local`, "" for a Ray of this machine.

    Raises:
        UsageError: it is neither.
    """
    if on == "local":
        return None
    if on == "ray":
        return ""
    if on.startswith("ray://") and len(on) > len("ray://"):
        return on
    raise UsageError(f"--on {on}: not a place to run", "give local, ray, or the address of a cluster, ray://HOST:10001")


class _Events:
    """Progress that writes every call to a file, as a line."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def _write(self, *event: Any) -> None:
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()

    def start(self, label: str, total: int | None = None, unit: str = "") -> None:
        self._write("start", label, total, unit)

    def advance(self, done: int = 1, note: str = "") -> None:
        self._write("advance", done, note)

    def stop(self) -> None:
        self._write("stop")

    def log(self, text: str) -> None:
        self._write("log", text)

    def point(self, step: int, values: Mapping[str, float]) -> None:
        self._write("point", step, dict(values))


_local: LocalExecutor | None = None


def _work(task: Task) -> tuple[Facts | None, Portable | None, float]:
    """A step, in a Ray worker: in a child process of it, so that nothing of one step is left in the next."""
    global _local
    import __main__

    vars(__main__).pop("__file__", None)  # else each child would import Ray's worker script again
    _local = _local or LocalExecutor()
    stop, ended = task.scratch.parent / STOP, None
    if not stop.exists():
        _local.start(task, _Events(task.scratch.parent / EVENTS))
        while ended is None and not stop.exists():
            ended = _local.poll(POLL_S)
        _local.stop()
    if ended is None:
        return None, portable(StoppedError(f"step {task.id} was ended")), 0.0
    return ended.facts, portable(ended.error) if ended.error is not None else None, ended.seconds


def _facts() -> dict[str, str]:
    """What of a machine can change results."""
    declaration = Declaration(name="", version="", makes="", packages=PACKAGES, threads=True)
    found = methods.environment(declaration, 0) | {"slmops": slmops.__version__, "python": platform.python_version()}
    return {name: value for name, value in found.items() if name != "threads"}


def _look(marker: str, text: str) -> tuple[str, dict[str, str]]:
    """On a node: whether the marker of the project's folder can be read and written beside, and what the node has."""
    path = Path(marker)
    try:
        seen = path.read_text() == text
        (path.parent / f"{path.name}.{uuid.uuid4().hex}").touch()
    except OSError as error:
        return f"{error.strerror}", _facts()
    return "" if seen else "another file", _facts()


@dataclass
class _Running:
    task: Task
    progress: Progress
    ref: Any
    begin: float
    read: int = 0


class RayExecutor:
    """Tasks on Ray. See the module.

    Args:
        root: the project's state folder, which every node must see.
        address: of a cluster; "": start a Ray of this machine alone.
        cpus: CPUs of a Ray that is started here.

    Raises:
        MissingExtraError: Ray is not installed.
        SlmopsError: the cluster cannot be reached, a node does not see the project or has other versions.
    """

    def __init__(self, root: Path, address: str = "", cpus: int | None = None) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # leave GPUs visible to steps that take none
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError("ray", "ray") from error
        self._ray: Any = ray
        self._running: dict[Any, _Running] = {}
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        own = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": OBJECTS}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if not ray.is_initialized():
                    ray.init(**quiet, **({"address": address} if address else own))
        except Exception as error:  # Ray raises many kinds, some of them its own without a common base
            where = f"the Ray cluster {address}" if address else "a Ray of this machine"
            text = (str(error).strip().splitlines() or [type(error).__name__])[0]
            hint = (
                "check the address, and that the cluster's Ray and Python have the versions of this machine; where it wants a "
                "token, set RAY_AUTH_MODE=token"
            )
            raise SlmopsError(f"{where} cannot be used: {text}", hint) from error
        self._nodes = [node for node in self._ray.nodes() if node["Alive"]]
        self.capacity: int | None = int(sum(node["Resources"].get("CPU", 0) for node in self._nodes))
        self._largest = max((int(node["Resources"].get("CPU", 0)) for node in self._nodes), default=0)
        self._gpus = sum(node["Resources"].get("GPU", 0) for node in self._nodes)
        self._check(root)

    def _check(self, root: Path) -> None:
        """Whether every node sees the project and has what results depend on."""
        ray, text = self._ray, uuid.uuid4().hex
        folder = root / "ray-check" / text
        marker = folder / "marker"
        write_atomic(marker, text.encode())
        here = _facts()
        try:
            look = ray.remote(num_cpus=0, max_retries=0)(_look)
            asked = [
                (node["NodeManagerHostname"], look.options(resources={f"node:{node['NodeManagerAddress']}": 0.001}))
                for node in self._nodes
            ]
            for name, ref in [(name, task.remote(str(marker), text)) for name, task in asked]:
                try:
                    problem, there = ray.get(ref, timeout=LOOK_S)
                except Exception as error:
                    last = (str(error).strip().splitlines() or [""])[-1]
                    hint = f"install slmops {slmops.__version__} on every node"
                    raise SlmopsError(f"node {name} of the cluster cannot run steps: {last}", hint) from error
                if problem:
                    raise SlmopsError(f"node {name} of the cluster does not see {root.parent}: {problem}", SHARED)
                odd = [f"{k} {there.get(k)}, here {v}" for k, v in here.items() if there.get(k) != v]
                if odd:
                    hint = "results would depend on where a step ran: give every node the same packages and kind of machine"
                    raise SlmopsError(f"node {name} of the cluster differs: {'; '.join(odd)}", hint)
        finally:
            for path in folder.glob("*"):
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()
                folder.parent.rmdir()

    def start(self, task: Task, progress: Progress) -> None:
        """Hand the task to the cluster.

        Raises:
            ResourceError: no node has as many CPUs.
        """
        cpus = max(1, task.threads)
        if cpus > self._largest:
            raise ResourceError(
                f"step {task.id} takes {cpus} threads, the largest node has {self._largest}",
                "run it on this machine, or where a node has as many: the number of threads is part of a result's key",
            )
        for name in (EVENTS, STOP):
            (task.scratch.parent / name).unlink(missing_ok=True)
        gpus = 1 if self._gpus and task.method.startswith("train.") else 0
        work = self._ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_work)
        ref = work.options(name=f"slmops {task.id}").remote(task)
        self._running[ref] = _Running(task, progress, ref, time.monotonic())

    def next(self) -> Ended:
        """Pass progress on until a task ends."""
        while True:
            ready, _rest = self._ray.wait(list(self._running), num_returns=1, timeout=POLL_S)
            for ref, running in list(self._running.items()):
                try:
                    self._pass_on(running)
                except SlmopsError as stopped:
                    self._end([self._running.pop(ref)])
                    return Ended(running.task, None, stopped, time.monotonic() - running.begin)
            if ready:
                return self._ended(self._running.pop(ready[0]))

    def _pass_on(self, running: _Running) -> None:
        """The events since the last time. Half a line waits for its other half."""
        path = running.task.scratch.parent / EVENTS
        try:
            with path.open("rb") as file:
                file.seek(running.read)
                text = file.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        running.read += len(whole)
        for line in whole.splitlines():
            kind, *values = json.loads(line)
            cast("Callable[..., None]", getattr(running.progress, kind))(*values)

    def _ended(self, running: _Running) -> Ended:
        from ray.exceptions import GetTimeoutError, RayError

        task, seconds = running.task, time.monotonic() - running.begin
        try:
            facts, failure, seconds = self._ray.get(running.ref, timeout=LOCK_S)
        except GetTimeoutError as error:
            raise StepError(
                f"the result of step {task.id} does not come", "check the cluster, then run again"
            ) from error
        except RayError as error:
            hint = "a node may have gone or run out of memory; run again: it goes on where it was"
            return Ended(
                task, None, StepError(f"the Ray worker of step {task.id} died ({type(error).__name__})", hint), seconds
            )
        return Ended(task, facts, rebuilt(failure) if failure is not None else None, seconds)

    def _end(self, running: Sequence[_Running]) -> None:
        """End tasks and wait until they have, so that nobody writes where the next one begins."""
        for one in running:
            (one.task.scratch.parent / STOP).touch()
        if running:
            self._ray.wait([one.ref for one in running], num_returns=len(running), timeout=STOP_S)

    def stop(self) -> None:
        """End all tasks. Ray itself stays for the next ones, and ends with this process."""
        running = list(self._running.values())
        self._running.clear()
        self._end(running)

    def close(self) -> None:
        """Leave the cluster; a Ray that was started here ends."""
        self.stop()
        self._ray.shutdown()

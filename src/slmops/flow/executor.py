"""Where steps run: the seam between deciding what to do and doing it.

An executor takes tasks (plain values: they could travel to another machine) and gives back their ends. `LocalExecutor`
runs each task in a child process forked from a server that has the heavy libraries loaded: a crash of native code ends
one step and not the run, memory goes back when a step ends, and several small steps run beside each other.
`InlineExecutor` runs them in this process, for tests and for use as a library. `slmops.flow.ray_executor` is the same for
a Ray cluster.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from slmops.core.method import Context, Facts, Progress
from slmops.errors import SlmopsError, StepError
from slmops.store.files import disk_error

PRELOAD = ("torch", "transformers", "numpy", "transformers.models.llama.modeling_llama")
"""What the fork server imports: transformers loads its models late, and with them 2 s of other imports."""


@dataclass(frozen=True)
class Task:
    """One step, ready to run: everything by value or by path."""

    id: str
    method: str
    params: Mapping[str, Any]
    inputs: Mapping[str, Path]
    out: Path
    scratch: Path
    shared: Path
    seed: int
    threads: int
    strict: bool = False
    budget: float | None = None


@dataclass(frozen=True)
class Ended:
    """How a task ended: with facts, or with an error."""

    task: Task
    facts: Facts | None
    error: SlmopsError | None
    seconds: float
    log: tuple[str, ...] = ()


class Executor(Protocol):
    """Runs tasks. `start` does not wait; `next` waits for one to end.

    A progress that raises a `SlmopsError` ends its task, with this error.

    Attributes:
        capacity: threads that tasks may use beside each other; None: those of this machine.
    """

    capacity: int | None

    def start(self, task: Task, progress: Progress) -> None:
        """Begin a task."""

    def next(self) -> Ended:
        """Wait for the next task to end."""

    def stop(self) -> None:
        """End everything that still runs and free what the executor holds."""


def perform(task: Task, progress: Progress) -> Facts:
    """Run a task's method in this process.

    Raises:
        SlmopsError: what the method raised; a foreign error becomes a StepError with its last lines.
    """
    from slmops.flow import methods

    method = methods.get(task.method)
    context = Context(
        seed=task.seed, scratch=task.scratch, shared=task.shared, threads=task.threads, progress=progress,
        strict=task.strict, budget=task.budget, clock=time.time,
    )  # fmt: skip
    try:
        params = method.Params.model_validate(task.params, strict=False)
        return method.run(params, task.inputs, task.out, context)
    except SlmopsError:
        raise
    except MemoryError as error:
        raise StepError(
            f"step {task.id} ran out of memory", "use a smaller batch_size or a larger accumulate"
        ) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_error(error, task.out) from error
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise StepError(
            f"step {task.id} failed: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})",
            f"the whole trace is in {task.scratch / 'error.log'}; what finished before is kept",
        ) from error


class InlineExecutor:
    """One task at a time, in this process."""

    capacity: int | None = None

    def __init__(self) -> None:
        self._ended: list[Ended] = []

    def start(self, task: Task, progress: Progress) -> None:
        """Run the task to its end."""
        begin = time.monotonic()
        facts, failure = None, None
        try:
            facts = perform(task, progress)
        except SlmopsError as error:
            failure = error
            _write_trace(task, error)
        self._ended.append(Ended(task, facts, failure, time.monotonic() - begin))

    def next(self) -> Ended:
        """The oldest end."""
        return self._ended.pop(0)

    def stop(self) -> None:
        """Nothing to free."""


def _write_trace(task: Task, error: SlmopsError) -> None:
    """Keep the trace for the user; where even that cannot be written the error itself must still come through."""
    if isinstance(error, StepError):
        with contextlib.suppress(OSError):
            task.scratch.mkdir(parents=True, exist_ok=True)
            (task.scratch / "error.log").write_text("".join(traceback.format_exception(error)))


class _Remote:
    """Progress in a child: every call becomes a message to the parent."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._last = 0.0
        self._done = 0

    def start(self, label: str, total: int | None = None, unit: str = "") -> None:
        self._done = 0
        self._pipe.send(("start", (label, total, unit)))

    def advance(self, done: int = 1, note: str = "") -> None:
        self._done += done
        now = time.monotonic()
        if now - self._last >= 0.1:
            self._pipe.send(("advance", (self._done, note)))
            self._last, self._done = now, 0

    def stop(self) -> None:
        self._pipe.send(("stop", ()))

    def log(self, text: str) -> None:
        self._pipe.send(("log", (text,)))

    def point(self, step: int, values: Mapping[str, float]) -> None:
        self._pipe.send(("point", (step, dict(values))))


def _child(task: Task, pipe: Connection) -> None:
    """Body of a child process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, args=(pipe,), daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(task.threads)
    try:
        pipe.send(("end", (perform(task, _Remote(pipe)), None)))
    except SlmopsError as error:
        _write_trace(task, error)
        error.__cause__ = None
        error.__context__ = None
        pipe.send(("end", (None, portable(error))))


def _die_with_parent(pipe: Connection) -> None:
    """The parent never writes; the end of the pipe means that it is gone, and so must this process be."""
    try:
        pipe.recv()
    except (EOFError, OSError):
        os._exit(1)


Portable = tuple[type[SlmopsError], dict[str, Any], tuple[Any, ...]]


def portable(error: SlmopsError) -> Portable:
    """An error as plain values that travel to another process."""
    return type(error), dict(error.__dict__), error.args


def rebuilt(parts: Portable) -> SlmopsError:
    """Inverse of `portable`."""
    kind, values, args = parts
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(values)
    return error


@dataclass
class _Running:
    task: Task
    progress: Progress
    process: Any
    begin: float


class LocalExecutor:
    """Child processes on this machine. See the module.

    Args:
        preload: modules that the fork server imports once, so that no step pays for them; missing ones are ignored.
    """

    capacity: int | None = None

    def __init__(self, preload: tuple[str, ...] = PRELOAD) -> None:
        # Waiting threads sleep instead of spinning: on a machine that does other work too, spinning costs a multiple.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' own bars would run through ours; read when imported
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["slmops.flow.executor", *preload])
        self._running: dict[Connection, _Running] = {}

    def start(self, task: Task, progress: Progress) -> None:
        """Fork a child for the task."""
        here, there = self._context.Pipe(duplex=True)
        process = self._context.Process(target=_child, args=(task, there), name=f"slmops {task.id}")
        process.start()
        there.close()
        self._running[here] = _Running(task, progress, process, time.monotonic())

    def next(self) -> Ended:
        """Pass progress on until a child ends."""
        while True:
            ended = self.poll(None)
            if ended is not None:
                return ended

    def poll(self, seconds: float | None) -> Ended | None:
        """Pass on what children say; wait so long (None: for ever) for the first word. The end of a child, if one ended."""
        for pipe in wait(list(self._running), seconds):
            assert isinstance(pipe, Connection)
            running = self._running[pipe]
            try:
                kind, values = pipe.recv()
            except (EOFError, OSError):
                return self._crashed(pipe, running)
            if kind != "end":
                try:
                    getattr(running.progress, kind)(*values)
                except SlmopsError as stopped:
                    del self._running[pipe]
                    self._kill(pipe, running)
                    return Ended(running.task, None, stopped, time.monotonic() - running.begin)
                continue
            del self._running[pipe]
            running.process.join(10)
            pipe.close()
            facts, failure = values
            error = rebuilt(failure) if failure is not None else None
            return Ended(running.task, facts, error, time.monotonic() - running.begin)
        return None

    def _crashed(self, pipe: Connection, running: _Running) -> Ended:
        del self._running[pipe]
        pipe.close()
        running.process.join(10)
        code = running.process.exitcode
        what = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
        hint = "run again: it goes on where it was"
        if code == -signal.SIGKILL:
            hint = "the system may have run out of memory: use a smaller batch_size, then run again"
        error = StepError(f"the process of step {running.task.id} {what}", hint)
        return Ended(running.task, None, error, time.monotonic() - running.begin)

    def stop(self) -> None:
        """End all children."""
        for pipe, running in self._running.items():
            self._kill(pipe, running)
        self._running.clear()

    def _kill(self, pipe: Connection, running: _Running) -> None:
        running.process.terminate()
        running.process.join(5)
        if running.process.is_alive():
            running.process.kill()
            running.process.join(5)
        pipe.close()


def open_executor(root: Path, address: str | None = None) -> Executor:
    """The executor of a place.

    Args:
        root: the project's state folder.
        address: None: this machine; else as in `slmops.flow.ray_executor.RayExecutor`.

    Raises:
        SlmopsError: the place cannot be used.
    """
    if address is None:
        return LocalExecutor()
    from slmops.flow.ray_executor import RayExecutor

    return RayExecutor(root, address)

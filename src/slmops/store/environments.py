"""Environments of their own for tools whose dependencies clash with those of slmops: made on first use, and kept.

    <cache>/olive-6f1c…/                        a virtual environment, made with `python -m venv` and pip
    <cache>/olive-6f1c…/slmops-environment.json what it holds; written last: without it the folder is no environment
    <cache>/olive-6f1c….lock                    held while it is made

The cache is `slmops/environments` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache), or where SLMOPS_ENVIRONMENTS says.
SLMOPS_ENVIRONMENT_NAME (SLMOPS_ENVIRONMENT_OLIVE) names an environment that a user made by hand, which is then taken instead.
pip reads its own settings (PIP_INDEX_URL, PIP_FIND_LINKS, PIP_NO_INDEX, …) as always.

Promises: an environment is used whole or not at all; of two processes that want one, one makes it and the other waits; a making
that failed leaves nothing. A virtual environment holds its own path, so it is made where it will stay. A tool that `run` started
ends with the process that started it, however that ends, and so does all that the tool started.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from slmops.core.environment import Environment, normal
from slmops.core.method import Progress, SilentProgress
from slmops.errors import ResourceError, SlmopsError, ToolError, UsageError
from slmops.store.files import disk_error, locked, read_json, remove_tree, write_json

MARKER = "slmops-environment.json"
PATIENCE_S = 5.0
"""How long a tool that is asked to end may take before it is killed."""
TAIL = 8
"""Lines of a tool's output that an error shows."""

_START = """
import os, runpy, signal, sys, threading
pipe = os.dup(0)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
def watch():
    os.read(pipe, 1)
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
signal.signal(signal.SIGINT, signal.default_int_handler)
kind, name = sys.argv[1:3]
del sys.argv[1:3]
sys.argv[0] = name
if kind == "module":
    runpy.run_module(name, run_name="__main__", alter_sys=True)
else:
    runpy.run_path(name, run_name="__main__")
"""
"""What the environment's Python runs first. Its standard input is a pipe that nobody writes to: it ends when the process that holds
the other side does, and the tool must not outlive that."""


@dataclass(frozen=True)
class Found:
    """An environment in the cache.

    Attributes:
        name: of the environment; of the folder where the making was cut off.
        packages: how many it holds.
        size: bytes on disk.
        made: seconds since the epoch; 0 where the making was cut off.
        whole: whether it can be used.
    """

    name: str
    folder: Path
    packages: int
    size: int
    made: float
    whole: bool


def cache() -> Path:
    """The folder that holds the environments."""
    own = os.environ.get("SLMOPS_ENVIRONMENTS")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or ""
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "slmops" / "environments"


def this_python() -> str:
    """Which Python on which machine makes environments."""
    return f"{sys.implementation.cache_tag} {sysconfig.get_platform()}"


def folder_of(environment: Environment) -> Path:
    """Where an environment is kept, whether it is there or not."""
    return cache() / f"{environment.name}-{environment.key(this_python())[:32]}"


def variable(environment: Environment) -> str:
    """The environment variable that names one made by hand."""
    return f"SLMOPS_ENVIRONMENT_{environment.name.replace('-', '_').upper()}"


def by_hand(environment: Environment) -> Path | None:
    """The Python of the environment that the user made, None if there is none.

    Raises:
        UsageError: what the variable names is no environment, or lacks a package.
    """
    given = os.environ.get(variable(environment))
    if not given:
        return None
    folder = Path(given).expanduser()
    python = folder / "bin" / "python"
    if not python.exists():
        raise UsageError(
            f"{variable(environment)} is {given}, which is no environment: there is no {python}",
            "give the folder that `python -m venv` made, or take the variable out",
        )
    have = installed(folder)
    missing = [name for name in environment.versions if name not in have]
    if missing:
        raise UsageError(
            f"the environment {folder} has no {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}",
            f"install: {' '.join(r for r in environment.requirements if normal(r.split('==')[0]) in missing[:5])}",
        )
    return python.absolute()


def installed(folder: Path) -> dict[str, str]:
    """Normal name of each distribution in an environment to its version."""
    places = [str(path) for path in folder.glob("lib*/python*/site-packages")]
    found = {}
    for distribution in importlib.metadata.distributions(path=places):
        try:
            name = distribution.metadata["Name"]
        except (
            FileNotFoundError
        ):  # so says the package importlib_metadata, which takes the place of Python's own once it is loaded
            continue
        if name:  # else what a removed package left
            found[normal(name)] = distribution.version
    return found


def _public(version: str, pin: str) -> str:
    """An installed version as the pin would write it: 2.13.0+cpu is a 2.13.0."""
    return version if "+" in pin else version.partition("+")[0]


def differing(environment: Environment, have: Mapping[str, str]) -> list[str]:
    """Which of an environment's packages are not there in their version, as `NAME VERSION`.

    Args:
        have: what `installed` gave.
    """
    pins = environment.versions.items()
    return [f"{name} {have.get(name, 'missing')}" for name, pin in pins if _public(have.get(name, ""), pin) != pin]


def identity(environment: Environment) -> str:
    """What of an environment can change a result, 64 hex digits: the versions of its packages and the Python. It does not have to
    be there; one made by hand with the same versions is the same.

    Raises:
        UsageError: see `by_hand`.
    """
    python = by_hand(environment)
    if python is None:
        return environment.key(this_python())
    have = installed(python.parent.parent)
    same = tuple(f"{name}=={_public(have[name], pin)}" for name, pin in environment.versions.items())
    return Environment(environment.name, same).key(this_python())


def ready(environment: Environment) -> bool:
    """Whether it can be used at once.

    Raises:
        UsageError: see `by_hand`.
    """
    return by_hand(environment) is not None or _whole(environment, folder_of(environment))


def require(environment: Environment) -> None:
    """Refuse what can be told to fail before any work.

    Raises:
        UsageError: see `by_hand`.
        ResourceError: there is no room to make it.
    """
    if not ready(environment):
        _room(environment, cache())


def ensure(environment: Environment, progress: Progress | None = None) -> Path:
    """The Python of an environment, which is made if it is not there.

    Raises:
        UsageError: see `by_hand`.
        ResourceError: the disk is full.
        ToolError: the packages cannot be had or do not install.
    """
    progress = progress or SilentProgress()
    given = by_hand(environment)
    if given is not None:
        return given
    folder = folder_of(environment)
    if not _whole(environment, folder):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, folder) from error
        waits = f"waiting until another slmops has made the environment {environment.name}"
        with locked(folder.with_name(f"{folder.name}.lock"), lambda: progress.log(waits)):
            if not _whole(environment, folder):
                _make(environment, folder, progress)
    return folder / "bin" / "python"


def _whole(environment: Environment, folder: Path) -> bool:
    marker = read_json(folder / MARKER)
    same = marker is not None and marker["packages"] == environment.versions and marker["python"] == this_python()
    return same and (folder / "bin" / "python").exists()


def _room(environment: Environment, folder: Path) -> None:
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < environment.size * 1.1:
        raise ResourceError(
            f"the environment {environment.name} needs about {environment.size / 1e9:.1f} GB in {folder}, "
            f"{free / 1e9:.1f} GB are free",
            "free some space, or set SLMOPS_ENVIRONMENTS to a folder on a larger disk",
        )


def _make(environment: Environment, folder: Path, progress: Progress) -> None:
    """Fill the folder; whatever goes wrong, nothing is left of it."""
    remove_tree(folder)
    _room(environment, folder.parent)
    log = folder.with_name(f"{folder.name}.log")
    log.unlink(missing_ok=True)
    progress.log(f"making the environment {environment.name} ({len(environment.requirements)} packages) in {folder}")
    progress.start(f"making the environment {environment.name}")
    began = time.monotonic()
    try:
        wanted = folder / "requirements.txt"
        run(Path(sys.executable), "venv", [str(folder)], log=log, progress=progress)
        wanted.write_text("\n".join(environment.requirements) + "\n", encoding="utf-8")
        options = ("--disable-pip-version-check", "--no-input", "--no-warn-script-location", "--progress-bar", "off")
        run(folder / "bin" / "python", "pip", ["install", *options, "-r", str(wanted)], log=log, progress=progress)
        have = installed(folder)
        wrong = differing(environment, have)
        if wrong:
            raise ToolError(f"pip installed other versions than asked for: {', '.join(wrong)}", "")
        os.sync()
        size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
        write_json(
            folder / MARKER,
            {"name": environment.name, "python": this_python(), "packages": environment.versions, "size": size, "made": time.time(),
             "also": {name: version for name, version in have.items() if name not in environment.versions}},
        )  # fmt: skip
    except BaseException as error:
        remove_tree(folder)
        if isinstance(error, OSError):
            raise disk_error(error, folder) from error
        if isinstance(error, ToolError):
            raise _said(environment, log, error) from error
        raise
    finally:
        progress.stop()
    log.unlink(missing_ok=True)
    progress.log(
        f"the environment {environment.name} is there after {time.monotonic() - began:.0f} s, {size / 1e6:.0f} MB"
    )


def _said(environment: Environment, log: Path, error: ToolError) -> SlmopsError:
    """What pip said, in words."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    last = _tail(text)
    by_hand = f"or make it by hand and set {variable(environment)} to its folder"
    what = f"the environment {environment.name} cannot be made"
    if "No space left on device" in text or "Disk quota exceeded" in text:
        return ResourceError(
            f"{what}: no space left on the disk that holds {cache()}",
            "free some space, or set SLMOPS_ENVIRONMENTS to a folder on a larger disk",
        )
    if "ensurepip is not available" in text or "No module named venv" in text:
        return ToolError(f"{what}: this Python has no venv:\n{last}", f"install python3-venv, {by_hand}")
    if "after connection broken by" in text:
        hint = "connect to the network, set PIP_FIND_LINKS to a folder of wheels"
        return ToolError(f"{what}: the package index cannot be reached:\n{last}", f"{hint}, {by_hand}")
    hint = f"the whole log is in {log}; set PIP_INDEX_URL to another index" if text else str(error.hint)
    return ToolError(f"{what}: pip failed:\n{last or error.message}", f"{hint}, {by_hand}")


def _tail(text: str) -> str:
    return "\n".join(f"  {line}" for line in [line for line in text.splitlines() if line.strip()][-TAIL:])


def run(
    python: Path, tool: str | Path, arguments: Sequence[str], *, log: Path, progress: Progress | None = None,
    folder: Path | None = None, variables: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Run a tool to its end in an environment, with nothing of slmops' own packages in its sight.

    Args:
        python: what `ensure` gave.
        tool: a module's name, as after `python -m`, or the path of a script.
        arguments: its arguments.
        log: a file that what it says is added to; its lines are shown beside the progress as they come.
        folder: where it runs.
        variables: further environment variables.

    Raises:
        ToolError: it ended with another code than 0; the message has the last lines.
        KeyboardInterrupt: as it came; the tool has ended too.
    """
    kind = "script" if isinstance(tool, Path) else "module"
    command = [str(python), "-I", "-u", "-X", "utf8", "-c", _START, kind, str(tool), *arguments]
    _child(command, log, progress or SilentProgress(), clean(python) | dict(variables or {}), folder)


def clean(python: Path) -> dict[str, str]:
    """This process's environment variables without those that would lead to other packages."""
    strange = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
    kept = {name: value for name, value in os.environ.items() if name not in strange}
    path = f"{python.parent}{os.pathsep}{kept.get('PATH', os.defpath)}"
    return kept | {"PATH": path, "PYTHONNOUSERSITE": "1", "PYTHONUTF8": "1"}


def _child(
    command: Sequence[str], log: Path, progress: Progress, variables: Mapping[str, str], folder: Path | None
) -> None:  # fmt: skip
    """Run a command as the first of a process group of its own, which ends with it or with this process."""
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = log.stat().st_size if log.is_file() else 0
    with log.open("a", encoding="utf-8") as file:
        try:
            process = subprocess.Popen(
                command, cwd=folder, env=dict(variables), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise ToolError(
                f"{command[0]} cannot be started: {error.strerror}", "check that the file is there"
            ) from error
        assert process.stdout is not None and process.stdin is not None
        ended = threading.Thread(target=_reap, args=(process.pid,), daemon=True)
        ended.start()
        try:
            _listen(process.stdout, file, progress)
            ended.join()
        except BaseException:
            _end(process.pid, ended)
            raise
        finally:
            code = process.wait()
            process.stdin.close()
            process.stdout.close()
    if code:
        with log.open(encoding="utf-8", errors="replace") as file:
            file.seek(begin)
            last = _tail(file.read())
        what = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        hint = "the system may have run out of memory" if code == -signal.SIGKILL else f"the whole log is in {log}"
        raise ToolError(f"the tool {what}:\n{last}", hint)


def _listen(lines: IO[str], file: IO[str], progress: Progress) -> None:
    for line in lines:  # bars that go back to the start of their line come as lines too
        file.write(line)
        file.flush()
        if line.strip():
            progress.advance(0, note=line.strip()[:100])


def _reap(pid: int) -> None:
    """Wait for the first of a group to end, then end the others: they would hold its output open. It stays to be waited for, so
    that its number is not another's meanwhile."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _end(pid: int, ended: threading.Thread) -> None:
    """Ask a group to end, then make it."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, sign)
        ended.join(PATIENCE_S)
        if not ended.is_alive():
            return


def all_found() -> list[Found]:
    """The environments in the cache, by name."""
    found = []
    for folder in sorted(cache().glob("*-*")) if cache().is_dir() else ():
        if folder.is_dir():
            marker = read_json(folder / MARKER)
            if marker is None:
                size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
                found.append(Found(folder.name.rpartition("-")[0], folder, 0, size, 0.0, False))
            else:
                packages = len(marker["packages"]) + len(marker["also"])
                found.append(Found(marker["name"], folder, packages, marker["size"], marker["made"], True))
    return found


def remove(found: Found) -> None:
    """Take an environment out of the cache.

    Raises:
        SlmopsError: it is being made right now.
    """
    lock = found.folder.with_name(f"{found.folder.name}.lock")

    def busy() -> None:
        raise SlmopsError(f"the environment {found.name} is being made right now", "wait until that has ended")

    with locked(lock, busy):
        (found.folder / MARKER).unlink(missing_ok=True)  # first: what is half removed is no environment
        remove_tree(found.folder)
    found.folder.with_name(f"{found.folder.name}.log").unlink(missing_ok=True)

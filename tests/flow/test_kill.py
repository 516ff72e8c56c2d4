"""kill -9 at random moments over a whole run, then resume: the result equals that of an untouched run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import write_project

KILLS = int(os.environ.get("SLMOPS_TEST_KILLS", "20"))


def start(folder: Path) -> subprocess.Popen[bytes]:
    log = (folder / "log.txt").open("ab")
    command = [sys.executable, "-m", "slmops.cli.main", "run", "-f", str(folder)]
    return subprocess.Popen(command, stdout=log, stderr=log)


def finish(folder: Path) -> None:
    code = start(folder).wait(timeout=600)
    assert code == 0, (folder / "log.txt").read_text()[-3000:]


def reproducible(folder: Path) -> dict[str, str]:
    """Step id to output digest, for every step whose bytes must not vary."""
    found = {}
    for path in (folder / ".slmops" / "steps").glob("*.json"):
        record = json.loads(path.read_text())
        if record["reproducible"] and record["step"] not in ("report", "bundle"):
            found[record["step"]] = record["output"]
    manifest = json.loads((folder / "outputs" / "tiny" / "bundle" / "manifest.json").read_text())
    return found | {"payload": manifest["payload"]}


@pytest.mark.slow
def test_killed_runs_end_in_the_same_bytes(tmp_path: Path) -> None:
    untouched = write_project(tmp_path / "untouched")
    begin = time.monotonic()
    finish(untouched)
    whole = time.monotonic() - begin
    killed = write_project(tmp_path / "killed")
    rng = random.Random(7)
    kills = 0
    while kills < KILLS:
        process = start(killed)
        try:
            process.wait(timeout=rng.uniform(0.2, max(3.0, whole / 4)))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    finish(killed)
    assert kills >= min(KILLS, 3), "the run ended before it could be killed"
    print(f"{kills} kills")
    assert reproducible(killed) == reproducible(untouched)
    assert not list((killed / ".slmops" / "scratch").glob("*/out"))


@pytest.mark.slow
def test_nothing_goes_on_after_the_parent_is_killed(tmp_path: Path) -> None:
    folder = write_project(tmp_path / "p")
    process = start(folder)
    time.sleep(8)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not _using(folder):
            return
        time.sleep(0.2)
    raise AssertionError(f"still at work: {_using(folder)}")


def _using(folder: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            files = [str(fd.readlink()) for fd in (path / "fd").iterdir()]
        except OSError:
            continue
        if int(path.name) != os.getpid() and any(str(folder / ".slmops") in name for name in files):
            found.append(line)
    return found

"""A search of 20 trials is killed twice and resumes; on a Ray of two workers the same seed finds the same."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.flow.search_projects import records, searched, start, write

pytestmark = pytest.mark.slow


def ended(folder: Path) -> set[int]:
    """Numbers of the trials that the storage knows the end of."""
    with contextlib.suppress(sqlite3.OperationalError):  # not there yet, or being written
        with contextlib.closing(sqlite3.connect(folder / ".slmops" / "search" / "tiny.db", timeout=5)) as db:
            return {n for (n,) in db.execute("select number from trials where state in ('COMPLETE', 'PRUNED', 'FAIL')")}
    return set()


def kill_after(folder: Path, count: int) -> set[int]:
    """Start the search, kill it when so many trials have ended and others run; the trials that had ended."""
    process = start(folder)
    while len(ended(folder)) < count:
        assert process.poll() is None, (folder / "log.txt").read_text()[-3000:]
        time.sleep(0.05)
    time.sleep(0.8)  # into the trainings of the next batch
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return ended(folder)


def test_killed_twice_and_on_ray(tmp_path: Path) -> None:
    killed, ray = write(tmp_path / "killed"), write(tmp_path / "ray")
    for count in (5, 11):
        done = kill_after(killed, count)
        assert count <= len(done) < 20
        before = records(killed)
    found = searched(killed)
    after = records(killed)
    assert all(after[key] == record for key, record in before.items()), "a finished step ran again"
    log = (killed / "log.txt").read_text()
    assert all(log.count(f"\ntrial {number}: ") <= 1 for number in range(20)), "a finished trial ran again"
    assert [t["number"] for t in found["trials"]] == list(range(20))
    assert {t["state"] for t in found["trials"]} == {"complete", "pruned"}, "some trainings were given up"

    on_ray = searched(ray, "--on", "ray")
    assert on_ray["best"] == found["best"] and on_ray["set"] == found["set"]
    assert on_ray["trials"] == found["trials"], "all of them, given up at the same points"
    students = {r["output"] for r in after.values() if r["step"].startswith("student@")}
    assert students == {r["output"] for r in records(ray).values() if r["step"].startswith("student@")}

    before = records(ray)
    assert searched(ray) == on_ray and records(ray) == before
    assert "20 trials have ended, none to go" in (ray / "log.txt").read_text()
    words = [word for text in found["set"][str(found["best"])] for word in ("--set", text)]
    command = [sys.executable, "-m", "slmops.cli.main", "run", "student", "-f", str(killed), *words]
    best = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "nothing to do" in best.stderr, "what it says to run is what it ran"
    page = (ray / "outputs" / "tiny" / "search.html").read_text()
    assert f"Trial {found['best']}:" in page

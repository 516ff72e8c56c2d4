"""Loading a served model, and how many threads it computes with: as many as were fastest here, unless the user says.

A model is timed once on a machine: some steps of its answers with each number of threads, the smallest of the fastest taken. What was
found is kept in `slmops/threads.json` in the user's cache folder (XDG_CACHE_HOME, or ~/.cache), by the model's files, engine and
machine.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from slmops.core.digest import digest_json
from slmops.serve.engines import Rows, open_rows

TIMES = 5
STEPS = 8
SLOW = 2.0
PATIENCE_S = 3.0
"""A number of threads is given up when its fastest step takes so many times as long as that of the best one, or after so long."""
GAIN = 0.95
"""More threads are taken where they need less than this share of the time."""


def load(job: dict[str, Any]) -> tuple[Rows, int]:
    """The engine that a model's process is told to load, and the threads that it computes with.

    Raises:
        MissingExtraError: the runtime is not installed.
        ModelError: it cannot be loaded.
    """
    model = Path(job["folder"])
    adapters = {name: Path(place) for name, place in job.get("adapters", {}).items()}
    most = cores()
    key = "" if job["threads"] else fingerprint(model, job["engine"], job["rows"], most)
    threads = job["threads"] or (1 if most == 1 else remembered(key)) or most
    engine = open_rows(
        model, rows=job["rows"], context=job["context"], threads=threads, engine=job["engine"], adapters=adapters
    )
    if key and most > 1 and not remembered(key):
        seconds: dict[int, float] = {}
        for n in candidates(most):
            seconds[n] = _steps(engine, n, min(seconds.values(), default=math.inf))
        threads = fastest(seconds)
        engine.use_threads(threads)
        remember(key, threads)
    return engine, threads


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def candidates(most: int) -> list[int]:
    """Numbers of threads to try: all up to 4, then half as many again each time, and all cores."""
    found = list(range(1, min(4, most) + 1))
    while found[-1] < most:
        found.append(min(most, found[-1] * 3 // 2))
    return found


def fastest(seconds: dict[int, float]) -> int:
    """The number of threads to take: more only where they are worth it."""
    best = min(seconds)
    for threads in sorted(seconds):
        if seconds[threads] < GAIN * seconds[best]:
            best = threads
    return best


def _steps(engine: Rows, threads: int, best: float = math.inf) -> float:
    """Seconds of a step with half of the rows busy, the median of some; fewer where they take far longer than the `best` ones did, as
    threads do that wait for each other on cores which are busy with something else."""
    engine.use_threads(threads)
    rows = range(max(1, engine.rows // 2))
    steps = min(STEPS, engine.context_length - 2)
    taken: list[float] = []
    begun = time.perf_counter()
    while steps > 0 and len(taken) < TIMES * steps:
        for row in rows:
            engine.cut(row, 0)
            engine.feed(row, [0])
        engine.decode(dict.fromkeys(rows, 0))  # what is made at the first time
        for _ in range(steps):
            start = time.perf_counter()
            engine.decode(dict.fromkeys(rows, 0))
            end = time.perf_counter()
            taken.append(end - start)
            if min(taken) > SLOW * best or end - begun > PATIENCE_S:
                steps = 0
                break
    for row in rows:
        engine.cut(row, 0)
    return sorted(taken)[len(taken) // 2] if taken else 0.0


def fingerprint(model: Path, engine: str, rows: int, most: int) -> str:
    """What was measured: the model's files by size and time of change, the engine, and the machine."""
    files = [model] if model.is_file() else sorted(path for path in model.iterdir() if path.is_file())
    about = [[str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return digest_json([about, engine, rows, most, platform.node(), platform.machine(), platform.processor()])


def store() -> Path:
    """The file of what was measured."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "slmops" / "threads.json"


def remembered(key: str) -> int:
    """What was found before, 0 if nothing was."""
    try:
        found = json.loads(store().read_text("utf-8"))
        return max(0, int(found.get(key, 0)))
    except (OSError, ValueError, AttributeError, TypeError):
        return 0


def remember(key: str, threads: int) -> None:
    """Keep what was found. A folder that cannot be written is no error: it is measured again."""
    with contextlib.suppress(OSError):
        file = store()
        try:
            known = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError):
            known = {}
        known = known if isinstance(known, dict) else {}
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".json", delete=False) as beside:
            json.dump({**known, key: threads}, beside)
        Path(beside.name).replace(file)

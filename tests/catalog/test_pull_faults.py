"""Whatever goes wrong on the way: no wrong file is taken, every pull can go on, and what was written is not fetched again.

Faults come from the stand-in of the hub (cut at any byte, wrong bytes, refusals, silence, redirects), from the disk (a
quota, no space) and from SIGKILL before operations on the disk. The seed is printed.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import resource
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("huggingface_hub", reason="needs the extra `hub`")

from slmops.catalog.hub import File
from slmops.catalog.hub import Hub as RealHub
from slmops.catalog.pull import Plan, Wish, get, plan
from slmops.catalog.source import parse
from slmops.catalog.transfer import Pace, Part
from slmops.errors import IntegrityError, ModelError, ResourceError, SlmopsError
from tests.catalog import killed
from tests.catalog.models import LARGE, contents
from tests.hub_stand_in import Fault, Hub, git_digest, sibling

SEED = 20_261
SEGMENT = 16 << 10
PACE = Pace(jobs=3, segment=SEGMENT, sleep=lambda seconds: None)
NAMES = sorted(LARGE)


class Faults:
    """Faults that are still to come, each for one file ("" is the listing)."""

    def __init__(self) -> None:
        self.left: list[tuple[str, Fault]] = []
        self.fired: Counter[str] = Counter()
        self.lock = threading.Lock()

    def __call__(self, name: str, start: int) -> Fault | None:
        with self.lock:
            for at, (wanted, fault) in enumerate(self.left):
                if wanted == name:
                    del self.left[at]
                    self.fired[fault.kind] += 1
                    return fault
        return None


@pytest.fixture
def stand() -> Iterator[tuple[Hub, Faults, str]]:
    hub, faults = Hub(LARGE, "models"), Faults()
    hub.fault = faults
    with hub.serve() as url:
        yield hub, faults, url


def attempt(url: str, target: Path, timeout: float = 20) -> SlmopsError | dict[str, Any]:
    """One pull; an error leaves nothing in the target and says what to do."""
    origin = RealHub(url, timeout)
    try:
        return get(ask(url, target, timeout), origin=origin, pace=PACE)
    except SlmopsError as error:
        assert isinstance(error, ModelError | IntegrityError | ResourceError)
        assert error.hint and "hf:acme/desk" in error.message
        assert not target.exists()
        return error


def ask(url: str, target: Path, timeout: float = 20) -> Plan:
    return plan(parse("hf:acme/desk"), Wish(run=False), target, RealHub(url, timeout), PACE)


def until_done(url: str, target: Path, timeout: float = 20) -> list[SlmopsError]:
    """Pull again and again; what came to be must be right, and all of it."""
    errors = []
    for _ in range(12):
        answer = attempt(url, target, timeout)
        if isinstance(answer, dict):
            break
        errors.append(answer)
    assert contents(target) == LARGE
    assert not list(target.parent.glob(f".{target.name}*"))
    return errors


def assert_once(hub: Hub, but: str = "") -> None:
    """No byte of a file was sent twice, and none that was not needed; `but`: a file that came wrong."""
    for name in NAMES:
        spans = sorted((start, start + sent) for file, start, sent, _right in hub.spans if file == name and sent)
        if name == but or (name in ("LICENSE", "NOTICE")):
            continue
        ends = [0, *(stop for _start, stop in spans)]
        assert [start for start, _stop in spans] == ends[:-1], (name, spans)
        assert ends[-1] == len(LARGE[name])
    both = sum(sent for name, _start, sent, _right in hub.spans if name in ("LICENSE", "NOTICE"))
    assert both == len(LARGE["LICENSE"]) or but, "bytes that two files share come once"


def assert_second_moves_nothing(hub: Hub, url: str, target: Path) -> None:
    before = len(hub.spans)
    again = ask(url, target)
    assert again.current and get(again)["fetched"] == 0 and len(hub.spans) == before


@pytest.mark.slow
def test_faults_on_the_way(stand: tuple[Hub, Faults, str], tmp_path: Path) -> None:
    hub, faults, url = stand
    rng = random.Random(SEED)
    print(f"seed {SEED}")
    statuses = [(429, {"Retry-After": "1"}), (429, {"RateLimit": '"resolvers";r=0;t=3'}), (429, {}), (503, {"Retry-After": "2"}),
                (503, {}), (500, {}), (502, {}), (504, {}), (408, {})]  # fmt: skip
    for number in range(88):
        kind = ("cut", "cut", "cut", "status", "status", "stall", "other", "loop")[number % 8]
        chosen = (
            [rng.choice(["", *NAMES]) for _ in range(rng.randint(2, 5))] if kind != "stall" else [rng.choice(NAMES)]
        )
        for name in chosen:
            size = len(LARGE[name]) if name else 400
            code, headers = rng.choice(statuses)
            value = {
                "status": code,
                "cut": rng.randrange(min(size, SEGMENT)),
                "stall": rng.randrange(min(size, SEGMENT)),
            }.get(kind, 0)
            if kind == "other" and not name:
                continue
            faults.left.append((name, Fault(kind, value, headers if kind == "status" else {})))  # type: ignore[arg-type]
        hub.spans.clear()
        hub.freed.clear()
        target = tmp_path / str(number)
        errors = until_done(url, target, 0.15 if kind == "stall" else 20)
        assert all(isinstance(error, ModelError) for error in errors)
        if kind != "other":
            assert_once(hub)
        assert_second_moves_nothing(hub, url, target)
        faults.left.clear()
    print(dict(faults.fired))
    assert sum(faults.fired.values()) >= 200


@pytest.mark.slow
def test_wrong_bytes_are_never_taken(stand: tuple[Hub, Faults, str], tmp_path: Path) -> None:
    hub, faults, url = stand
    names = [name for name in NAMES if name not in ("LICENSE", "NOTICE")]
    for number, name in enumerate([*names, *names, *names]):
        hub.spans.clear()
        always = number >= 2 * len(names)
        faults.left = [(name, Fault("wrong"))] * (20 if always else 1)
        target = tmp_path / str(number)
        if always:
            error = attempt(url, target)
            assert isinstance(error, IntegrityError) and "not those that the hub states" in str(error)
            faults.left.clear()
            here, before = ask(url, target).here, len(hub.spans)
            assert not until_done(url, target)
            sent = sum(count for _name, _start, count, _right in hub.spans[before:])
            assert sent == sum(len(body) for body in {*LARGE.values()}) - here, "what was written is not fetched again"
            continue
        assert not until_done(url, target)
        assert_once(hub, but=name)
    assert faults.fired["wrong"] >= 20


@pytest.mark.slow
def test_a_full_disk(stand: tuple[Hub, Faults, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quota on the size of a file, and no space after so many bytes."""
    hub, _faults, url = stand
    rng = random.Random(SEED)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for number in range(12):
        hub.spans.clear()
        target = tmp_path / f"quota{number}"
        resource.setrlimit(resource.RLIMIT_FSIZE, (rng.randrange(200, 50_000), hard))
        try:
            error = attempt(url, target)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert isinstance(error, ResourceError) and "no space left" in str(error)
        until_done(url, target)
    real = os.pwrite
    for number in range(12):
        hub.spans.clear()
        left = rng.randrange(0, 60_000)

        def short(handle: int, data: bytes, at: int) -> int:
            nonlocal left
            if len(data) > 8 and left <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data = data[: max(left, 8)]
            left -= len(data)
            return real(handle, data, at)

        target = tmp_path / f"space{number}"
        monkeypatch.setattr(os, "pwrite", short)
        error = attempt(url, target)
        monkeypatch.setattr(os, "pwrite", real)
        assert isinstance(error, ResourceError) and "no space left" in str(error)
        until_done(url, target)


def on_disk(target: Path) -> dict[str, dict[int, int]]:
    """Per file, up to where each of its segments is there."""
    stage = target.parent / f".{target.name}.pull"
    found: dict[str, dict[int, int]] = {}
    for name, body in LARGE.items():
        listed = sibling(name, body)
        lfs: Any = listed.get("lfs")
        file = File(name, len(body), "sha256" if lfs else "git", lfs["sha256"] if lfs else git_digest(body))
        part = Part(stage / "blobs", file, SEGMENT)
        whole = any(path.is_file() for path in (stage / "blobs" / file.digest, stage / "tree" / name, target / name))
        if whole:
            found[name] = {k: len(body) for k in range(len(part.counts))}
        elif stage.exists():
            part.load()
            found[name] = {k: k * SEGMENT + count for k, count in enumerate(part.counts)}
    return found


def assert_nothing_twice(hub: Hub, before: int, there: dict[str, dict[int, int]]) -> None:
    for name, start, _sent, _right in hub.spans[before:]:
        assert start >= there.get(name, {}).get(start // SEGMENT, 0), (name, start, there.get(name))


def start(url: str, target: Path, last: int) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["slmops.catalog.pull", "huggingface_hub.hf_api", "tests.catalog.killed"])
    process = context.Process(target=killed.pull, args=(url, str(target), last, {"jobs": 3, "segment": SEGMENT}))
    process.start()
    return process


@pytest.mark.slow
def test_killed_before_every_other_operation_on_the_disk(stand: tuple[Hub, Faults, str], tmp_path: Path) -> None:
    hub, _faults, url = stand
    kills = 0
    for last in range(1, 400, 2):
        target = tmp_path / str(last)
        process = start(url, target, last)
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        there, before = on_disk(target), len(hub.spans)
        assert not target.exists() or contents(target) == LARGE
        until_done(url, target)
        assert_nothing_twice(hub, before, there)
    assert kills > 30, kills
    print(kills)


@pytest.mark.slow
def test_killed_while_bytes_come(stand: tuple[Hub, Faults, str], tmp_path: Path) -> None:
    hub, faults, url = stand
    rng = random.Random(SEED)
    for number in range(12):
        name = rng.choice(NAMES)
        hub.stalled.clear()
        hub.freed.clear()
        faults.left = [(name, Fault("stall", rng.randrange(min(len(LARGE[name]), SEGMENT))))]
        if name in ("LICENSE", "NOTICE"):
            faults.left += [("NOTICE", faults.left[0][1]), ("LICENSE", faults.left[0][1])]
        target = tmp_path / str(number)
        process = start(url, target, 0)
        assert hub.stalled.wait(30)
        process.kill()
        process.join(30)
        hub.freed.set()
        faults.left.clear()
        there, before = on_disk(target), len(hub.spans)
        assert not target.exists()
        until_done(url, target)
        assert_nothing_twice(hub, before, there)


@pytest.mark.slow
def test_killed_while_a_new_commit_takes_the_place_of_an_old_one(
    stand: tuple[Hub, Faults, str], tmp_path: Path
) -> None:
    hub, _faults, url = stand
    old = {
        **LARGE,
        "LICENSE": b"older",
        "model-00002-of-00002.safetensors": LARGE["model-00002-of-00002.safetensors"][::1],
    }
    kills = 0
    for last in range(1, 400, 3):
        target = tmp_path / str(last)
        hub.files, hub.commit = old, "c" * 40  # whose folder stays whole until the new one is
        get(ask(url, target), origin=RealHub(url), pace=PACE)
        hub.files, hub.commit = LARGE, "a" * 40
        before = len(hub.spans)
        process = start(url, target, last)
        process.join(60)
        if process.exitcode == 0:
            break
        kills += 1
        assert not target.exists() or contents(target) in (old, LARGE)
        until_done(url, target)
        assert {name for name, *_rest in hub.spans[before:]} <= {"LICENSE"}, "only what changed is fetched"
    assert kills > 5

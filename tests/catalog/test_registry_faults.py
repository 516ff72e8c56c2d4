"""Whatever goes wrong between a registry and here: no wrong file is taken, every pull goes on, and no byte comes twice.

As `test_pull_faults`, for plain files, for archives and for Ollama's images. The seed is printed.
"""

from __future__ import annotations

import multiprocessing
import random
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slmops.catalog.artifact import Registry as Origin
from slmops.catalog.pull import Plan, Wish, get, plan
from slmops.catalog.source import parse
from slmops.catalog.transfer import Pace
from slmops.errors import IntegrityError, ModelError, SlmopsError
from tests.catalog import killed
from tests.catalog.models import LARGE, contents
from tests.catalog.test_pull_faults import Faults
from tests.hub_stand_in import Fault
from tests.registry_stand_in import TITLE, Registry, tar

SEED = 20_262
SEGMENT = 16 << 10
PACE = Pace(jobs=3, segment=SEGMENT, sleep=lambda seconds: None)
GGUF = b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + random.Random(SEED).randbytes(60_000)
PIECES = {name: body for name, body in LARGE.items() if name != "NOTICE"}
PART = {name: body for name, body in PIECES.items() if name.startswith("model-")}
REST = {name: body for name, body in PIECES.items() if name not in PART}
Stand = tuple[Registry, Faults, str]


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Stand]:
    registry, faults = Registry(), Faults()
    registry.push("acme/plain:1", [("application/octet-stream", body, {TITLE: name}) for name, body in PIECES.items()])
    kit = "application/vnd.kitops.modelkit"
    packed = [
        (f"{kit}.model.v1.tar", tar(PART), {TITLE: "weights"}),
        (f"{kit}.docs.v1.tar+gzip", tar(REST, "gz"), {TITLE: "rest"}),
    ]
    registry.push("acme/packed:1", packed)
    media = "application/vnd.ollama.image."
    registry.push("library/desk:1", [(f"{media}model", GGUF, {}), (f"{media}system", b"Be brief.", {})])
    registry.fault = faults
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    with registry.serve() as url:
        monkeypatch.setenv("SLMOPS_OLLAMA_REGISTRY", url)
        yield registry, faults, url.removeprefix("http://")


def named(host: str) -> dict[str, tuple[list[str], set[str]]]:
    """Models: labels of their blobs, and the files that they become."""
    return {
        f"oci:{host}/acme/plain:1": (sorted(set(PIECES) - {"LICENSE"}), set(PIECES)),  # which is read with the listing
        f"oci:{host}/acme/packed:1": (["weights", "rest"], set(PIECES)),
        "ollama:desk:1": (["model"], {"model.gguf", "system.txt", "Modelfile"}),
    }


def ask(model: str, target: Path, timeout: float = 20) -> Plan:
    return plan(parse(model), Wish(run=False), target, Origin(timeout), PACE)


def until_done(model: str, target: Path, files: set[str], timeout: float = 20) -> list[SlmopsError]:
    """Pull again and again; an error leaves nothing in the target, and what came to be is right and all of it."""
    errors: list[SlmopsError] = []
    for _ in range(12):
        try:
            get(ask(model, target, timeout), pace=PACE)
            break
        except SlmopsError as error:
            assert isinstance(error, ModelError | IntegrityError) and error.hint and model in error.message
            assert not target.exists()
            errors.append(error)
    found = contents(target)
    assert set(found) == files and all(found[name] == body for name, body in PIECES.items() if name in files)
    assert found.get("model.gguf", GGUF) == GGUF and not list(target.parent.glob(f".{target.name}*"))
    return errors


def assert_once(registry: Registry, but: str = "") -> None:
    """No byte of a blob was sent twice, and none left out."""
    sizes = {label: len(body) for body, label in registry.blobs.values()}
    for label in {name for name, *_rest in registry.spans} - {but}:
        spans = sorted((start, start + sent) for name, start, sent, _right in registry.spans if name == label and sent)
        ends = [0, *(stop for _start, stop in spans)]
        assert [start for start, _stop in spans] == ends[:-1] and ends[-1] == sizes[label], (label, spans)


@pytest.mark.slow
def test_faults_on_the_way(stand: Stand, tmp_path: Path) -> None:
    registry, faults, host = stand
    rng = random.Random(SEED)
    print(f"seed {SEED}")
    codes: list[tuple[int, dict[str, str]]] = [
        (429, {"Retry-After": "1"}), (429, {}), (503, {"Retry-After": "2"}), (500, {}), (502, {}), (408, {})
    ]  # fmt: skip
    for number in range(66):
        kind = ("cut", "cut", "cut", "status", "stall", "other", "loop", "whole", "status", "cut", "cut")[number % 11]
        model, (labels, files) = list(named(host).items())[number % 3]
        chosen = (
            [rng.choice(["", *labels]) for _ in range(rng.randint(2, 5))] if kind != "stall" else [rng.choice(labels)]
        )
        for label in chosen:
            code, headers = rng.choice(codes)
            value = code if kind == "status" else rng.randrange(9 if label == "tokenizer.json" else 200)
            if label or kind not in ("other", "whole"):
                faults.left.append((label, Fault(kind, value, headers if kind == "status" else {})))  # type: ignore[arg-type]
        registry.spans.clear()
        registry.freed.clear()
        target = tmp_path / str(number)
        until_done(model, target, files, 0.3 if kind == "stall" else 20)
        if kind not in ("other", "whole"):
            assert_once(registry)
        before = len(registry.spans)
        faults.left.clear()
        again = ask(model, target)
        assert again.current and get(again)["fetched"] == 0 and len(registry.spans) == before
    print(dict(faults.fired))
    assert sum(faults.fired.values()) >= 150


@pytest.mark.slow
def test_wrong_bytes_are_never_taken(stand: Stand, tmp_path: Path) -> None:
    registry, faults, host = stand
    for model, (labels, files) in named(host).items():
        for label in labels:
            for always in (False, True):
                registry.spans.clear()
                faults.left = [(label, Fault("wrong"))] * (20 if always else 1)
                target = tmp_path / f"{label}{always}{len(files)}{len(labels)}"
                if not always:
                    assert not until_done(model, target, files)
                    assert_once(registry, but=label)
                    continue
                with pytest.raises(IntegrityError, match="not those that the registry states"):
                    get(ask(model, target), pace=PACE)
                assert not target.exists()
                faults.left.clear()
                assert not until_done(model, target, files)
    faults.left = [("", Fault("wrong"))] * 40
    for model in named(host):
        with pytest.raises(ModelError, match=r"registry states|as a registry does"):
            get(ask(model, tmp_path / "never"), pace=PACE)
    assert not (tmp_path / "never").exists() and faults.fired["wrong"] >= 20


def start(model: str, target: Path, last: int) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["slmops.catalog.pull", "slmops.catalog.artifact", "tests.catalog.killed"])
    process = context.Process(target=killed.pull, args=("", str(target), last, {"jobs": 3, "segment": SEGMENT}, model))
    process.start()
    return process


@pytest.mark.slow
@pytest.mark.parametrize("which", ["plain", "packed"])
def test_killed_before_operations_on_the_disk(which: str, stand: Stand, tmp_path: Path) -> None:
    """What was written whole or in part before is not asked for again."""
    registry, _faults, host = stand
    model = f"oci:{host}/acme/{which}:1"
    files, kills = named(host)[model][1], 0
    for last in range(1, 400, 5):
        target = tmp_path / str(last)
        registry.spans.clear()
        process = start(model, target, last)
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        assert not target.exists() or set(contents(target)) == files
        kills += 1
        before = len(registry.spans)
        there = written(registry, target)
        until_done(model, target, files)
        for label, first, _sent, _right in registry.spans[before:]:
            assert first >= there.get(label, {}).get(first // SEGMENT, 0), (label, first, there)
    assert kills > 6, kills


def written(registry: Registry, target: Path) -> dict[str, dict[int, int]]:
    """Per blob, up to where each of its segments is on the disk."""
    found: dict[str, dict[int, int]] = {}
    blobs = target.parent / f".{target.name}.pull" / "blobs"
    for digest, (body, label) in registry.blobs.items():
        name = digest.removeprefix("sha256:")
        if target.exists() or (blobs / name).exists():
            found[label] = {k: len(body) for k in range(1 + len(body) // SEGMENT)}
        elif (blobs / f"{name}.at").exists():
            counts: Any = (blobs / f"{name}.at").read_bytes()[24:]
            found[label] = {
                k: k * SEGMENT + n for k, (n,) in enumerate(struct.iter_unpack("<Q", counts[: len(counts) // 8 * 8]))
            }
    return found

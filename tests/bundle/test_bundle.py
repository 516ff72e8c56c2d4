"""A bundle says what it is: what `verify` lets through has the recorded bytes, and nothing else lies beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slmops import engines
from slmops.bundle import assemble
from slmops.bundle.manifest import BundleFile, Manifest, load, payload_digest, verify
from slmops.core.digest import digest_bytes
from slmops.core.method import Context
from slmops.engines.memory_engine import MemoryEngine
from slmops.errors import IntegrityError, UsageError

MODEL = {"model.onnx": b"graph", "model.onnx.data": b"weights", "tokenizer.json": b"{}", "genai_config.json": b"{}"}
TASK = {"type": "classification", "instruction": "Name the intent."}


def write_inputs(base: Path, report: dict[str, Any] | None = None, model: dict[str, bytes] = MODEL) -> dict[str, Path]:
    inputs = {name: base / name for name in ("model", "report", "data")}
    for folder in inputs.values():
        folder.mkdir(parents=True)
    for name, content in model.items():
        (inputs["model"] / name).write_bytes(content)
    (inputs["model"] / "fidelity.json").write_text('{"token_agreement": 1.0}')
    (inputs["report"] / "report.json").write_text(json.dumps(report or {"verdict": "passed"}))
    (inputs["report"] / "report.html").write_text("<!doctype html>")
    (inputs["data"] / "info.json").write_text(json.dumps({"files": {"test": {"examples": 3, "digest": "sha256:00"}}}))
    return inputs


def assembled(base: Path, out: Path, **more: Any) -> dict[str, Any]:
    out.mkdir(parents=True)
    params = assemble.Params(
        name="desk", version="2", licence="Apache-2.0", task=TASK, precision="int4", max_new_tokens=12
    )
    context = Context(seed=0, scratch=base / "scratch", shared=base / "shared")
    return assemble.run(params, write_inputs(base / "inputs", **more), out, context)


@pytest.fixture(autouse=True)
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = MemoryEngine(lambda text, sampling: "refund", context_length=256)
    monkeypatch.setattr(engines, "open_engine", lambda folder, threads=1: engine)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("bundle")
    with pytest.MonkeyPatch.context() as patch:
        engine = MemoryEngine(lambda text, sampling: "refund", context_length=256)
        patch.setattr(engines, "open_engine", lambda folder, threads=1: engine)
        assembled(base, base / "out")
    return base / "out"


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def edit(bundle: Path, **changes: Any) -> None:
    file = bundle / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---------------------------------------------------------------------------------------------------------- the manifest


def test_what_a_bundle_holds(made: Path) -> None:
    manifest = verify(made)
    files = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()}
    assert files == {f.path for f in manifest.files} | {"manifest.json"}
    assert {f"model/{name}" for name in MODEL} < files
    assert "fidelity.json" in files and "model/fidelity.json" not in files, "the payload is what the runtime loads"
    assert (manifest.name, manifest.version, manifest.precision) == ("desk", "2", "int4")
    assert manifest.licences == {"model": "Apache-2.0"}
    assert manifest.verdict == "passed"
    assert manifest.limits.context_tokens == 256 and manifest.limits.max_new_tokens == 12
    assert manifest.chat_template.messages[0] == {"role": "system", "content": "Name the intent."}
    engine = MemoryEngine(lambda text, sampling: "", context_length=256)
    assert list(manifest.chat_template.token_ids) == engine.encode(list(manifest.chat_template.messages))
    assert manifest.runtime.name == "onnxruntime-genai" and manifest.runtime.version


def test_the_data_that_it_was_made_of_is_named(made: Path) -> None:
    assert load(made).provenance["data"] == {"test": "sha256:00"}


def test_the_manifest_survives_its_own_json(made: Path) -> None:
    manifest = load(made)
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_the_payload_digest_depends_on_the_payload_alone(tmp_path: Path) -> None:
    one = assembled(tmp_path / "a", tmp_path / "a" / "out")
    other = assembled(tmp_path / "b", tmp_path / "b" / "out", report={"verdict": "failed", "took": 3.5})
    changed = assembled(tmp_path / "c", tmp_path / "c" / "out", model=MODEL | {"model.onnx.data": b"weightz"})
    assert one["payload"] == other["payload"] != changed["payload"]
    assert load(tmp_path / "b" / "out").verdict == "failed"


ENTRY = st.builds(
    lambda name, content: BundleFile(path=f"model/{name}", size=len(content), digest=digest_bytes(content)),
    st.text("abc/.", min_size=1, max_size=6), st.binary(max_size=4),
)  # fmt: skip


@given(st.lists(ENTRY, unique_by=lambda f: f.path, min_size=1, max_size=5), st.data())
def test_payload_digest_laws(files: list[BundleFile], data: st.DataObject) -> None:
    digest = payload_digest(tuple(files))
    assert payload_digest(tuple(data.draw(st.permutations(files)))) == digest
    report = BundleFile(path="report.json", size=1, digest=digest_bytes(b"x"))
    assert payload_digest((*files, report)) == digest
    assert payload_digest(tuple(files[1:])) != digest
    other = files[0].model_copy(update={"digest": digest_bytes(b"longer than four bytes")})
    assert payload_digest((other, *files[1:])) != digest


# ------------------------------------------------------------------------------------------------------------- tampering


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_bit_gets_through(data: st.DataObject, bundle: Path) -> None:
    """In any file but the manifest; the manifest's own digests are what the others are held against."""
    names = sorted(path for path in bundle.rglob("*") if path.is_file() and path.name != "manifest.json")
    file = data.draw(st.sampled_from(names))
    before = file.read_bytes()
    place, bit = data.draw(st.integers(0, len(before) - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(before)
    changed[place] ^= 1 << bit
    try:
        file.write_bytes(changed)
        with pytest.raises(IntegrityError, match="is not what the manifest says"):
            verify(bundle)
    finally:
        file.write_bytes(before)
    verify(bundle)


def test_a_changed_weight_with_a_changed_manifest_line(bundle: Path) -> None:
    """Who changes a file and its line in the manifest, but not the payload digest, is found out."""
    weights = bundle / "model" / "model.onnx.data"
    weights.write_bytes(b"weightz")
    text = (bundle / "manifest.json").read_text()
    (bundle / "manifest.json").write_text(text.replace(digest_bytes(b"weights"), digest_bytes(b"weightz")))
    with pytest.raises(IntegrityError, match="payload digest"):
        verify(bundle)


def test_files_beside_the_payload(bundle: Path) -> None:
    (bundle / "notes.txt").write_text("mine")
    verify(bundle)
    (bundle / "model" / "extra").mkdir()
    verify(bundle)
    (bundle / "model" / "extra" / "code.py").write_text("print()")
    with pytest.raises(IntegrityError, match=r"model/extra/code.py is not in the manifest"):
        verify(bundle)


@pytest.mark.parametrize("kind", ["link to a file", "link to a folder"])
def test_links_in_the_payload(kind: str, bundle: Path, tmp_path: Path) -> None:
    """A link has the right bytes today and may have others tomorrow."""
    outside = tmp_path / "outside"
    if kind == "link to a file":
        (bundle / "model" / "model.onnx.data").rename(outside)
        (bundle / "model" / "model.onnx.data").symlink_to(outside)
    else:
        (bundle / "model").rename(outside)
        (bundle / "model").symlink_to(outside)
    with pytest.raises(IntegrityError):
        verify(bundle)


@pytest.mark.parametrize("path", ["/etc/hostname", "../outside", "model/../../outside"])
def test_paths_that_leave_the_bundle(path: str, bundle: Path) -> None:
    (bundle.parent / "outside").write_bytes(b"x")
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    edit(bundle, files=[*files, {"path": path, "size": 1, "digest": digest_bytes(b"x")}])
    with pytest.raises(IntegrityError, match="the manifest names") as caught:
        verify(bundle)
    assert caught.value.hint == "do not use this bundle"


@pytest.mark.parametrize(
    "change",
    [{"files": "all"}, {"limits": {"context_tokens": "many", "max_new_tokens": 1}}, {"schema_version": 2}, {"more": 1},
     {"payload": None}, {"signatures": [1]}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_manifests_that_are_no_manifest(change: dict[str, Any], bundle: Path) -> None:
    edit(bundle, **change)
    with pytest.raises(IntegrityError) as caught:
        verify(bundle)
    assert caught.value.hint


def test_a_manifest_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a bundle"):
        verify(tmp_path)

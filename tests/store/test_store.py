"""The store: content decides, damage is found, nothing half-written is seen."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops.errors import IntegrityError
from slmops.store import Store
from slmops.store.files import exclusive, read_json, write_atomic
from slmops.store.local import scan


def folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def test_same_content_has_the_same_digest_and_is_stored_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    first = store.put(folder(tmp_path / "a", {"x": b"one", "d/y": b"two"}), "model")
    second = store.put(folder(tmp_path / "b", {"d/y": b"two", "x": b"one"}), "model")
    assert first == second
    assert store.digests() == [first.digest]
    assert (store.path(first.digest) / "d" / "y").read_bytes() == b"two"
    assert sum(1 for p in (tmp_path / "store" / "blobs").rglob("*") if p.is_file()) == 2


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b", "c/d"]), st.binary(max_size=40), min_size=1))
def test_digest_depends_on_content_alone(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    root = tmp_path_factory.mktemp("s")
    one = scan(folder(root / "one", files), "model")
    two = scan(folder(root / "two", dict(reversed(files.items()))), "model")
    other = scan(folder(root / "three", {**files, "a": files.get("a", b"") + b"!"}), "model")
    assert one.digest == two.digest != other.digest


def test_a_changed_byte_is_found_before_use(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    digest = store.put(folder(tmp_path / "a", {"x": b"one", "y": b"two"}), "model").digest
    file = store.path(digest) / "x"
    file.chmod(0o644)
    file.write_bytes(b"0ne")
    assert not store.has(digest)
    with pytest.raises(IntegrityError, match="x in artifact"):
        store.path(digest)
    assert store.damaged(digest) == ["x"]
    store.remove(digest)
    again = store.put(folder(tmp_path / "b", {"x": b"one", "y": b"two"}), "model").digest
    assert again == digest
    assert (store.path(digest) / "x").read_bytes() == b"one"


def test_gc_keeps_what_is_needed_and_its_shared_files(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    keep = store.put(folder(tmp_path / "a", {"x": b"shared", "y": b"k"}), "model").digest
    drop = store.put(folder(tmp_path / "b", {"x": b"shared", "z": b"dropped"}), "model").digest
    removed, freed = store.gc([keep])
    assert (removed, freed) == (1, len(b"dropped"))
    assert not store.has(drop)
    assert store.damaged(keep) == []


def test_links_are_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "a", {"x": b"1"})
    (root / "l").symlink_to("/etc/passwd")
    with pytest.raises(IntegrityError, match="neither a file nor a folder"):
        Store(tmp_path / "store").put(root, "model")


def test_atomic_write_leaves_no_rest_and_damaged_json_reads_as_absent(tmp_path: Path) -> None:
    write_atomic(tmp_path / "f.json", b'{"a": 1}')
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]
    assert read_json(tmp_path / "f.json") == {"a": 1}
    (tmp_path / "f.json").write_bytes(b'{"a":')
    assert read_json(tmp_path / "f.json") is None


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with exclusive(tmp_path / "lock", "busy here"):
        with pytest.raises(Exception, match="busy here"), exclusive(tmp_path / "lock", "busy here"):
            pass

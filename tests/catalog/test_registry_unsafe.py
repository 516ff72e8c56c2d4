"""Registries and their models that mean harm, and disks that end in the middle: what is refused, and what is never sent or taken."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slmops.catalog.hub import File
from slmops.catalog.tree import sealed
from slmops.errors import ModelError, RefusedError, ResourceError
from tests.catalog.models import contents
from tests.catalog.test_registry import (
    GGUF,
    KIT,
    MODEL,
    OLLAMA,
    PACE,
    PACK,
    PATH,
    ask,
    basic,
    logged_in,
    pull,
    push_ollama,
    titled,
)
from tests.registry_stand_in import Registry, tar

Stand = tuple[Registry, str]


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Stand]:
    """A registry, which is Ollama's too; nobody is logged in."""
    registry = Registry()
    with registry.serve() as url:
        monkeypatch.setenv("SLMOPS_OLLAMA_REGISTRY", url)
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield registry, url.removeprefix("http://")


# ------------------------------------------------------------------------------------------------------------------- disks


def test_a_copy_gets_its_name_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file system has no links, a copy that was cut is not taken for the whole later."""
    body = b"x" * 5000
    file = File("m.gguf", len(body), "md5", hashlib.md5(body).hexdigest())
    (tmp_path / file.digest).write_bytes(body)

    def no_links(path: Path, other: Path) -> None:
        raise OSError("no links here")

    def cut(path: Path, other: Path) -> None:
        other.write_bytes(path.read_bytes()[:9])
        raise KeyboardInterrupt

    monkeypatch.setattr("os.link", no_links)
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 0}))
        with pytest.raises(ResourceError, match="hf:a/b"):
            sealed([file], tmp_path, "hf:a/b")
    with monkeypatch.context() as killed:
        killed.setattr("shutil.copyfile", cut)
        with pytest.raises(KeyboardInterrupt):
            sealed([file], tmp_path, "hf:a/b")
    (found,), stated = sealed([file], tmp_path, "hf:a/b")
    assert (tmp_path / found.digest).read_bytes() == body and stated == {found.digest: file.digest}
    assert {path.name for path in tmp_path.iterdir()} == {file.digest, found.digest}


# ------------------------------------------------------------------------------------------------------------------ logins


@pytest.mark.parametrize("receiver", ["realm", "registry"])
def test_a_login_is_not_sent_without_tls(
    receiver: str, stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither to the token service nor to a registry: only this machine may be asked so."""
    registry, host = stand
    registry.push("acme/desk:v1", titled({"m.gguf": GGUF}))
    registry.login, registry.identity = ("me", "s3cret"), "refresh"
    own = host.replace("127.0.0.1", "box.example")
    real = socket.getaddrinfo

    def here(name: Any, *more: Any) -> Any:
        return real("127.0.0.1" if name == "box.example" else name, *more)

    monkeypatch.setattr(socket, "getaddrinfo", here)
    named = own if receiver == "registry" else host
    if receiver == "realm":
        registry.realm = f"http://{own}/token"
    for entry in ({"auth": basic("me", "s3cret")}, {"identitytoken": "refresh"}):
        logged_in(tmp_path / "docker", {"auths": {named: entry}})
        with pytest.raises(ModelError, match="gives no access") as caught:
            pull(tmp_path / "out", f"oci:http://{named}/acme/desk:v1")
        assert "TLS" in caught.value.hint and "not sent" in caught.value.hint
    registry.way = "Basic"
    if receiver == "registry":
        logged_in(tmp_path / "docker", {"auths": {named: {"auth": basic("me", "s3cret")}}})
        with pytest.raises(ModelError, match="wants a login") as caught:
            pull(tmp_path / "out", f"oci:http://{named}/acme/desk:v1")
        assert "not sent" in caught.value.hint
    assert {own for _path, own in registry.asked} == {None}, "no login was sent"
    assert not registry.posted


@pytest.mark.parametrize(
    ("realm", "says"),
    [
        ("LONG", "longer than 1048576 bytes"), ("SLOW", "too slow"), ("http://x:abc/", "does not answer as a registry does"),
        ("https://xn--/", "does not answer as a registry does"),
    ],
)  # fmt: skip
def test_what_a_token_service_answers(
    realm: str, says: str, stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, host = stand
    registry.push("acme/desk:v1", titled({"m.gguf": GGUF}))
    registry.login = ("me", "s3cret")
    logged_in(tmp_path / "docker", {"auths": {host: {"auth": basic("me", "s3cret")}}})
    if realm == "LONG":
        registry.padding = 2 << 20
    elif realm == "SLOW":
        monkeypatch.setattr("slmops.catalog.registry.SLOWEST", -1.0)
    else:
        registry.realm = realm
    with pytest.raises(ModelError, match=says) as caught:
        pull(tmp_path / "out", f"oci:{host}/acme/desk:v1")
    assert caught.value.hint


# --------------------------------------------------------------------------------------------------------------- manifests


def test_what_is_read_while_planning_is_bounded(stand: Stand, tmp_path: Path) -> None:
    registry, _host = stand
    texts = [(f"{OLLAMA}license", bytes([65 + number]) * (3 << 20), {}) for number in range(3)]
    many = [(f"{OLLAMA}license", b"%d" % number, {}) for number in range(101)]
    for number, (layers, says) in enumerate(((texts, "9437184 bytes of texts"), (many, "102 layers"))):
        registry.push(f"me/odd:{number}", [(f"{OLLAMA}model", GGUF, {}), *layers])
        registry.asked.clear()
        with pytest.raises(RefusedError, match=says):
            ask(tmp_path / "out", f"ollama:me/odd:{number}")
        assert not [path for path, _own in registry.asked if "/blobs/" in path]


def test_names_are_looked_at_before_a_licence_is_read(stand: Stand, tmp_path: Path) -> None:
    registry, host = stand
    registry.push("acme/desk:v1", titled({"m.gguf": GGUF}) + titled({"LICENSE": b"\n"}) + titled({"LICENSE": b"\n\n"}))
    with pytest.raises(RefusedError, match="a name that comes twice"):
        ask(tmp_path / "out", f"oci:{host}/acme/desk:v1")
    assert not [path for path, _own in registry.asked if path.endswith(hashlib.sha256(b"\n").hexdigest())]


def test_a_manifest_does_not_write_to_the_terminal(stand: Stand, tmp_path: Path) -> None:
    registry, host = stand
    registry.push("acme/desk:v1", [*titled({"m.gguf": GGUF}), (f"{PACK}dataset.v1.raw", b"{}", {PATH: "\x1b[2Jx"})])
    with pytest.raises(RefusedError, match="a control character"):
        ask(tmp_path / "out", f"oci:{host}/acme/desk:v1")
    digest = registry.push("acme/desk:v2", titled({"m.gguf": GGUF}))
    entry = {"digest": digest, "size": 9, "platform": {"os": "\x1b[2J", "architecture": "x"}}
    registry.name("acme/desk:v3", json.dumps({"schemaVersion": 2, "manifests": [entry, entry]}).encode())
    with pytest.raises(ModelError, match="0 of 2 manifests") as caught:
        ask(tmp_path / "out", f"oci:{host}/acme/desk:v3")
    assert "\x1b" not in str(caught.value)


def test_a_size_that_no_layer_has(stand: Stand, tmp_path: Path) -> None:
    registry, host = stand
    layer = {"mediaType": "x", "digest": "sha256:" + "1" * 64, "size": 10**400, "annotations": {}}
    registry.name("acme/desk:v1", json.dumps({"schemaVersion": 2, "layers": [layer]}).encode())
    with pytest.raises(ModelError, match="states no possible size"):
        ask(tmp_path / "out", f"oci:{host}/acme/desk:v1")


def test_parameters_and_messages_are_no_instructions(stand: Stand, tmp_path: Path) -> None:
    """A key or a role that is none could be any other line of the Modelfile."""
    registry, _host = stand
    params = {"stop": "a\nFROM evil", "x\nFROM /etc/passwd\n#": "1", "a b": "2", "top_k": {"a": "b\nc"}}
    messages = [
        {"role": "user\nADAPTER ./evil\n#", "content": "x"}, {"role": ["user"], "content": "y"}, {"role": "user", "content": "hi"},
    ]  # fmt: skip
    push_ollama(registry, params=json.dumps(params).encode(), messages=json.dumps(messages).encode())
    pull(tmp_path / "out", "qwen3:0.6b")
    made = contents(tmp_path / "out")["Modelfile"].decode()
    assert made.endswith(
        'PARAMETER stop """a\nFROM evil"""\n# PARAMETER: see params.json\n# PARAMETER: see params.json\n'
        'PARAMETER top_k {"a": "b\\nc"}\n# MESSAGE: see messages.json\n# MESSAGE: see messages.json\nMESSAGE user """hi"""\n'
    )


# ---------------------------------------------------------------------------------------------------------------- archives


def test_a_packing_that_is_not_known_is_refused_before_the_first_byte(stand: Stand, tmp_path: Path) -> None:
    registry, host = stand
    zstd = (f"{PACK}weight.v1.tar+zstd", GGUF, {PATH: "m"})
    registry.push("acme/desk:v1", [zstd])
    with pytest.raises(RefusedError, match=r"m\.tar\.zst: packed as 'tar\+zstd', which is not unpacked"):
        ask(tmp_path / "out", f"oci:{host}/acme/desk:v1")
    assert not registry.spans
    code = (f"{PACK}code.v1.tar+zstd", b"code", {PATH: "c"})
    registry.push("acme/desk:v2", [(f"{KIT}model.v1.tar", tar({"m.gguf": GGUF}), {}), code])
    assert pull(tmp_path / "out", f"oci:{host}/acme/desk:v2") > 0, "what is left out may be packed in any way"


def test_an_archive_of_many_names_is_unpacked_once(
    stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slmops.catalog import tree

    registry, host = stand
    body, calls = tar(MODEL), []

    def counted(*given: Any) -> list[File]:
        calls.append(given)
        return real(*given)

    real = tree.unpack
    monkeypatch.setattr(tree, "unpack", counted)
    registry.push("acme/desk:v1", [(f"{PACK}weight.v1.tar", body, {PATH: f"m{number}"}) for number in range(9)])
    pull(tmp_path / "out", f"oci:{host}/acme/desk:v1")
    assert contents(tmp_path / "out") == MODEL and len(calls) == 1
    monkeypatch.setattr(tree, "MOST_FILES", 5)
    packed = [(f"{PACK}weight.v1.tar", tar({f"{n}{k}": b"" for k in range(4)}), {PATH: f"m{n}"}) for n in range(4)]
    registry.push("acme/desk:v2", packed)
    calls.clear()
    with pytest.raises(RefusedError, match="more than 5 files"):
        pull(tmp_path / "many", f"oci:{host}/acme/desk:v2")
    assert len(calls) == 2


def test_the_pass_that_was_left_out_is_made_up_for(
    stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slmops.catalog import one_pass
    from slmops.catalog.pull import get

    registry, host = stand
    registry.push("acme/desk:v1", [(f"{KIT}model.v1.tar", tar({f"m/{n}": b for n, b in MODEL.items()}), {})])
    pull(tmp_path / "out", f"oci:{host}/acme/desk:v1")
    asked: list[Any] = []

    def passed(*given: Any) -> dict[str, Any]:
        asked.append(given)
        return {"runtime": "none"}

    monkeypatch.setattr(one_pass, "ask", passed)
    planned = ask(tmp_path / "out", f"oci:{host}/acme/desk:v1", run=True)
    assert get(planned, pace=PACE)["checked"]["runtime"] == "none"
    (folder, names, form, _model, size) = asked[0]
    assert (folder, set(names), form) == (tmp_path / "out", set(MODEL), "safetensors")
    assert size == sum(map(len, MODEL.values()))

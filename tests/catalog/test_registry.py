"""Models from registries: what layers become, what is refused by name, and who is let in."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import struct
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slmops.catalog import names, source
from slmops.catalog.artifact import where
from slmops.catalog.pull import Plan, Wish, get, place, plan
from slmops.catalog.registry import place_of
from slmops.catalog.transfer import Pace
from slmops.catalog.unpack import unpack
from slmops.cli.main import main
from slmops.errors import IntegrityError, ModelError, RefusedError, ResourceError, UnreachableError
from tests.catalog.models import CONFIG, contents
from tests.hub_stand_in import Fault, tensors
from tests.registry_stand_in import INDEX, OCI, TITLE, Registry, sha, tar

Stand = tuple[Registry, str]
GGUF = b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(3000)
WEIGHTS = tensors(b"0", 3000)
MODEL = {"config.json": CONFIG, "tokenizer.json": b"{}", "model.safetensors": WEIGHTS}
OLLAMA = "application/vnd.ollama.image."
PACK = "application/vnd.cncf.model."
KIT = "application/vnd.kitops.modelkit."
PATH = "org.cncf.model.filepath"
PACE = Pace(sleep=lambda seconds: None)


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Stand]:
    """A registry, which is Ollama's too; the cache is empty and nobody is logged in."""
    registry = Registry()
    with registry.serve() as url:
        monkeypatch.setenv("SLMOPS_OLLAMA_REGISTRY", url)
        monkeypatch.setenv("SLMOPS_MODELS", str(tmp_path / "cache"))
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield registry, url.removeprefix("http://")


def ask(target: Path | None, text: str, pace: Pace = PACE, **wish: Any) -> Plan:
    return plan(source.parse(text), Wish(**{"run": False, **wish}), target, pace=pace)


def pull(target: Path, text: str, pace: Pace = PACE, **wish: Any) -> int:
    """Bytes that were fetched."""
    return int(get(ask(target, text, pace, **wish), pace=pace)["fetched"])


def titled(files: dict[str, bytes]) -> list[tuple[str, bytes, dict[str, str]]]:
    """Layers as ORAS pushes files."""
    return [("application/vnd.oci.image.layer.v1.tar", body, {TITLE: name}) for name, body in files.items()]


def push_ollama(registry: Registry, where: str = "library/qwen3:0.6b", **change: bytes) -> dict[str, bytes]:
    layers = {
        "model": GGUF, "template": b"{{ .Prompt }}", "system": b'Be "brief".', "license": b"\n Apache License\n Version 2.0, January 2004",
        "params": json.dumps({"stop": ["<|im_end|>", "\n"], "temperature": 0.6}).encode(), **change,
    }  # fmt: skip
    config = {"model_format": "gguf", "model_family": "qwen3", "model_type": "751.63M", "file_type": "Q4_K_M"}
    media = "application/vnd.docker.container.image.v1+json"
    registry.push(where, [(OLLAMA + kind, body, {}) for kind, body in layers.items()], (media, config))
    return layers


# --------------------------------------------------------------------------------------------------------------- Ollama


def test_a_model_of_ollamas_library(stand: Stand, capsys: pytest.CaptureFixture[str]) -> None:
    registry, _host = stand
    layers = push_ollama(registry)
    code = main(["pull", "qwen3:0.6b", "--no-check"])
    out, err = capsys.readouterr()
    assert code == 0, err
    folder = Path(out.strip())
    found = contents(folder)
    made = found.pop("Modelfile").decode()
    assert folder == place(source.parse("ollama:qwen3:0.6b"))
    assert found == {
        "model.gguf": GGUF, "template.txt": layers["template"], "system.txt": layers["system"], "params.json": layers["params"],
        "LICENSE": layers["license"],
    }  # fmt: skip
    assert 'FROM ./model.gguf\nTEMPLATE """{{ .Prompt }}"""\nSYSTEM """Be "brief"."""' in made
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER stop """\n"""\nPARAMETER temperature 0.6\n' in made
    for shown in ("qwen3-0.6b of the catalogue", "Apache License 2.0", "qwen3, 751.63M, Q4_K_M", "http://127.0.0.1"):
        assert shown in err
    assert err.index("licence") < err.index("checked"), "licence and size come before the bytes"
    before = len(registry.spans)
    assert main(["pull", "ollama:qwen3:0.6b", "--no-check"]) == 0
    assert "nothing to fetch" in capsys.readouterr().err and len(registry.spans) == before
    assert [(name, sent) for name, _start, sent, _right in registry.spans] == [("model", len(GGUF))], (
        "small layers come once"
    )


def test_small_layers_that_are_here_are_not_asked_for(stand: Stand, tmp_path: Path) -> None:
    """Neither those of a pull nor those of one that was ended; only the configuration, of which no file is made, is."""
    registry, _host = stand
    layers = push_ollama(registry)

    def asked() -> set[str]:
        found = {path.rpartition("/")[2] for path, _own in registry.asked if "/blobs/" in path}
        registry.asked.clear()
        return {kind for kind, body in layers.items() if sha(body) in found}

    blobs = tmp_path / ".out.pull" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / sha(layers["system"])[7:]).write_bytes(layers["system"])
    (blobs / sha(layers["license"])[7:]).write_bytes(b"damaged")
    pull(tmp_path / "out", "qwen3:0.6b")
    assert asked() == {"model", "template", "license", "params"}
    assert ask(tmp_path / "out", "qwen3:0.6b").current and asked() == set()


def test_projector_adapter_and_odd_texts(stand: Stand, tmp_path: Path) -> None:
    registry, _host = stand
    push_ollama(
        registry, "me/see:latest", projector=GGUF + b"p", adapter=GGUF + b"a", template=b'""" no quotes', unknown=b"?"
    )
    planned = ask(tmp_path / "out", "ollama:me/see:latest")
    assert [reason for _name, reason in planned.choice.left_out] == [
        f"a layer of kind {OLLAMA}unknown, which is not known"
    ]
    get(planned, pace=PACE)
    found = contents(tmp_path / "out")
    assert {"model.gguf", "mmproj-model.gguf", "adapter/adapter.gguf"} < set(found)
    made = found["Modelfile"].decode()
    assert "FROM ./mmproj-model.gguf\nADAPTER ./adapter/adapter.gguf\n# TEMPLATE: see template.txt\n" in made
    assert pull(tmp_path / "out", "ollama:me/see:latest") == 0


@pytest.mark.slow
def test_a_model_of_ollamas_library_runs(
    stand: Stand, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It passes its one text in llama.cpp, and is loaded without a network."""
    pytest.importorskip("llama_cpp", reason="needs the extra `llamacpp`")
    from slmops.engines import open_engine
    from slmops.engines.minimal import write_minimal

    registry, _host = stand
    (tmp_path / "made").mkdir()
    write_minimal(tmp_path / "made", "llama_cpp")
    push_ollama(registry, "library/desk:1", model=(tmp_path / "made" / "model.gguf").read_bytes())
    assert main(["pull", "desk:1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["checked"]["runtime"] == "llama.cpp"
        and found["checked"]["vocabulary"] == 261
        and found["licence"] == "Apache License 2.0"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    engine = open_engine(Path(found["folder"]))
    assert engine.encode([{"role": "user", "content": "hello"}])
    engine.close()


@pytest.mark.parametrize(
    ("layers", "config", "says"),
    [
        ([(f"{OLLAMA}license", b"x", {})], {}, "no weights in it"),
        ([(f"{OLLAMA}tensor", b"x", {})], {"model_format": "safetensors"}, "safetensors in Ollama's own layout"),
        ([(f"{OLLAMA}model", b"PK\x03\x04" * 9, {})], {}, r"model\.gguf: it does not begin as GGUF"),
        ([(f"{OLLAMA}model", b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), {})], {}, "1152921504606846976 tensors"),
        ([("application/vnd.docker.image.rootfs.diff.tar.gzip", b"x", {})], {}, "a container image"),
        (titled({"model.pkl": b"x"}), {}, "pickles: model.pkl"),
        (titled({"../../x.gguf": GGUF}), {}, r"`\.\.` in a name"),
        (titled({"/etc/x.gguf": GGUF}), {}, "an absolute name"),
        ([(f"{PACK}weight.v1.tar+zstd", b"x", {PATH: "m"})], {}, "packed as 'tar\\+zstd', which is not unpacked"),
        ([(f"{PACK}dataset.v1.raw", b"{}", {PATH: "config.json"})], {}, "no weights in it"),
    ],
)  # fmt: skip
def test_what_is_no_model_is_refused_by_name(
    layers: list[Any], config: Any, says: str, stand: Stand, tmp_path: Path
) -> None:
    registry, _host = stand
    registry.push("me/odd:1", layers, ("application/vnd.docker.container.image.v1+json", config))
    with pytest.raises(ModelError, match=says) as caught:
        pull(tmp_path / "out", "ollama:me/odd:1")
    assert caught.value.hint and not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


# -------------------------------------------------------------------------------------------------------- kinds of layers

KITFILE = ("application/vnd.kitops.modelkit.config.v1+json", {"package": {"license": "MIT"}, "model": {"name": "desk"}})
PACKED = (
    "application/vnd.cncf.model.config.v1+json",
    {"descriptor": {"licenses": ["Apache-2.0"]}, "config": {"paramSize": "1m"}},
)


@pytest.mark.parametrize(
    ("layers", "config", "licence", "wanted"),
    [
        (titled(MODEL), None, None, MODEL),
        ([(f"{PACK}weight.v1.raw" if n.endswith("s") else f"{PACK}weight.config.v1.raw", b, {PATH: n}) for n, b in MODEL.items()]
         + [(f"{PACK}dataset.v1.raw", b"{}", {PATH: "data.json"}), (f"{PACK}code.v1.raw", b"1/0", {PATH: "run.py"})],
         PACKED, "Apache-2.0", MODEL),
        ([(f"{PACK}weight.v1.tar", tar({"m/model.safetensors": WEIGHTS}), {PATH: "m"}),
          (f"{PACK}weight.config.v1.tar+gzip", tar({"m/config.json": CONFIG, "m/tokenizer.json": b"{}"}, "gz"), {PATH: "m"})],
         PACKED, "Apache-2.0", MODEL),
        ([(f"{KIT}model.v1.tar+gzip", tar({"./model/model.safetensors": WEIGHTS, "./model/config.json": CONFIG,
                                           "./model/tokenizer.json": b"{}"}, "gz"), {}),
          (f"{KIT}docs.v1.tar", tar({"README.md": b"read"}), {}), (f"{KIT}dataset.v1.tar", tar({"d.json": b"{}"}), {}),
          (f"{KIT}code.v1.tar", tar({"run.py": b"1/0"}), {})], KITFILE, "MIT", {**MODEL, "README.md": b"read"}),
        ([("application/vnd.docker.ai.gguf.v3", GGUF, {}), ("application/vnd.docker.ai.license", b"MIT License\n", {}),
          ("application/vnd.docker.ai.chat.template.jinja", b"{{ x }}", {})],
         ("application/vnd.docker.ai.model.config.v0.1+json", {"config": {"format": "gguf", "quantization": "Q4_K_M"}}),
         "MIT License", {"model.gguf": GGUF, "LICENSE": b"MIT License\n", "chat_template.jinja": b"{{ x }}"}),
        ([("application/vnd.docker.ai.safetensors", WEIGHTS, {}),
          ("application/vnd.docker.ai.vllm.config.tar", tar({"config.json": CONFIG, "tokenizer.json": b"{}"}), {})], None, None, MODEL),
        ([("application/vnd.oci.image.layer.v1.tar+gzip", tar({f"desk/{n}": b for n, b in MODEL.items()}, "gz"),
           {TITLE: "desk", "io.deis.oras.content.unpack": "true"})], None, None, MODEL),
        ([("application/vnd.oci.image.layer.v1.tar+gzip", tar({f"desk/{n}": b for n, b in MODEL.items()}, "gz"), {TITLE: "desk"})],
         None, None, MODEL),
        ([("application/vnd.cncf.model.weight.v1.gguf", GGUF, {})], PACKED, "Apache-2.0", {"model.gguf": GGUF}),
    ],
    ids=["oras", "modelpack-raw", "modelpack-tar", "modelkit", "docker-gguf", "docker-files", "oras-go", "oras-py", "modelpack-gguf"],
)  # fmt: skip
def test_layers_of_each_kind(
    layers: list[Any], config: Any, licence: str | None, wanted: dict[str, bytes], stand: Stand, tmp_path: Path
) -> None:
    registry, host = stand
    pinned = registry.push("acme/desk:v1", layers, *([config] if config else []))
    planned = ask(tmp_path / "out", f"oci:{host}/acme/desk:v1")
    assert planned.listing.licence == licence and planned.listing.commit == pinned[7:]
    get(planned, pace=PACE)
    assert contents(tmp_path / "out") == wanted
    before = len(registry.spans)
    again = ask(tmp_path / "out", f"oci:{host}/acme/desk:v1")
    assert again.current and get(again)["fetched"] == 0 and len(registry.spans) == before
    assert pull(tmp_path / "pinned", f"oci:{host}/acme/desk@{pinned}") > 0
    assert contents(tmp_path / "pinned") == wanted


def test_archives_are_chosen_from_when_they_are_there(stand: Stand, tmp_path: Path) -> None:
    registry, host = stand
    ggufs = {"a/m-Q4_K_M.gguf": GGUF, "a/m-Q8_0.gguf": GGUF + b"8", "a/mine.py": b"1/0", "a/x.pkl": b"p"}
    registry.push(
        "acme/desk:v1", [(f"{KIT}model.v1.tar", tar(ggufs), {}), (f"{KIT}code.v1.tar", tar({"a/run.py": b"1/0"}), {})]
    )
    name, out = f"oci:{host}/acme/desk:v1", tmp_path / "out"
    with pytest.raises(ModelError, match=r"(?s)several GGUF files.*Q8_0"):
        pull(out, name)
    before = len(registry.spans)
    assert pull(out, name, only=("*Q8_0*",)) == 0 and len(registry.spans) == before, (
        "the archive was kept, and is not fetched again"
    )
    assert set(contents(out)) == {"m-Q8_0.gguf"}
    assert pull(out, name, only=("*Q4*",), code=True) > 0
    assert set(contents(out)) == {"m-Q8_0.gguf", "m-Q4_K_M.gguf", "mine.py", "run.py"}
    (out / "m-Q4_K_M.gguf").write_bytes(b"GGUF")
    assert pull(out, name, only=("*Q4*",), code=True) > 0 and contents(out)["m-Q4_K_M.gguf"] == GGUF


def test_an_index_gives_what_is_for_this_machine(stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, host = stand
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    entries = []
    for machine in ("amd64", "arm64"):
        digest = registry.push(f"acme/desk:{machine}", titled({"m.gguf": GGUF + machine.encode()}))
        entries.append(
            {"mediaType": OCI, "digest": digest, "size": 9, "platform": {"os": "linux", "architecture": machine}}
        )
    entries.append({**entries[0], "platform": {"os": "unknown", "architecture": "unknown"}})
    registry.name("acme/desk:v1", json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}).encode())
    pull(tmp_path / "out", f"oci:{host}/acme/desk:v1")
    assert contents(tmp_path / "out")["m.gguf"].endswith(b"arm64")
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(ModelError, match=r"(?s)0 of 2 manifests.*linux/amd64") as caught:
        pull(tmp_path / "other", f"oci:{host}/acme/desk:v1")
    assert "@sha256:" in caught.value.hint


def test_a_manifest_of_another_checksum_is_not_taken(stand: Stand, tmp_path: Path) -> None:
    registry, host = stand
    pinned = registry.push("acme/desk:v1", titled({"m.gguf": GGUF}))
    other = registry.push("acme/desk:v2", titled({"m.gguf": GGUF + b"2"}))
    registry.manifests[f"acme/desk/{pinned}"] = registry.manifests[f"acme/desk/{other}"]
    with pytest.raises(IntegrityError, match="not the one asked for"):
        pull(tmp_path / "out", f"oci:{host}/acme/desk@{pinned}")
    registry.fault = lambda name, start: Fault("wrong")
    with pytest.raises(ModelError, match="not the one that the registry states"):
        pull(tmp_path / "out", f"oci:{host}/acme/desk:v1")
    assert not registry.spans and not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------------- archives


def raw(name: str, size: int, kind: bytes = b"0", field: bytes | None = None) -> bytes:
    """A tar header, with the size that it is told to state."""
    head = bytearray(512)
    head[: len(name)] = name.encode()
    head[124:136] = field or b"%011o\0" % size
    head[156:157] = kind
    head[148:156] = b"%06o\0 " % (sum(head) + 8 * 32)
    return bytes(head)


PAX_SPARSE = b"22 GNU.sparse.major=1\n"


@pytest.mark.parametrize(
    ("body", "packing", "says"),
    [
        (tar({"../x.gguf": GGUF}), "tar", r"'\.\./x\.gguf' in its archive: `\.\.`"),
        (tar({"/x.gguf": GGUF}), "tar", "an absolute name"),
        (tar({"a\\b": GGUF}), "tar", "a backslash"),
        (tar({}, name="x.gguf", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "tar", r"'x\.gguf': a symbolic link"),
        (tar({}, name="x.gguf", type=tarfile.LNKTYPE, linkname="y"), "tar", "a hard link"),
        (tar({}, name="x", type=tarfile.CHRTYPE), "tar", "a device"),
        (tar({}, name="x", type=tarfile.FIFOTYPE), "tar", "a pipe"),
        (raw("x", 0, b"S"), "tar", "a sparse file"),
        (raw("", len(PAX_SPARSE), b"x") + PAX_SPARSE.ljust(512, b"\0") + raw("x", 0), "tar", "a sparse file"),
        (tar({"x": bytes(5_000_000)}, "gz"), "tar+gzip", r"an archive bomb at x"),
        (raw("x", 0, field=b"\x80" + (10**18).to_bytes(11, "big")), "tar", "an archive bomb at x"),
        (raw("x", 5000) + b"short", "tar", "ends in the middle"),
        (raw("x", 10**10, b"L"), "tar", "a header of 10000000000 bytes"),
        (raw("x", 0)[:100], "tar", "no tar header"), (b"y" * 1024, "tar", "damaged"),
        (raw("", 5, b"x") + b"99 a\n".ljust(512, b"\0"), "tar", "an extended header that is none"),
        (tar({"x": os.urandom(99)}, "gz")[:-9], "tar+gzip", "damaged"), (tar({"x": b"1"}, "gz")[:-6] + bytes(6), "tar+gzip", "damaged"),
        (b"nothing", "tar+gzip", "damaged"),
        (tar({"x": b"1"}), "tar+lz4", "which is not unpacked"),
    ],
    ids=range(20),
)  # fmt: skip
def test_an_unsafe_archive_is_refused_by_name(body: bytes, packing: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(body)
    (tmp_path / "into").mkdir()
    with pytest.raises(RefusedError, match=says) as caught:
        unpack(tmp_path / "blob", packing, tmp_path / "into", "it")
    assert caught.value.hint and str(caught.value).startswith("it: ")
    assert all(path.parent == tmp_path / "into" or path.name in ("blob", "into") for path in tmp_path.rglob("*"))


def test_an_archive_that_is_damaged_anywhere(tmp_path: Path) -> None:
    """It is refused, or what is in it has plain names and its own checksums; nothing else is raised, and nothing is outside."""
    rng = random.Random(7)
    whole = bytearray(tar({"a/" + "b" * 120: rng.randbytes(700), "c/é": b"x" * 512, "d": b""}))
    refused = 0
    for number in range(400):
        into = tmp_path / str(number)
        into.mkdir()
        body = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            body[rng.randrange(6000)] = rng.choice([0, 0x2E, 0x2F, 0x30, 0x38, 0x80, 0xFF, rng.randrange(256)])
        if number % 2:  # with a checksum that fits, what is behind it is reached
            for at in range(0, 6000, 512):
                if body[at + 257 : at + 262] == b"ustar":
                    body[at + 148 : at + 156] = b" " * 8
                    body[at + 148 : at + 156] = b"%06o\0 " % sum(body[at : at + 512])
        (into / "blob").write_bytes(body[: rng.choice([len(body), rng.randrange(len(body))])])
        try:
            found = unpack(into / "blob", "tar", into, "it")
        except RefusedError:
            refused += 1
            continue
        assert all(source.refusal(file.name) is None and file.of(into / file.digest) == file.digest for file in found)
    assert refused > 100 and {path.parent.parent for path in tmp_path.rglob("*") if path.is_file()} == {tmp_path}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("packing", ["", "gz"])
def test_archives_as_python_writes_them(form: int, packing: str, tmp_path: Path) -> None:
    rng = os.urandom
    long = "a-long-folder-of-a-model/" * (3 if form == tarfile.USTAR_FORMAT else 6) + "weights-" + "x" * 60 + ".bin"
    files = {"a": b"", "b/c": rng(511), "b/d": rng(512), "b/ü": rng(513), long: rng(3_000_000)}
    if form == tarfile.USTAR_FORMAT:
        files.pop("b/ü")
    with tarfile.open(tmp_path / "blob", f"w:{packing}", format=form) as archive:  # type: ignore[call-overload]
        (tmp_path / "b").mkdir()
        archive.add(tmp_path / "b", "./b")
        for name, body in files.items():
            (tmp_path / "one").write_bytes(body)
            archive.add(tmp_path / "one", f"./{name}")
    (tmp_path / "into").mkdir()
    found = unpack(tmp_path / "blob", f"tar{'+gzip' if packing else ''}", tmp_path / "into", "it")
    assert {file.name: (tmp_path / "into" / file.digest).read_bytes() for file in found} == files
    assert all(
        file.of(tmp_path / "into" / file.digest) == file.digest and file.size == len(files[file.name]) for file in found
    )


def test_a_refused_archive_leaves_nothing(stand: Stand, tmp_path: Path) -> None:
    registry, host = stand
    registry.push(
        "acme/desk:v1",
        [(f"{KIT}model.v1.tar", tar({"m.gguf": GGUF}, name="l", type=tarfile.SYMTYPE, linkname="/"), {})],
    )
    with pytest.raises(RefusedError, match=r"weight-1\.tar: refused for 'l': a symbolic link"):
        pull(tmp_path / "out", f"oci:{host}/acme/desk:v1")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


# ------------------------------------------------------------------------------------------------------------------ logins


def logged_in(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def basic(name: str, secret: str) -> str:
    return base64.b64encode(f"{name}:{secret}".encode()).decode()


def test_a_login_goes_to_its_registry_and_not_where_that_redirects(stand: Stand, tmp_path: Path) -> None:
    registry, host = stand
    registry.push("acme/desk:v1", titled({"m.gguf": GGUF}))
    registry.login = ("me", "s3cret")
    name = f"oci:{host}/acme/desk:v1"
    with pytest.raises(ModelError, match=r"gives no access") as caught:
        pull(tmp_path / "out", name)
    assert f"docker login {host}" in caught.value.hint
    logged_in(tmp_path / "docker", {"auths": {"other.example": {"auth": basic("me", "s3cret")}}})
    with pytest.raises(ModelError, match=r"gives no access"):
        pull(tmp_path / "out", name)
    logged_in(tmp_path / "docker", {"auths": {f"http://{host}/v1/": {"auth": basic("me", "wrong")}}})
    with pytest.raises(ModelError, match=r"does not accept the login") as caught:
        pull(tmp_path / "out", name)
    assert "wrong" not in str(caught.value) + caught.value.hint
    logged_in(tmp_path / "docker", {"auths": {host: {"auth": basic("me", "s3cret")}}})
    storage = Registry(blobs=registry.blobs)
    with storage.serve() as url:
        registry.storage = url
        assert pull(tmp_path / "out", name) == len(GGUF)
    assert contents(tmp_path / "out") == {"m.gguf": GGUF}
    assert storage.asked and {own for _path, own in storage.asked} == {None}
    assert {own.partition(" ")[0] for path, own in registry.asked if path != "/token" and own} == {"Bearer"}


def test_a_token_that_ends_on_the_way_is_asked_for_again(stand: Stand, tmp_path: Path) -> None:
    registry, host = stand
    registry.push("acme/desk:v1", titled({"m.gguf": GGUF}))
    registry.login = ("me", "s3cret")
    logged_in(tmp_path / "docker", {"auths": {host: {"username": "me", "password": "s3cret"}}})
    planned = ask(tmp_path / "out", f"oci:{host}/acme/desk:v1")
    registry.valid = "another"
    get(planned, pace=Pace(jobs=4, segment=256, sleep=lambda seconds: None))
    assert contents(tmp_path / "out") == {"m.gguf": GGUF} and 2 <= registry.tokens_given <= 5


def test_identity_tokens_and_helpers(stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, host = stand
    registry.push("acme/desk:v1", titled({"m.gguf": GGUF}))
    registry.login, registry.identity = ("me", "s3cret"), "refresh"
    logged_in(tmp_path / "docker", {"auths": {host: {"identitytoken": "refresh"}}})
    assert pull(tmp_path / "one", f"oci:{host}/acme/desk:v1") == len(GGUF)
    helper = tmp_path / "bin" / "docker-credential-mine"
    helper.parent.mkdir()
    helper.write_text(
        '#!/bin/sh\nread host; echo "$host" >> "$0.asked"; echo \'{"Username": "me", "Secret": "s3cret"}\'\n'
    )
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", str(helper.parent), prepend=":")
    logged_in(tmp_path / "docker", {"credHelpers": {host: "mine"}})
    assert pull(tmp_path / "two", f"oci:{host}/acme/desk:v1") == len(GGUF)
    logged_in(tmp_path / "docker", {"auths": {host: {}}, "credsStore": "mine"})
    assert pull(tmp_path / "three", f"oci:{host}/acme/desk:v1") == len(GGUF)
    assert Path(f"{helper}.asked").read_text().split() == [host, host]
    logged_in(tmp_path / "docker", {"credHelpers": {host: "../mine"}})
    with pytest.raises(ModelError, match="gives no access"):
        pull(tmp_path / "four", f"oci:{host}/acme/desk:v1")


# ------------------------------------------------------------------------------------------------------------- what is said


def test_what_a_registry_answers(stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, _host = stand
    push_ollama(registry)
    slept: list[float] = []
    with pytest.raises(ModelError, match="no such model or tag"):
        pull(tmp_path / "out", "qwen3:7b")
    for code, says in ((403, r"refuses access \(403\)"), (401, "refuses access"), (418, "answered 418")):
        registry.fault = lambda name, start, code=code: Fault("status", code)  # type: ignore[misc]
        with pytest.raises(ModelError, match=says):
            pull(tmp_path / "out", "qwen3:0.6b")
    registry.fault = lambda name, start: Fault("status", 429, {"Retry-After": "3600"})
    with pytest.raises(ModelError, match="429") as caught:
        pull(tmp_path / "out", "qwen3:0.6b", Pace(sleep=slept.append))
    assert "run again in 3600 s" in caught.value.hint and not slept
    registry.fault = lambda name, start: Fault("loop")
    with pytest.raises(ModelError, match="redirects in a circle"):
        pull(tmp_path / "out", "qwen3:0.6b")
    registry.fault = None
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 16 << 20}))
    with pytest.raises(ResourceError, match="still to come"):
        pull(tmp_path / "out", "qwen3:0.6b")
    monkeypatch.undo()
    monkeypatch.setenv("SLMOPS_OLLAMA_REGISTRY", "http://127.0.0.1:9")
    with pytest.raises(UnreachableError, match=r"cannot be reached at http://127\.0\.0\.1:9"):
        pull(tmp_path / "out", "qwen3:0.6b")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UnreachableError, match="HF_HUB_OFFLINE is set"):
        pull(tmp_path / "out", "qwen3:0.6b")
    assert not (tmp_path / "out").exists() and not registry.spans


def test_without_a_network_what_is_there_is_taken(
    stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, host = stand
    push_ollama(registry)
    registry.push("acme/desk:v1", [(f"{KIT}model.v1.tar", tar({"a/m.gguf": GGUF}), {})])
    pull(tmp_path / "one", "qwen3:0.6b")
    pull(tmp_path / "two", f"oci:{host}/acme/desk:v1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert ask(tmp_path / "one", "qwen3:0.6b").current and ask(tmp_path / "two", f"oci:{host}/acme/desk:v1").current
    with pytest.raises(UnreachableError):
        ask(tmp_path / "one", "qwen3:1.7b")


def test_a_moved_tag_is_fetched_anew(stand: Stand, tmp_path: Path) -> None:
    registry, _host = stand
    push_ollama(registry)
    pull(tmp_path / "out", "qwen3:0.6b")
    push_ollama(registry, system=b"Be long.")
    assert pull(tmp_path / "out", "qwen3:0.6b") == len(b"Be long.") + len((tmp_path / "out" / "Modelfile").read_bytes())
    assert contents(tmp_path / "out")["system.txt"] == b"Be long."


# ------------------------------------------------------------------------------------------------------------------- names

D = "sha256:" + "1" * 64


@pytest.mark.parametrize(
    ("text", "kind", "name", "revision"),
    [
        ("qwen3:0.6b", "ollama", "library/qwen3", "0.6b"), ("ollama:llama3.2", "ollama", "library/llama3.2", "latest"),
        ("ollama:me/mine:v1", "ollama", "me/mine", "v1"),
        ("hf.co/ORG/NAME:Q4_K_M", "ollama", "hf.co/ORG/NAME", "Q4_K_M"),
        ("huggingface.co/ORG/NAME", "ollama", "hf.co/ORG/NAME", "latest"),
        ("registry.ollama.ai/library/qwen3:8b", "ollama", "library/qwen3", "8b"),
        ("ollama:mirror.example:5000/library/a:b", "ollama", "mirror.example:5000/library/a", "b"),
        ("oci:ghcr.io/acme/desk:v1", "oci", "ghcr.io/acme/desk", "v1"),
        ("oci:ghcr.io/acme/desk", "oci", "ghcr.io/acme/desk", "latest"),
        (f"oci:localhost:5000/a@{D}", "oci", "localhost:5000/a", D),
        (f"oci:docker.io/ai/smollm2:360M@{D}", "oci", "docker.io/ai/smollm2", D),
        ("oci://ghcr.io/a/b:1", "oci", "ghcr.io/a/b", "1"), ("oci:http://box:5000/a:1", "oci", "http://box:5000/a", "1"),
    ],
)  # fmt: skip
def test_names_of_registries(text: str, kind: str, name: str, revision: str) -> None:
    found = source.parse(text)
    assert found == source.Source(kind, name, revision)  # type: ignore[arg-type]
    assert source.parse(str(found)) == found, "what is shown can be given again"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("oci:desk:v1", "oci:REGISTRY"), ("oci:ghcr.io/Acme:v1", "oci:REGISTRY"), ("oci:ghcr.io/a@sha256:12", "oci:REGISTRY"),
        ("oci:ghcr.io/a/../b", "oci:REGISTRY"), ("ollama:a/../b", "NAME:TAG"), ("ollama:", "NAME:TAG"),
        ("ghcr.io/a/b:1", "oci:ghcr.io/a/b:1"), ("me/mine:v1", "ollama:me/mine:v1 or hf.co/me/mine:v1"),
        ("https://huggingface.co/a/b", "hf:ORG/NAME"),
    ],
)  # fmt: skip
def test_what_names_nothing_in_a_registry(text: str, says: str) -> None:
    with pytest.raises(ModelError) as caught:
        source.parse(text)
    assert says in caught.value.hint


def test_what_the_catalogue_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        str(names.resolve("qwen3-0.6b")[0]) == "hf:Qwen/Qwen3-0.6B"
        and "ollama:qwen3:0.6b" in names.resolve("qwen3-0.6b")[1]
    )
    found, said = names.resolve("tinyllama")
    assert str(found) == "ollama:tinyllama:1.1b" and "the one tag" in said
    with pytest.raises(ModelError, match=r"llama3\.2:1b, llama3\.2:3b") as caught:
        names.resolve("llama3.2")
    assert "ollama:llama3.2" in caught.value.hint
    with pytest.raises(ModelError, match="neither a path nor a model of the catalogue"):
        names.resolve("nonesuch")
    (tmp_path / "tinyllama").mkdir()
    assert names.resolve("tinyllama")[0].kind == "path", "what is here goes first"
    assert str(names.resolve("azure:phi-4")[0]) == "azure:Phi-4"


def test_foundry_without_its_sdk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "azure.ai.ml", None)
    assert main(["pull", "azure:phi-4"]) == 1
    err = capsys.readouterr().err
    assert "phi-4 of the catalogue: Phi-4 in Azure AI Foundry" in err
    assert "azure-ai-ml is not installed" in err and "pip install 'slmops[azure]'" in err


def test_where_a_registry_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place_of("docker.io", "alpine") == place_of("registry-1.docker.io", "library/alpine")
    assert (
        place_of("docker.io", "ai/x").base == "https://registry-1.docker.io"
        and place_of("docker.io", "ai/x").host == "docker.io"
    )
    assert place_of("ghcr.io", "a/b").base == "https://ghcr.io" and place_of("http://box", "a").base == "http://box"
    assert place_of("127.0.0.1.evil.example", "a").base.startswith("https://")
    monkeypatch.delenv("SLMOPS_OLLAMA_REGISTRY", raising=False)
    assert where(source.parse("a:b")).base == "https://registry.ollama.ai"
    monkeypatch.setenv("SLMOPS_OLLAMA_REGISTRY", "http://me:pw@mirror:5000/")
    found = where(source.parse("a:b"))
    assert (found.base, found.shown, found.host) == ("http://me:pw@mirror:5000", "http://mirror:5000", "mirror:5000")
    monkeypatch.setenv("HF_ENDPOINT", "https://hf-mirror.example")
    assert where(source.parse("hf.co/a/b:c")).base == "https://hf-mirror.example"
    assert hashlib.sha256(b"").hexdigest() == sha(b"")[7:]

"""The server as a process: keys from the command line, TLS, logs in files, and its end under load."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from slmops.cli.main import main
from slmops.engines.minimal import write_minimal
from slmops.errors import UsageError
from slmops.serve.keys import Keys, make, needed, read, write
from slmops.serve.tls import Certificate
from tests.serve.live import ENDLESS, HELLO, write_long
from tests.serve.test_server import served


def keys(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["keys", *arguments])
    said = capsys.readouterr()
    return code, said.out.strip(), said.err


def test_keys_are_made_listed_rotated_and_revoked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "keys.json")
    at = ("--file", file)
    code, token, _ = keys(capsys, "add", "desk", "--scope", "infer,metrics", "--tokens-per-minute", "100", *at)
    assert code == 0 and token.startswith("slm-") and len(token) == 4 + 43
    assert keys(capsys, "add", "desk", *at)[0] == 2
    assert "there is no scope" in keys(capsys, "add", "other", "--scope", "all", *at)[2]
    assert "--days is for" in keys(capsys, "rotate", "desk", "--days", "3", *at)[2]
    (key,) = read(Path(file))
    assert (key.scopes, key.tokens_per_minute, key.expires) == (("infer", "metrics"), 100, None)

    _, second, _ = keys(capsys, "rotate", "desk", "--overlap", "1", *at)
    old, new = read(Path(file))
    assert (new.scopes, new.tokens_per_minute, new.expires) == (key.scopes, 100, None) and old.expires is not None
    assert 3500 < old.expires - new.created <= 3601
    found = Keys(Path(file))
    assert found.find(token) == old and found.find(second) == new and found.find("slm-x") is None
    listed = json.loads(keys(capsys, "list", "--json", *at)[1])
    assert [one["name"] for one in listed] == ["desk", "desk"] and "digest" not in listed[0]
    assert second not in keys(capsys, "list", *at)[1] and "digest" not in keys(capsys, "list", *at)[1]

    assert keys(capsys, "revoke", old.id, *at)[0] == 0 and read(Path(file)) == [new]
    assert keys(capsys, "revoke", "desk", *at)[0] == 0 and read(Path(file)) == []
    assert keys(capsys, "revoke", "desk", *at)[0] == keys(capsys, "rotate", "desk", *at)[0] == 2


def test_a_rotated_key_lives_as_long_as_the_one_before_and_one_that_has_ended_is_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at, day = ("--file", str(tmp_path / "keys.json")), 86400
    keys(capsys, "add", "desk", "--days", "90", *at)
    for _ in range(2):  # the old one, which ends sooner now, is not what the next is made from
        assert keys(capsys, "rotate", "desk", *at)[0] == 0
    made = read(tmp_path / "keys.json")[-1]
    assert made.expires == made.created + 90 * day
    _, old = make("desk", ["infer"], time.time() - 3 * day, expires=int(time.time()) - day)
    write(tmp_path / "keys.json", [old])
    code, _, said = keys(capsys, "rotate", "desk", *at)
    assert code == 2 and "have ended" in said and "keys add desk" in said
    assert keys(capsys, "add", "desk", *at)[0] == 0 and len(read(tmp_path / "keys.json")) == 1


@pytest.mark.parametrize(
    ("method", "path", "scopes"),
    [
        ("GET", "/", ""), ("GET", "/healthz", ""), ("HEAD", "/readyz", ""), ("GET", "/chat/chat.js", ""),
        ("POST", "/", "infer"), ("POST", "/chat/x", "infer"), ("GET", "/nothing", "infer"), ("GET", "//healthz", "infer"),
        ("POST", "/v1/chat/completions", "infer"), ("GET", "/v1/models", "infer"), ("GET", "/v1/models/tiny", "infer"),
        ("DELETE", "/v1/models/tiny", "admin"), ("POST", "/v1/models/tiny/", "admin"),
        ("POST", "/api/chat", "infer"), ("POST", "/api/show", "infer"), ("GET", "/api/tags", "infer"),
        ("DELETE", "/api/delete", "admin"), ("DELETE", "/api/delete/", "admin"), ("POST", "/api/pull", "admin"),
        ("POST", "/api/blobs/sha256:0", "admin"), ("HEAD", "/api/blobs/sha256:0", "admin"), ("POST", "/api/create", "admin"),
        ("GET", "/admin/models", "admin"), ("POST", "/admin/models/tiny/load", "admin"), ("GET", "/metrics", "admin metrics"),
    ],
)  # fmt: skip
def test_what_a_path_needs(method: str, path: str, scopes: str) -> None:
    assert needed(method, path) == frozenset(scopes.split())


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", '{"keys": [{}]}', '{"keys": [{"name": "a", "digest": "x", "scopes": ["infer"], "created": 1}]}',
        json.dumps({"keys": [{"name": "a", "digest": "0" * 64, "scopes": ["root"], "created": 1}]}),
        json.dumps({"keys": [{"name": "a", "digest": "0" * 64, "scopes": [], "created": 1, "answers": 0}]}),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_keys_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys.json").write_text(text)
    assert main(["serve", "tiny=nowhere", "--keys", str(tmp_path / "keys.json")]) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "others can reach 0.0.0.0"),
        (["--host", "::"], "others can reach ::"),
        (["--host", "192.168.0.9"], "others can reach"),
        (["--keys", "keys.json", "--no-keys"], "exclude each other"),
        (["--cors", "*"], "--cors *"),
        (["--cors", "example.com"], "is no origin"),
        (["--tls-cert", "cert.pem"], "go together"),
        (["--log-prompts"], "is for a log"),
        (["--tls-cert", "nowhere.pem", "--tls-key", "nowhere.pem"], "no certificate"),
    ],
)
def test_what_would_be_unsafe_is_refused_before_anything_starts(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "tiny=nowhere", *options]) == 2
    assert said in capsys.readouterr().err


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = [
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-keyout", str(key),
        "-out", str(cert), "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


def test_a_certificate_is_renewed_whole_or_not_at_all(tmp_path: Path) -> None:
    (cert, key), (other, other_key) = certificate(tmp_path, "one"), certificate(tmp_path, "two")
    used = Certificate(cert, key)

    def shown() -> str:
        """Handshake in memory."""
        client = ssl.create_default_context()
        client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        near, far = client.wrap_bio(up, down), used.context.wrap_bio(down, up, server_side=True)
        for side in (near, far, near, far):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
        return ssl.DER_cert_to_PEM_cert(near.getpeercert(True) or b"")

    first, second = cert.read_text(), other.read_text()
    assert shown() == first and not used.renew()
    shutil.copy(other, cert)
    with pytest.raises(UsageError):
        used.renew()
    assert shown() == first
    shutil.copy(other_key, key)
    assert used.renew() and shown() == second
    locked = tmp_path / "locked.key"
    subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-in", str(key), "-passout", "pass:x1y2", "-out", str(locked)],
        check=True,
        capture_output=True,
    )
    with pytest.raises(UsageError, match="password"):
        Certificate(cert, locked)


@pytest.mark.slow
def test_keys_tls_and_a_log_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    model.mkdir()
    write_minimal(model, "onnx_genai")
    cert, key = certificate(tmp_path, "one")
    file, log = tmp_path / "keys.json", tmp_path / "log.jsonl"
    token = keys(capsys, "add", "desk", "--scope", "infer,metrics", "--file", str(file))[1]
    options = [
        "--keys",
        str(file),
        "--tls-cert",
        str(cert),
        "--tls-key",
        str(key),
        "--log",
        str(log),
        "--host",
        "0.0.0.0",
    ]
    with served(model, *options, "--answers", "1") as (plain, _):
        address = f"https://127.0.0.1:{plain.base_url.port}"
        own = {"authorization": f"Bearer {token}"}
        with httpx.Client(base_url=address, verify=ssl.create_default_context(cafile=str(cert)), headers=own) as client:
            body = {"model": "tiny", "messages": HELLO, "max_tokens": 2}
            assert client.post("/v1/chat/completions", json=body).status_code == 200
            assert client.post("/v1/chat/completions", json=body | {"n": 2}).status_code == 429
            assert client.get("/v1/models", headers={"authorization": "Bearer x"}).status_code == 401
            assert client.get("/metrics").status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{plain.base_url.port}/healthz")
    assert log.stat().st_mode & 0o077 == 0 and token not in log.read_text()
    found = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["status"], line.get("key"), line.get("error")) for line in found] == [
        (200, "desk", None), (429, "desk", "answers"), (401, None, "key"), (200, "desk", None),
    ]  # fmt: skip


@pytest.mark.slow
def test_its_end_under_load_finishes_every_stream_that_was_begun(tmp_path: Path) -> None:
    write_long(tmp_path, 512)
    streams = 48

    async def load(address: str, process: subprocess.Popen[str]) -> tuple[list[list[str]], list[int]]:
        begun, draining = asyncio.Semaphore(0), asyncio.Event()
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:

            async def stream(seed: int) -> list[str]:
                body: dict[str, Any] = {
                    "model": "tiny",
                    "messages": HELLO,
                    "stream": True,
                    "seed": seed,
                    "max_tokens": 300,
                } | ENDLESS
                async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    assert response.status_code == 200
                    lines = []
                    async for line in response.aiter_lines():
                        if line and not lines:
                            begun.release()
                        lines += [line] if line else []
                    return lines

            async def late() -> int:
                await draining.wait()
                body = {"model": "tiny", "messages": HELLO, "max_tokens": 1}
                return (await client.post("/v1/chat/completions", json=body)).status_code

            going = [asyncio.create_task(stream(seed)) for seed in range(streams)]
            new = [asyncio.create_task(late()) for _ in range(16)]
            for _ in range(8):  # the rest wait for a row: they were accepted too
                await begun.acquire()
            os.kill(process.pid, signal.SIGTERM)
            while (await client.get("/readyz")).status_code == 200:
                await asyncio.sleep(0)
            draining.set()
            refused = await asyncio.gather(*new)
            return await asyncio.gather(*going), list(refused)

    with served(tmp_path, "--rows", "8") as (client, process):
        found, refused = asyncio.run(load(str(client.base_url), process))
        assert process.wait(30) == 0
    assert refused == [503] * 16
    for lines in found:
        assert lines[-1] == "data: [DONE]"
        finishes = [choice["finish_reason"] for line in lines[:-1] for choice in json.loads(line[6:])["choices"]]
        assert finishes[-1] == "length"

"""Who is let in, and how often: over real HTTP, with clocks of the test's own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from slmops.engines.minimal import write_minimal
from slmops.serve.gate import Gate, Rules, State
from slmops.serve.keys import Keys, make, read, rotate, write
from slmops.serve.limits import Accounts, Limits
from slmops.serve.origins import Origins
from slmops.serve.record import Record
from tests.serve.live import ENDLESS, HELLO, Live, live, write_long

pytestmark = pytest.mark.slow
BODY = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 1}).encode()
CHAT = "/v1/chat/completions"


class Clock:
    def __init__(self, now: float = 1e6) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    write_minimal(folder, "onnx_genai")
    return folder


@pytest.fixture(scope="module")
def here(folder: Path) -> Iterator[Live]:
    """As on loopback without keys, with a page that may ask."""
    rules = Rules(
        Origins.of("127.0.0.1", False, frozenset({"desk.local"}), frozenset({"https://desk.example"})), body_s=0.5
    )
    with live(folder, rules, headers_s=0.5) as server:
        yield server


def post(server: Live, headers: dict[str, str], content: bytes = BODY, path: str = CHAT) -> int:
    return server.client.post(path, content=content, headers=headers).status_code


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "LOCALHOST"}, 200),
        ({"host": "desk.local"}, 200),
        ({"host": "evil.example:8000"}, 403),  # a name that was made to resolve to this machine
        ({"host": "evil.example:8000", "origin": "http://evil.example:8000"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "169.254.169.254"}, 403),
        ({"host": ""}, 403),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),  # our own page
        ({"host": "localhost:8000", "origin": "http://localhost:9000"}, 403),
        ({"origin": "https://desk.example"}, 200),
        ({"origin": "https://desk.example.evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"content-type": "application/json; charset=utf-8"}, 200),
        ({"content-type": "text/plain"}, 415),  # what a page may send without asking first
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "multipart/form-data; boundary=x"}, 415),
        ({"content-type": "text/plain; application/json"}, 415),
    ],
)
def test_a_page_of_somebody_else_reaches_nothing(here: Live, headers: dict[str, str], status: int) -> None:
    assert post(here, headers) == status


def test_the_host_is_looked_at_for_every_path(here: Live) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/v1/models", "/"):
        assert here.client.get(path, headers={"host": "evil.example"}).status_code == 403


def test_what_curl_sends_by_itself_is_read_where_ollamas_examples_do_so(here: Live) -> None:
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert post(here, form, path="/api/chat") == 400  # let through: the dialect says what is wrong with it
    assert post(here, form | {"sec-fetch-site": "same-origin"}, path="/api/chat") == 415


def test_only_named_pages_may_read(here: Live) -> None:
    page = {"origin": "https://desk.example"}
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    before = here.client.options(CHAT, headers=page | ask)
    assert before.status_code == 204 and before.headers["access-control-allow-origin"] == "https://desk.example"
    assert before.headers["access-control-allow-headers"] == "authorization,content-type"
    assert here.client.options(CHAT, headers={"origin": "https://evil.example"} | ask).status_code == 403
    found = here.chat(page)
    assert found.headers["access-control-allow-origin"] == "https://desk.example" and "origin" in found.headers["vary"]
    assert "x-request-id" in found.headers["access-control-expose-headers"]
    assert "access-control-allow-origin" not in here.chat().headers


def test_beyond_loopback_a_name_needs_keys_or_leave() -> None:
    def passes(origins: Origins, host: str) -> bool:
        try:
            origins.check("GET", "/v1/models", {"host": host})
        except Exception:
            return False
        return True

    bare, keyed = Origins.of("0.0.0.0", False), Origins.of("0.0.0.0", True)
    named = Origins.of("0.0.0.0", True, frozenset({"llm.example"}))
    assert passes(bare, "192.168.1.7:8000") and not passes(bare, "evil.example")
    assert passes(keyed, "llm.example")
    assert passes(named, "llm.example:443") and passes(named, "10.0.0.1") and not passes(named, "evil.example")


def test_a_body_or_a_header_that_does_not_come_is_not_waited_for(here: Live) -> None:
    def spoken(said: bytes, then: bytes = b"") -> tuple[bytes, float]:
        with socket.create_connection((here.client.base_url.host, here.client.base_url.port or 0), timeout=10) as wire:
            began = time.monotonic()
            wire.sendall(said)
            heard = b""
            wire.settimeout(0.1)
            while time.monotonic() - began < 8:
                try:
                    if not (part := wire.recv(4096)):
                        break
                    heard += part
                except TimeoutError:
                    if then:
                        wire.sendall(then)
            return heard, time.monotonic() - began

    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    heard, took = spoken(head, b" ")
    assert heard.startswith(b"HTTP/1.1 408") and took < 6
    assert spoken(b"GET /v1/models HTTP/1.1\r\nX: ", b"y")[1] < 6
    assert spoken(b"")[1] < 6
    assert here.chat().status_code == 200


def test_a_body_too_long_is_refused_whether_its_length_is_told_or_not(here: Live) -> None:
    assert post(here, {}, b" " * (5 << 20)) == 413
    assert here.client.post(CHAT, content=iter([b" " * (1 << 20)] * 5)).status_code == 413


def test_a_request_has_an_id_its_own_if_it_is_one(here: Live) -> None:
    assert here.chat({"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = [here.chat({"x-request-id": odd}).headers["x-request-id"] for odd in ("a b", "x" * 200)]
    assert all(id.startswith("req_") for id in made) and made[0] != made[1]


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def test_keys_scopes_ends_rotation_and_revocation_without_a_restart(folder: Path, tmp_path: Path) -> None:
    clock, file = Clock(), tmp_path / "keys.json"
    desk, desk_key = make("desk", ["infer"], clock.now)
    watcher, watcher_key = make("prometheus", ["metrics"], clock.now, expires=int(clock.now + 100))
    write(file, [desk_key, watcher_key])
    assert file.stat().st_mode & 0o077 == 0
    assert desk not in file.read_text() and desk_key.digest in file.read_text()
    said: list[str] = []
    with live(folder, Rules(keys=Keys(file, clock=clock, say=said.append))) as server:
        refused = server.chat()
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"] == {
            "message": "a key is needed: send Authorization: Bearer KEY", "type": "authentication_error", "param": None,
            "code": "invalid_api_key",
        }  # fmt: skip
        assert server.client.post("/api/chat", json={}).json() == {"error": refused.json()["error"]["message"]}
        assert server.client.get("/v1/models").status_code == server.client.get("/nothing").status_code == 401
        assert server.client.get("/healthz").status_code == server.client.get("/readyz").status_code == 200
        assert "tiny" not in server.client.get("/readyz").text
        assert server.client.get("/readyz", headers=bearer(desk)).json()["models"] == {"tiny": True}
        for wrong in (
            bearer(desk[:-1]),
            bearer(desk + "A"),
            bearer(desk_key.digest),
            {"authorization": desk},
            bearer("ü"),
        ):
            raw = [(name.encode(), value.encode()) for name, value in wrong.items()]
            assert server.client.get("/v1/models", headers=raw).status_code == 401
        assert server.chat(bearer(desk)).status_code == 200
        assert server.client.get("/metrics", headers=bearer(desk)).status_code == 403
        assert server.client.get("/metrics", headers=bearer(watcher)).status_code == 200
        denied = server.client.delete("/api/delete", headers=bearer(desk))
        assert denied.status_code == 403 and "admin" in denied.json()["error"]
        assert server.chat(bearer(watcher)).json()["error"]["type"] == "permission_error"

        second, keys = rotate(read(file), "desk", clock.now, overlap=60)
        write(file, keys)
        clock.now += 2
        assert server.chat(bearer(second)).status_code == server.chat(bearer(desk)).status_code == 200
        clock.now += 60
        assert server.chat(bearer(second)).status_code == 200 and server.chat(bearer(desk)).status_code == 401
        clock.now += 60
        assert server.client.get("/metrics", headers=bearer(watcher)).status_code == 401
        file.write_text("{")
        clock.now += 2
        assert server.chat(bearer(second)).status_code == 200 and "as before" in said[0]
        write(file, [])
        clock.now += 2
        assert server.chat(bearer(second)).status_code == 401


def test_rates_are_each_keys_own_and_flow_back(folder: Path, tmp_path: Path) -> None:
    clock, file = Clock(), tmp_path / "keys.json"
    first, first_key = make("first", ["infer"], 0)
    other, other_key = make("other", ["infer"], 0, tokens_per_minute=600)
    write(file, [first_key, other_key])
    rules = Rules(keys=Keys(file), accounts=Accounts(Limits(requests_per_minute=2), clock))
    with live(folder, rules) as server:
        told = server.chat(bearer(first)).headers
        assert (told["x-ratelimit-limit-requests"], told["x-ratelimit-remaining-requests"]) == ("2", "1")
        assert told["x-ratelimit-reset-requests"] == "30.000s"
        assert server.chat(bearer(first)).status_code == 200
        refused = server.chat(bearer(first))
        assert refused.status_code == 429 and refused.headers["retry-after"] == "30"
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        clock.now += 29
        assert (
            server.client.post("/api/chat", json={}, headers=bearer(first)).json()["error"].startswith("the limit is 2")
        )
        clock.now += 1.5
        assert server.chat(bearer(first)).status_code == 200

        found = server.chat(bearer(other), **ENDLESS, max_tokens=20)
        used = found.json()["usage"]["total_tokens"]
        assert found.headers["x-ratelimit-limit-tokens"] == "600"
        assert found.headers["x-ratelimit-remaining-tokens"] == str(600 - used)
        clock.now += 0.5  # five of them flow back
        again = server.chat(bearer(other))
        used += again.json()["usage"]["total_tokens"]
        assert again.headers["x-ratelimit-remaining-tokens"] == str(600 - used + 5)


def test_tokens_beyond_the_limit_are_paid_back_first(folder: Path) -> None:
    clock = Clock()
    with live(folder, Rules(accounts=Accounts(Limits(tokens_per_minute=10), clock))) as server:
        used = server.chat(**ENDLESS, max_tokens=20).json()["usage"]["total_tokens"]
        refused = server.chat()
        wait = (used - 10 + 1) * 6
        assert refused.status_code == 429 and refused.headers["retry-after"] == str(wait)
        clock.now += wait - 1
        assert server.chat().status_code == 429
        clock.now += 1
        assert server.chat().status_code == 200


def test_answers_at_a_time(folder: Path) -> None:
    with live(folder, Rules(accounts=Accounts(Limits(answers=2)))) as server:
        assert server.chat(n=2).status_code == 200
        refused = server.chat(n=3)
        assert refused.status_code == 429 and "2 answers at a time" in refused.json()["error"]["message"]
        assert server.chat(n=2).status_code == 200 and server.model.active == 0


def test_a_deadline_ends_an_answer_and_frees_its_row(folder: Path) -> None:
    slow = ENDLESS | {"n": 16, "logprobs": True, "top_logprobs": 20, "max_tokens": None}
    with live(folder, Rules(deadline=30), rows=1) as server:
        late = server.chat({"x-request-timeout": "0.02"}, **slow)
        assert late.status_code == 504 and late.json()["error"]["code"] == "deadline_exceeded"
        assert late.json()["error"]["type"] == "server_error"
        began = time.monotonic()
        body = {"model": "tiny", "messages": HELLO, "stream": True, "temperature": 0} | slow
        with server.client.stream("POST", CHAT, json=body, headers={"x-request-timeout": "0.1"}) as response:
            lines = [line for line in response.iter_lines() if line]
        assert response.status_code == 200 and "[DONE]" not in lines[-1]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        assert server.chat(max_tokens=1).status_code == 200 and time.monotonic() - began < 20
        assert server.model.active == server.model.rows_busy == 0
        for odd in ("0", "-1", "soon", "nan", "1e9"):
            assert server.chat({"x-request-timeout": odd}).json()["error"]["code"] == "invalid_timeout"


def test_a_model_that_takes_too_long_to_load_is_a_deadline_too(folder: Path, monkeypatch: Any) -> None:
    with live(folder, Rules(deadline=0.2)) as server:

        async def never() -> None:
            await asyncio.sleep(60)

        monkeypatch.setattr(server.model, "start", never)
        assert server.chat().status_code == 504
        for path, body in (("generate", {"prompt": "a"}), ("generate", {"prompt": ""}), ("embed", {"input": "a"})):
            late = server.client.post(f"/api/{path}", json={"model": "tiny", **body})
            assert late.status_code == 504 and "deadline" in late.json()["error"]


def test_the_deadline_bounds_the_wait_for_a_clients_template_too(folder: Path, monkeypatch: Any) -> None:
    async def never(*more: Any) -> str:
        await asyncio.sleep(60)
        return ""

    with live(folder, Rules(deadline=0.2)) as server:
        monkeypatch.setattr("slmops.serve.prompts.rendered", never)
        late = server.client.post("/api/generate", json={"model": "tiny", "prompt": "a", "template": "{{ messages }}"})
        assert late.status_code == 504 and "deadline" in late.json()["error"]


@pytest.mark.parametrize("path", ["/v1/models", "/api/tags"])
def test_work_that_looks_at_no_deadline_is_refused_in_the_dialects_shape_when_it_is_over(
    path: str, monkeypatch: Any
) -> None:
    async def never(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(60)

    async def main() -> httpx.Response:
        gate = Gate(never, State(), Rules(deadline=0.01))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://localhost") as asking:
            return await asking.get(path)

    monkeypatch.setattr("slmops.serve.gate.GRACE_S", 0.0)
    late = asyncio.run(main())
    assert late.status_code == 504 and "deadline" in str(late.json()["error"])
    assert isinstance(late.json()["error"], str) == path.startswith("/api/")


def test_a_client_that_takes_nothing_of_its_answer_is_left(tmp_path: Path) -> None:
    write_long(tmp_path)
    body = json.dumps(
        {"model": "tiny", "messages": HELLO, "stream": True, "n": 8, "logprobs": True, "top_logprobs": 20} | ENDLESS
    ).encode()
    with live(tmp_path, Rules(), taken_s=0.5) as server, socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.connect((server.client.base_url.host, server.client.base_url.port or 0))
        wire.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        end = time.monotonic() + 20
        while server.state.open == 0:
            assert time.monotonic() < end
        while server.state.open or server.model.active:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert server.chat(max_tokens=1).status_code == 200


def test_one_connection_too_many_is_told_so(folder: Path) -> None:
    with live(folder, most=3) as server, contextlib.ExitStack() as stack:
        server.client.close()  # it keeps one
        where = (str(server.client.base_url.host), server.client.base_url.port or 0)
        held = [stack.enter_context(socket.create_connection(where, 10)) for _ in range(3)]
        for _ in range(2):
            with socket.create_connection(where, 10) as more:
                said = b"".join(iter(lambda: more.recv(4096), b""))
            head, _, body = said.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1" in head
            assert json.loads(body)["error"]["code"] == "too_many_connections"
        held[0].sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert held[0].recv(4096).startswith(b"HTTP/1.1 200 ")
        held[1].close()
        end = time.monotonic() + 20
        while True:
            assert time.monotonic() < end
            with httpx.Client(base_url=server.client.base_url) as other:
                if other.get("/healthz").status_code == 200:
                    break


def test_connections_leave_descriptors_for_the_rest() -> None:
    script = (
        "import resource; from slmops.serve.connections import room\n"
        "for soft in (100, 500, 4000): resource.setrlimit(resource.RLIMIT_NOFILE, (soft, 5000)); print(room())"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["1", "372", "2048"]


def test_an_answer_that_is_not_taken_ends_soon_after_its_deadline(monkeypatch: Any) -> None:
    monkeypatch.setattr("slmops.serve.gate.GRACE_S", 0.05)
    told: list[Record] = []

    async def stuck(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(60)

    async def nothing(message: Any = None) -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    state = State()
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
    asyncio.run(Gate(stuck, state, Rules(deadline=0.05), [told.append])(scope, nothing, nothing))
    assert told[0].reason == "deadline" and told[0].failed and told[0].duration < 30 and state.open == 0

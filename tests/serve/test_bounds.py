"""What a client sends costs the server little, and is never a failure of the server: the application alone, in this process."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from slmops.engines.plain_tokenizer import whole
from slmops.serve.app import application
from slmops.serve.definitions import Definition, Definitions
from slmops.serve.dialects.body import check_numbers
from slmops.serve.dialects.ollama import Ollama
from slmops.serve.dialects.ollama_shapes import Clock, Generate
from slmops.serve.dialects.openai.responses import Kept
from slmops.serve.gate import Rules, State
from slmops.serve.keys import Keys, make, write
from slmops.serve.pool import Found, Pool
from slmops.serve.prompts import SHORT, written
from slmops.serve.scheduler import RequestError


def asked(app: Any, ask: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    async def main() -> None:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as http:
            await ask(http)

    asyncio.run(main())


@pytest.mark.parametrize("control", ["%0a", "%0d", "%00", "%7f", "%c2%85"])
def test_a_path_with_a_control_character_reaches_no_route(tmp_path: Path, control: str) -> None:
    token, key = make("desk", ["infer"], 0)
    write(tmp_path / "keys.json", [key])
    app = application(Pool([]), State(), Rules(keys=Keys(tmp_path / "keys.json")))
    paths = [(route.path, method) for route in app._app.routes for method in route.methods]

    async def ask(http: httpx.AsyncClient) -> None:
        for path, method in paths:
            at = path.replace("{name:path}", "x").replace("{", "").replace("}", "")
            for place in (at + control, at.replace("/", f"/{control}")):
                found = await http.request(method, place, headers={"authorization": f"Bearer {token}"})
                assert found.status_code == 400, (method, place)
                assert method == "HEAD" or "control character" in found.text

    assert ("/api/create", "POST") in paths and ("/metrics", "GET") in paths
    asked(app, ask)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("stop", ["x" * 257, ["y", "x" * 257], ["x"] * 5])
def test_texts_that_end_an_answer_are_few_and_short(path: str, stop: Any) -> None:
    prompt = {"prompt": "x"} if path == "completions" else {"messages": [{"role": "user", "content": "x"}]}

    async def ask(http: httpx.AsyncClient) -> None:
        found = await http.post(f"/v1/{path}", json={"model": "tiny", "stop": stop, **prompt})
        assert found.status_code == 400, found.text
        assert found.json()["error"]["param"].startswith("stop") and "at most" in found.json()["error"]["message"]

    asked(application(Pool([]), State()), ask)


class Cutting:
    """A model whose tokenizer notes whether it keeps everybody waiting."""

    context_length = 1 << 20
    marks: Mapping[str, str] = {}

    def __init__(self) -> None:
        self.tokenizer, self.waits = self, list[bool]()

    def ids(self, text: str) -> list[int]:
        self.waits.append(threading.current_thread() is threading.main_thread())
        return [1]

    def encode(self, turns: Any, tools: Any = ()) -> list[int]:
        return self.ids("")

    async def start(self) -> None:
        pass

    async def embed(self, prompts: list[list[int]]) -> list[list[float]]:
        return [[1.0] for _ in prompts]


def call(arguments: str) -> list[dict[str, Any]]:
    return [{"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": arguments}}}]


@pytest.mark.parametrize(
    ("turns", "waits"),
    [
        ([{"role": "user", "content": "a"}], True),
        ([{"role": "user", "content": "a" * SHORT}], False),
        ([{"role": "tool", "content": "a", "name": "a" * SHORT}], False),
        ([{"role": "assistant", "content": "", "tool_calls": call("a" * SHORT)}], False),
        ([{"role": "user", "content": ""}] * SHORT, False),
    ],
)
def test_a_long_conversation_is_cut_into_tokens_beside_everything_else(turns: Any, waits: bool) -> None:
    model: Any = Cutting()
    assert asyncio.run(written(Found(model), turns)) == [1] and model.waits == [waits]


@pytest.mark.parametrize(("size", "waits"), [(1, True), (SHORT, False)])
def test_long_texts_are_cut_into_tokens_beside_everything_else(size: int, waits: bool) -> None:
    model: Any = Cutting()
    dialect = Ollama(Pool([]))
    asyncio.run(dialect._prompt(Found(model), Generate(model="tiny", prompt="a" * size, raw=True)))
    asyncio.run(dialect._vectors(model, ["a" * size], Clock(), cut=False))
    assert model.waits == [waits] * 2


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1E+400", "1" * 400 + ".0"])
def test_a_number_that_json_cannot_say_again_is_no_json(number: str) -> None:
    tool = {"type": "function", "name": "f", "parameters": {"default": 0}}
    words = {"model": "tiny", "input": "NaN 1e999", "tools": [tool]}

    async def ask(http: httpx.AsyncClient) -> None:
        good = json.dumps(words)
        assert (await http.post("/v1/responses", content=good)).status_code == 404  # no such model
        for path in ("/v1/responses", "/api/show"):
            found = await http.post(path, content=good.replace(": 0", f": {number}"))
            assert found.status_code == 400 and "is no finite number" in found.text

    asked(application(Pool([]), State()), ask)


def test_numbers_are_looked_at_and_the_rest_left_to_who_reads_it() -> None:
    for fine in (b'{"a": "NaN"}', b"{NaN", b"[1e300]", b"\xff 1e999", b"[" * 100_000 + b"NaN", b"1" * 5000):
        check_numbers(fine)
    with pytest.raises(ValueError, match="1e999"):
        check_numbers(b"[1e999, ")


def test_names_that_no_file_can_have_are_unknown(tmp_path: Path) -> None:
    long = "/".join(["a" * 80] * 3) + ":" + "b" * 80
    pool = Pool([])
    pool.definitions = Definitions(tmp_path)

    async def ask(http: httpx.AsyncClient) -> None:
        assert (await http.post("/api/show", json={"model": long})).status_code == 404
        assert (await http.request("DELETE", "/api/delete", json={"model": long})).status_code == 404
        assert (await http.post("/v1/completions", json={"model": long, "prompt": "x"})).status_code == 404
        assert (await http.post("/api/create", json={"model": long, "from": "tiny"})).status_code == 400
        for base in ("~nosuchuser/x", "a/\0", "a/" * 3000):
            found = await http.post("/api/create", json={"model": "x", "from": base})
            assert found.status_code == 404 and "not found" in found.json()["error"]

    asked(application(pool, State()), ask)
    with pytest.raises(RequestError, match="too long"):
        pool.definitions.put(Definition(long, "tiny"))
    longest = "a" * 80 + "/" + "b" * 80 + ":" + "c" * 69
    pool.definitions.put(Definition(longest, "tiny"))
    assert pool.definitions.get(longest) and pool.definitions.delete(longest)


def test_half_a_character_is_the_replacement() -> None:
    assert whole("a\ud83d\ude00b") == "a😀b" and whole("a\ud83db\ude00") == "a\ufffdb\ufffd" and whole("aü😀") == "aü😀"


def test_kept_responses_take_little_more_memory_than_they_say() -> None:
    import tracemalloc

    kept, most = Kept(1 << 20), 2 << 20
    item = {"type": "output_text", "text": "a", "logprobs": [{"token": "a", "bytes": [1], "top_logprobs": []}] * 9}
    told = json.dumps({"object": "response", "output": [{"type": "message", "content": [item]}]})
    tracemalloc.start()
    try:
        for number in range(3000):
            kept.keep(
                {**json.loads(told), "id": str(number)}, [{"role": "user", "content": "x"}], [], {"role": "assistant"}
            )
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept.response("0") is None and kept.response("2999") == {**json.loads(told), "id": "2999"}
    assert held < most

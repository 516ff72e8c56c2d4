"""Bodies that are wrong in as many places as fit in: one small error, and what it takes to find it is bounded."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from pathlib import Path
from typing import Any

import httpx
import pytest

from slmops.engines.minimal import write_minimal
from slmops.serve.app import State, application
from slmops.serve.definitions import Definition, Definitions
from slmops.serve.model import Settings
from slmops.serve.pool import Pool

MANY = 100_000
ODD: list[Any] = [{}] * MANY
TURN = {"role": "user", "content": "a"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bodies")
    write_minimal(folder, "onnx_genai")
    return folder


def asked(folder: Path, path: str, body: Any) -> tuple[httpx.Response, int]:
    """The answer, and the most bytes that Python had beside the body."""

    async def main() -> tuple[httpx.Response, int]:
        app = application(Pool([Settings(folder, "m")]), State())
        content = json.dumps(body).encode()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as asking:
            await asking.post(path, json={})
            tracemalloc.start()
            try:
                found = await asking.post(path, content=content, headers={"content-type": "application/json"})
                return found, tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ODD}),
        ("/v1/completions", {"prompt": [ODD]}),
        ("/v1/completions", {"prompt": "a", "logit_bias": {str(n): "x" for n in range(MANY)}}),
        ("/v1/completions", {"prompt": "a", "metadata": {str(n): 1 for n in range(1500)}}),
        ("/v1/completions", {"prompt": "a", **{f"odd{n}": 1 for n in range(MANY)}}),
        ("/v1/embeddings", {"input": ODD}),
        ("/v1/chat/completions", {"messages": ODD}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ODD}]}),
        ("/v1/responses", {"input": ODD}),
        ("/v1/responses", {"input": [{"role": "user", "content": ODD}]}),
        ("/api/chat", {"messages": ODD}),
        ("/api/chat", {"messages": [{**TURN, "tool_calls": ODD}]}),
        ("/api/generate", {"prompt": "a", "context": ODD}),
        ("/api/embed", {"input": ODD}),
        ("/api/create", {"files": {str(n): 1 for n in range(MANY)}}),
    ],
)
def test_a_hundred_thousand_things_that_are_wrong_are_one_small_error(folder: Path, path: str, body: Any) -> None:
    found, most = asked(folder, path, {"model": "m", **body})
    assert found.status_code == 400 and len(found.content) < 300, found.text[:300]
    assert most < 40 << 20  # the body itself as Python has it takes up to 20 MB


def test_the_error_is_that_of_the_first_thing(folder: Path) -> None:
    for body, param in (({"prompt": ["a", "b", 1, {}]}, "prompt.2"), ({"prompt": "a", "odd": 1, "odder": 2}, "odd")):
        found, _ = asked(folder, "/v1/completions", {"model": "m", **body})
        assert found.json()["error"]["param"] == param


def test_too_many_texts_are_refused_before_any_is_cut_into_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: Any, text: str) -> list[int]:
        raise AssertionError("it was cut")

    monkeypatch.setattr("slmops.engines.plain_tokenizer.PlainTokenizer.ids", never)
    for path, field, most in (
        ("/v1/embeddings", "input", 2048),
        ("/v1/completions", "prompt", 16),
        ("/api/embed", "input", 2048),
    ):
        found, _ = asked(folder, path, {"model": "m", field: ["a"] * (most + 1)})
        assert found.status_code == 400 and f"at most {most}" in found.text


def test_a_list_of_models_looks_at_each_folder_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slmops.serve.dialects import ollama_models

    looked: list[Path] = []

    def looking(folder: Path, *, real: Any = ollama_models.facts) -> Any:
        looked.append(folder)
        return real(folder)

    async def main() -> Any:
        pool = Pool([Settings(folder, "m")])
        pool.definitions = Definitions(tmp_path)
        for name in ("a", "b", "c"):
            pool.definitions.put(Definition(f"{name}:latest", "m"))
        app = application(pool, State())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as asking:
            return (await asking.get("/api/tags")).json()

    monkeypatch.setattr(ollama_models, "facts", looking)
    assert len(asyncio.run(main())["models"]) == 4 and looked == [folder]

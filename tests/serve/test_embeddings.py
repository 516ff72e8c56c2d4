"""`/v1/embeddings` over a model that gives vectors: their length, base64, and cuts."""

from __future__ import annotations

import asyncio
import base64
import math
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from slmops.serve.dialects.openai import OpenAi
from slmops.serve.scheduler import RequestError


def post(**body: Any) -> httpx.Response:
    """Ask a model whose vector says how long the prompt is; it takes three tokens at most."""
    from starlette.applications import Starlette
    from starlette.routing import Route

    async def embed(prompts: list[list[int]]) -> list[list[float]]:
        if max(map(len, prompts)) > 3:
            raise RequestError("the prompt is longer than the context")
        return [[3.0 * len(prompt), 4.0 * len(prompt), 0.0] for prompt in prompts]

    tokenizer = SimpleNamespace(ids=lambda text: [ord(letter) for letter in text], size=200)
    model = SimpleNamespace(tokenizer=tokenizer, embed=embed)

    async def choose(name: str, who: str | None) -> Any:
        return SimpleNamespace(model=model) if name == "m" else None

    pool: Any = SimpleNamespace(choose=choose, names=["m"])
    app = Starlette(routes=[Route("/v1/embeddings", OpenAi(pool).embeddings, methods=["POST"])])

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
            return await client.post("/v1/embeddings", json={"model": "m"} | body)

    return asyncio.run(ask())


def test_vectors_have_length_one_as_numbers_and_in_base64() -> None:
    found = post(input=["a", "bcd"]).json()
    assert [one["embedding"] for one in found["data"]] == [[0.6, 0.8, 0.0]] * 2
    assert found["usage"] == {"prompt_tokens": 4, "total_tokens": 4} and found["data"][1]["index"] == 1
    packed = post(input=[5, 6], encoding_format="base64").json()["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(packed), "<f4") == pytest.approx([0.6, 0.8, 0.0])
    (cut,) = post(input="a", dimensions=1).json()["data"]
    assert math.isclose(cut["embedding"][0], 1.0) and len(cut["embedding"]) == 1


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"dimensions": 4}, "dimensions"),
        ({"input": "abcd"}, "input"),
        ({"input": [200]}, "input"),
        ({"input": []}, "input"),
    ],
)
def test_what_cannot_be_given_is_named(change: dict[str, Any], param: str) -> None:
    refused = post(**({"input": "a"} | change))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)

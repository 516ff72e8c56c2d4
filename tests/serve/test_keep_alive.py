"""How long a model stays: what a request says of it, who may say so, and for how long that holds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from slmops.engines.minimal import write_minimal
from slmops.serve.app import State, application
from slmops.serve.gate import Rules
from slmops.serve.keys import Keys, make, write
from slmops.serve.model import Model, Settings
from slmops.serve.pool import Pool

Ask = Callable[..., Awaitable[httpx.Response]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    write_minimal(folder, "onnx_genai")
    return folder


@pytest.fixture(autouse=True)
def without_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model and its embeddings, as far as is looked at here."""

    async def start(self: Model) -> None:
        self.context_length = 256

    async def embed(self: Model, prompts: Any, adapter: Any) -> list[list[float]]:
        return [[1.0] for _ in prompts]

    monkeypatch.setattr(Model, "start", start)
    monkeypatch.setattr(Model, "_embed", embed)


def using(
    folder: Path, work: Callable[[Ask, Model], Awaitable[None]], idle: float | None = 60.0, rules: Rules | None = None
) -> None:
    async def main() -> None:
        pool = Pool([Settings(folder, "m", idle=idle)])
        app = application(pool, State(), rules)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as asking:

            async def ask(route: str, key: str = "", **body: Any) -> httpx.Response:
                headers = {"authorization": f"Bearer {key}"} if key else {}
                return await asking.post(route, json={"model": "m", **body}, headers=headers)

            await work(ask, next(iter(pool)))

    asyncio.run(main())


@pytest.mark.parametrize("keep_alive", [0, -1, "10m", 1e12])
def test_it_holds_until_the_next_request(folder: Path, keep_alive: Any) -> None:
    kept = {0: 0.0, -1: None, "10m": 600.0, 1e12: 1e12}[keep_alive]

    async def work(ask: Ask, model: Model) -> None:
        for route, body in (
            ("/api/generate", {}),
            ("/api/embed", {"input": "a"}),
            ("/api/embeddings", {"prompt": "a"}),
        ):
            assert (await ask(route, **body, keep_alive=keep_alive)).status_code == 200
            assert model.kept == kept
            assert (await ask(route, **body)).status_code == 200
            assert model.kept == 60.0
        await ask("/api/generate", keep_alive=keep_alive)
        assert (await ask("/v1/embeddings", input="a")).status_code == 200 and model.kept == 60.0

    using(folder, work)


def test_a_key_that_may_only_ask_neither_unloads_nor_holds_a_model(folder: Path, tmp_path: Path) -> None:
    plain, plain_key = make("plain", ["infer"], 0)
    keeper, keeper_key = make("keeper", ["infer", "admin"], 0)
    write(tmp_path / "keys.json", [plain_key, keeper_key])
    rules = Rules(keys=Keys(tmp_path / "keys.json"))

    def refused(idle: float | None, *times: Any) -> None:
        async def work(ask: Ask, model: Model) -> None:
            routes: tuple[tuple[str, dict[str, Any]], ...] = (
                ("/api/generate", {}), ("/api/chat", {}), ("/api/embed", {"input": "a"}), ("/api/embeddings", {"prompt": "a"}),
            )  # fmt: skip
            for route, body in routes:
                for time in (0, -1, 61, "30s", 60):
                    found = await ask(route, plain, **body, keep_alive=time)
                    assert found.status_code == (403 if time in times else 200), (route, time, found.text)
                    assert found.status_code == 200 or "scope admin" in found.json()["error"]
                    assert (await ask(route, keeper, **body, keep_alive=time)).status_code == 200

        using(folder, work, idle, rules)

    refused(60.0, 0, -1, 61)
    refused(None, 0)


def test_a_model_that_is_kept_for_ages_is_listed_as_kept_for_ever(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "ready", True)

    async def main() -> Any:
        pool = Pool([Settings(folder, "m")])
        app = application(pool, State())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as asking:
            await asking.post("/api/generate", json={"model": "m", "keep_alive": 1e12})
            return (await asking.get("/api/ps")).json()

    (row,) = asyncio.run(main())["models"]
    assert row["expires_at"].startswith("9999")

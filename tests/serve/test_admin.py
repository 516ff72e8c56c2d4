"""Many models and their versions as clients and keepers meet them over HTTP; the server without a socket."""

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
from slmops.serve.model import Ask, Settings
from slmops.serve.pool import Pool
from slmops.serve.sampling import Picking

pytestmark = pytest.mark.slow
EACH = 10**8
CANARIES = [{"messages": [{"role": "user", "content": "hello"}]}, {"prompt": "parcel", "max_tokens": 4}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("admin")
    write_minimal(folder, "onnx_genai")
    return folder


def using(
    wanted: list[Settings], work: Callable[[httpx.AsyncClient, Pool], Awaitable[None]], budget: int = 10 * EACH
) -> None:
    async def main() -> None:
        pool = Pool(wanted, budget=budget, reserve=lambda s: EACH, free=lambda: None)
        try:
            async with client(pool) as asking:
                await work(asking, pool)
        finally:
            await pool.stop()

    asyncio.run(asyncio.wait_for(main(), 120))


def client(pool: Pool, address: str = "127.0.0.1", host: str = "127.0.0.1:8000") -> httpx.AsyncClient:
    carrier = httpx.ASGITransport(application(pool, State()), client=(address, 4000))
    return httpx.AsyncClient(transport=carrier, base_url=f"http://{host}", timeout=60)


async def chat(asking: httpx.AsyncClient, model: str, **more: Any) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "x"}], "temperature": 0, "max_tokens": 3, **more}
    return await asking.post("/v1/chat/completions", json=body)


def test_models_come_and_go_without_clients_noticing(folder: Path) -> None:
    async def work(asking: httpx.AsyncClient, pool: Pool) -> None:
        listed = (await asking.get("/v1/models")).json()
        assert [one["id"] for one in listed["data"]] == ["big", "other", "small"]
        assert (await asking.get("/readyz")).status_code == 200, "a model that is not asked is none that fails"
        answered = await chat(asking, "big")
        assert answered.json()["model"] == answered.headers["x-slmops-model"] == "big"
        assert (await chat(asking, "other")).status_code == 200
        told = (await asking.get("/admin/models")).json()
        states = {name: one["state"] for name, one in told["models"].items()}
        assert states == {"big": "unloaded", "other": "loaded", "small": "unloaded"}
        assert told["memory"]["reserved_bytes"] == told["memory"]["budget_bytes"] == EACH
        assert (await asking.get("/v1/models")).json() == listed
        other = pool.find("other")
        assert other is not None
        answer = other.answer(Ask([7], None, Picking(logit_bias={4: -100.0})))
        await anext(answer)
        refused = await chat(asking, "small")
        assert refused.status_code == 507 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "no_memory" and refused.json()["error"]["type"] == "server_error"
        for stream in (False, True):
            answered = await chat(asking, "big", stream=stream)
            assert answered.status_code == 200 and answered.headers["x-slmops-model"] == "other"
            assert '"model":"other"' in answered.text
        busy = await asking.post("/admin/models/other/unload")
        assert busy.status_code == 409 and (await asking.post("/admin/models/small/load")).status_code == 507
        await answer.aclose()
        assert (await asking.post("/admin/models/other/unload")).json()["state"] == "unloaded"
        loaded = (await asking.post("/admin/models/small/load")).json()
        assert loaded["state"] == "loaded" and 0 < loaded["resident_bytes"] <= loaded["peak_bytes"] <= EACH

    wanted = [Settings(folder, "big", fallback="other"), Settings(folder, "other"), Settings(folder, "small")]
    using(wanted, work, budget=EACH)


def test_versions_are_swapped_tried_and_taken_back(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())

    async def work(asking: httpx.AsyncClient, pool: Pool) -> None:
        under, new = "/admin/models/a/m", {"folder": str(tmp_path)}
        assert (await chat(asking, "a/m")).headers["x-slmops-version"] == "1"
        swapped = await asking.post(f"{under}/swap", json={**new, "canaries": CANARIES, "rows": 3})
        assert swapped.json() == {"version": 2, "before": 1, "canaries": 2, "passed": 2}
        assert (await chat(asking, "a/m")).headers["x-slmops-version"] == "2"
        card = (await asking.get(under)).json()
        assert card["folder"] == str(tmp_path) and card["before"] == {"version": 1, "folder": str(folder)}
        current = pool.find("a/m")
        assert current is not None and current.settings.rows == 3
        wrong = [{"prompt": "parcel", "expect": "no model says this"}]
        failed = await asking.post(f"{under}/swap", json={**new, "canaries": wrong})
        assert failed.status_code == 409 and failed.json()["error"]["code"] == "canaries_failed"
        assert failed.json()["error"]["failed"][0]["wanted"] == "no model says this"
        assert (await asking.post(f"{under}/rollback")).json() == {"version": 1, "before": 2}
        tried = await asking.post(f"{under}/candidate", json={**new, "share": 1.0})
        assert tried.json()["version"] == 3
        assert (await chat(asking, "a/m", user="someone")).headers["x-slmops-version"] == "3"
        told = (await asking.get(f"{under}/report")).json()
        assert told["requests"]["candidate"]["answered"] == 1 and told["requests"]["current"]["answered"] == 0
        ended = await asking.delete(f"{under}/candidate")
        assert ended.json()["version"] == 1 and ended.json()["report"]["requests"] == told["requests"]
        assert (await chat(asking, "a/m", user="someone")).headers["x-slmops-version"] == "1"
        await asking.post(f"{under}/candidate", json={**new, "shadow": 1.0})
        await chat(asking, "a/m", temperature=1.0)
        promoted = await asking.post(f"{under}/promote", json={"canaries": CANARIES})
        assert promoted.json()["version"] == 4 and promoted.json()["passed"] == 2
        assert (await chat(asking, "a/m")).headers["x-slmops-version"] == "4"
        for body, status, said in (
            ({**new, "canaries": CANARIES, "shaer": 1}, 400, "shaer"),
            ({"canaries": CANARIES}, 400, "folder"),
            ({**new, "canaries": []}, 400, "canaries"),
            ({**new, "canaries": str(tmp_path / "none.jsonl")}, 400, "cannot be read"),
            (new, 409, "no canaries"),
            ({"folder": "/nowhere", "canaries": CANARIES}, 422, "no model folder"),
        ):
            refused = await asking.post(f"{under}/swap", json=body)
            assert refused.status_code == status and said in refused.json()["error"]["message"]
        assert (await asking.post("/admin/models/none/swap", json={**new, "canaries": CANARIES})).status_code == 404
        assert (await asking.get(f"{under}/report")).status_code == 409
        assert (await chat(asking, "a/m")).headers["x-slmops-version"] == "4"

    using([Settings(folder, "a/m")], work)


def test_only_programs_of_this_machine_may_change_models(folder: Path) -> None:
    async def main() -> None:
        pool = Pool([Settings(folder, "m")])
        for address, host, headers, status in (
            ("127.0.0.1", "localhost:8000", {}, 200),
            ("::1", "[::1]:8000", {}, 200),
            ("10.0.0.5", "127.0.0.1:8000", {}, 403),
            ("127.0.0.1", "elsewhere.example:8000", {}, 403),
            ("127.0.0.1", "localhost:8000", {"origin": "http://localhost:8000"}, 403),
            ("127.0.0.1", "localhost:8000", {"x-forwarded-for": "10.0.0.5"}, 403),
            ("127.0.0.1", "localhost:8000", {"x-forwarded-host": "llm.example"}, 403),
            ("127.0.0.1", "localhost:8000", {"x-forwarded-proto": "https"}, 403),
            ("127.0.0.1", "localhost:8000", {"via": "1.1 proxy"}, 403),
        ):
            async with client(pool, address, host) as asking:
                assert (await asking.get("/admin/models", headers=headers)).status_code == status
                assert (await asking.post("/admin/models/m/rollback", headers=headers)).status_code == (
                    409 if status == 200 else 403
                )

    asyncio.run(main())


def test_a_server_may_have_no_admin_at_all(folder: Path) -> None:
    async def main() -> list[int]:
        app = application(Pool([Settings(folder, "m")]), State(), Rules(admin=False))
        carrier = httpx.ASGITransport(app, client=("127.0.0.1", 4000))
        async with httpx.AsyncClient(transport=carrier, base_url="http://127.0.0.1:8000") as asking:
            return [(await asking.get(path)).status_code for path in ("/admin/models", "/admin/models/m", "/v1/models")]

    assert asyncio.run(main()) == [404, 404, 200]

"""A server in a thread of this process, over real HTTP, whose rules and clocks a test can reach."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from slmops.serve.app import application
from slmops.serve.connections import protocol
from slmops.serve.gate import Rules, State
from slmops.serve.model import Model, Settings
from slmops.serve.pool import Pool

HELLO = [{"role": "user", "content": "hello"}]
ENDLESS = {"logit_bias": {"4": -100}}
"""The answer does not end before the context does."""


class Live:
    """What a test asks, and what it looks into."""

    def __init__(self, client: httpx.Client, pool: Pool, state: State) -> None:
        self.client, self.pool, self.state = client, pool, state

    @property
    def model(self) -> Model:
        return next(iter(self.pool))

    def chat(self, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
        body = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 4} | more
        return self.client.post("/v1/chat/completions", json=body, headers=headers)


@contextlib.contextmanager
def live(
    folder: Path,
    rules: Rules | None = None,
    tell: Sequence[Callable[..., None]] = (),
    headers_s: float = 15.0,
    taken_s: float = 60.0,
    most: int = 100,
    **settings: Any,
) -> Iterator[Live]:
    state, started, found = State(), threading.Event(), {}
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    bound.listen()

    async def main() -> None:
        pool = found["pool"] = Pool([Settings(folder, "tiny", **settings)])
        await pool.start()
        app = application(pool, state, rules, tell)
        config = uvicorn.Config(
            app, log_level="error", access_log=False, http=protocol(headers_s, taken_s, most), ws="none"
        )
        found["server"] = server = uvicorn.Server(config)
        started.set()
        await server._serve([bound])
        await pool.stop()

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            found["error"] = error
            raise
        finally:
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert started.wait(60) and "error" not in found, found
        with httpx.Client(base_url=f"http://127.0.0.1:{bound.getsockname()[1]}", timeout=60) as client:
            yield Live(client, found["pool"], state)
    finally:
        if "server" in found:
            found["server"].should_exit = True
        thread.join(60)
        bound.close()
    assert not thread.is_alive()


def write_long(folder: Path, context: int = 2048) -> None:
    """The minimal model with a context that an answer needs a while to fill."""
    from slmops.engines import minimal

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minimal, "CONTEXT", context)
        minimal.write_minimal(folder, "onnx_genai")

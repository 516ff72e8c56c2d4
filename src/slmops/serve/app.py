"""The server: routes, health, and how it starts and ends.

It binds to loopback unless told otherwise. On SIGTERM every answer that was begun is finished, new ones get 503, and then it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from slmops.errors import MissingExtraError, SlmopsError
from slmops.serve.model import Settings
from slmops.serve.pool import Pool

LARGEST_BODY = 4 << 20
DRAIN_S = 600.0


class Gate:
    """Refuses requests while the server drains, and bodies that are too large, before anything reads them. ASGI middleware."""

    def __init__(self, app: Any, state: State, refuse: Callable[..., Any]) -> None:
        self._app, self._state, self._refuse = app, state, refuse

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See ASGI."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        if self._state.draining:
            await self._refuse(503, "the server is about to end", "server_error", code="draining")(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if int(length) > LARGEST_BODY:
            said = f"the body has {int(length)} bytes, more than {LARGEST_BODY}"
            await self._refuse(413, said)(scope, receive, send)
            return
        self._state.open += 1
        try:
            await self._app(scope, self._bounded(receive), send)
        finally:
            self._state.open -= 1

    def _bounded(self, receive: Any) -> Any:
        """A body without a length is cut where it is too large, and is then no JSON."""
        seen = 0

        async def bounded() -> Any:
            nonlocal seen
            message = await receive()
            if message["type"] != "http.request":  # the client has left: nobody may be kept from hearing it
                return message
            seen += len(message.get("body", b""))
            return message if seen <= LARGEST_BODY else {"type": "http.request", "body": b"\0", "more_body": False}

        return bounded


class State:
    """What the server is at. `open`: requests that are being answered."""

    def __init__(self) -> None:
        self.draining = False
        self.open = 0


def application(pool: Pool, state: State) -> Any:
    """The ASGI application over some models, which it stops at its end.

    Raises:
        MissingExtraError: starlette is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.requests import Request
        from starlette.responses import JSONResponse, Response
        from starlette.routing import Route
    except ImportError as error:
        raise MissingExtraError("The server", "serve") from error
    from slmops.serve.dialects.openai import OpenAi
    from slmops.serve.dialects.openai import error as refuse

    openai = OpenAi(pool)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> Response:
        loaded = {model.settings.name: model.ready for model in pool}
        good = all(loaded.values()) and not state.draining
        return JSONResponse({"ready": good, "draining": state.draining, "models": loaded}, 200 if good else 503)

    async def missing(request: Request, failure: Exception) -> Response:
        status = int(getattr(failure, "status_code", 404))
        said = f"{request.method} is not for {request.url.path}" if status == 405 else f"there is no {request.url.path}"
        return refuse(status, said, code="unknown_url")

    async def broken(request: Request, failure: Exception) -> Response:
        return refuse(500, "the server failed", "server_error")

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        await pool.stop()

    routes = [
        Route("/healthz", health),
        Route("/readyz", ready),
        Route("/v1/models", openai.models),
        Route("/v1/models/{name:path}", openai.model),
        Route("/v1/chat/completions", openai.chat, methods=["POST"]),
        Route("/v1/completions", openai.completions, methods=["POST"]),
    ]
    gate = Middleware(Gate, state=state, refuse=refuse)
    handlers: Any = {404: missing, 405: missing, 500: broken}
    return Starlette(routes=routes, middleware=[gate], exception_handlers=handlers, lifespan=lifespan)


def serve(wanted: Sequence[Settings], host: str, port: int, say: Callable[[str], None]) -> None:
    """Load the models, answer until SIGTERM or SIGINT, finish what was begun.

    Args:
        say: gets the lines that people read.

    Raises:
        MissingExtraError: the packages of the server are not installed.
        ModelError: a model cannot be loaded.
        SlmopsError: the address is taken.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtraError("The server", "serve") from error
    state = State()
    pool = Pool(wanted)
    app = application(pool, state)
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", access_log=False, timeout_keep_alive=75)

    class Server(uvicorn.Server):  # type: ignore[misc]
        """Drains before it ends."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            if state.draining:  # asked twice
                self.should_exit = self.force_exit = True
                return
            state.draining = True
            say(f"ending when {state.open} answers are finished; once more to end at once")
            asyncio.get_running_loop().create_task(self._drain())

        async def _drain(self) -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_S):
                    while state.open:
                        await asyncio.sleep(0.02)
            self.should_exit = True

    async def main() -> None:
        server = Server(config)
        socket = _bound(config)
        try:
            await pool.start()
            address = f"http://{host if ':' not in host else f'[{host}]'}:{socket.getsockname()[1]}"
            for model in pool:
                s = model.settings
                say(f"{s.name}: {s.rows} answers at a time, {model.context_length} tokens each")
            say(f"serving {address}/v1")
            loop = asyncio.get_running_loop()
            for sign in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(sign, server.handle_exit, sign, None)
            with contextlib.suppress(asyncio.CancelledError):
                await server._serve([socket])
        finally:
            socket.close()
            await pool.stop()

    asyncio.run(main())


def _bound(config: Any) -> Any:
    import socket

    made = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((config.host, config.port))
    except OSError as error:
        made.close()
        raise SlmopsError(
            f"{config.host}:{config.port} cannot be used: {error.strerror}",
            "give another --port, or 0 for any that is free",
        ) from error
    made.listen(2048)
    made.set_inheritable(False)
    return made

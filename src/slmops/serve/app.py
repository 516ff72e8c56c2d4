"""The server: routes, health, and how it starts and ends.

It binds to loopback unless told otherwise. On SIGTERM every answer that was begun is finished, new ones get 503, and then it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slmops.errors import MissingExtraError, SlmopsError
from slmops.serve import record as records
from slmops.serve import versions
from slmops.serve.adapters import JOIN
from slmops.serve.connections import protocol, room
from slmops.serve.definitions import Definitions
from slmops.serve.definitions import folder as own_folder
from slmops.serve.gate import Gate, Rules, State
from slmops.serve.model import Model, Settings
from slmops.serve.pool import Pool
from slmops.serve.record import Record
from slmops.serve.refusals import body_of
from slmops.serve.tls import Certificate

DRAIN_S = 600.0


def application(
    pool: Pool, state: State, rules: Rules | None = None, tell: Sequence[Callable[[Record], None]] = ()
) -> Any:
    """The ASGI application over some models, which it stops at its end.

    Args:
        rules: what is let in; None: everything.
        tell: each gets every request that is over.

    Raises:
        MissingExtraError: starlette is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.requests import Request
        from starlette.responses import JSONResponse, Response
        from starlette.routing import Route
    except ImportError as error:
        raise MissingExtraError("The server", "serve") from error
    from slmops.serve import admin
    from slmops.serve.dialects.document import openapi
    from slmops.serve.dialects.ollama import Ollama
    from slmops.serve.dialects.openai import OpenAi
    from slmops.serve.metrics import Metrics
    from slmops.serve.page import page, part

    openai, ollama, metrics = OpenAi(pool), Ollama(pool), Metrics(pool, state)
    keyed = rules is not None and rules.keys is not None
    pool.left = records.left

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> Response:
        loaded = {model.settings.name: model.ready for model in pool}
        good = not state.draining and all(model.state != "failed" for model in pool)
        told: dict[str, Any] = {"ready": good, "draining": state.draining}
        if not keyed or records.current().key:
            told["models"] = loaded
        return JSONResponse(told, 200 if good else 503)

    async def measured(request: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def described(request: Request) -> Response:
        told = not keyed or records.current().key
        return JSONResponse(openapi(next(iter(pool.names if told else ()), "model")))

    async def missing(request: Request, failure: Exception) -> Response:
        status = int(getattr(failure, "status_code", 404))
        said = f"{request.method} is not for {request.url.path}" if status == 405 else f"there is no {request.url.path}"
        there = getattr(failure, "headers", None)  # which methods there are
        return JSONResponse(body_of(request.url.path, status, said, "unknown_url"), status, headers=there)

    async def broken(request: Request, failure: Exception) -> Response:
        return JSONResponse(body_of(request.url.path, 500, "the server failed"), 500)

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        yield
        await pool.stop()

    routes = [
        Route("/v1/chat/completions", openai.chat, methods=["POST"]),  # first: they are looked through in this order
        Route("/v1/completions", openai.completions, methods=["POST"]),
        *ollama.routes(),
        Route("/", page),
        Route("/chat/{name}", part),
        Route("/healthz", health),
        Route("/readyz", ready),
        Route("/metrics", measured),
        Route("/v1/models", openai.models),
        Route("/v1/models/{name:path}", openai.model),
        Route("/v1/embeddings", openai.embeddings, methods=["POST"]),
        Route("/v1/responses", openai.responses, methods=["POST"]),
        Route("/v1/responses/{id}", openai.response, methods=["GET", "DELETE"]),
        Route("/v1/responses/{id}/input_items", openai.response_input),
        Route("/openapi.json", described),
    ]
    if rules is None or rules.admin:
        routes += admin.routes(
            pool, (lambda request: True) if keyed else admin.local
        )  # a key's scope was seen at the gate
    handlers: Any = {404: missing, 405: missing, 500: broken}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    return Gate(app, state, rules, [metrics.tell, *tell])


@dataclass(frozen=True)
class Trial:
    """A candidate from the start on; see `slmops.serve.versions.Candidate`."""

    name: str
    folder: Path
    share: float
    shadow: float


def serve(
    wanted: Sequence[Settings], host: str, port: int, say: Callable[[str], None], memory: int | None = None,
    trials: Sequence[Trial] = (), definitions: Path | None = None, rules: Rules | None = None,
    tell: Sequence[Callable[[Record], None]] = (), certificate: Certificate | None = None,
) -> None:  # fmt: skip
    """Load the models, answer until SIGTERM or SIGINT, finish what was begun.

    Args:
        memory: bytes that all models may take together; see `Pool`.
        trials: candidates.
        say: gets the lines that people read; never raises.
        definitions: the folder of definitions; None: that of the user.
        rules, tell: see `application`.
        certificate: speaks TLS with it.

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
    pool = Pool(wanted, budget=memory)
    pool.definitions = Definitions(definitions or own_folder())
    app = application(pool, state, rules, tell)
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", access_log=False, timeout_keep_alive=75,
        http=protocol(most=room()), ws="none",
        server_header=False, ssl_context_factory=(lambda config, default: certificate.context) if certificate else None,
    )  # fmt: skip

    class Server(uvicorn.Server):  # type: ignore[misc]
        """Drains before it ends."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            if state.draining:  # asked twice
                self.should_exit = self.force_exit = True
                return
            state.draining = True
            asyncio.get_running_loop().create_task(self._drain())
            say(f"ending when {state.open} answers are finished; once more to end at once")

        async def _drain(self) -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_S):
                    while state.open:
                        await asyncio.sleep(0.02)
            self.should_exit = True

    async def main() -> None:
        server = Server(config)
        socket = _bound(config)
        renewing: asyncio.Task[None] | None = None
        try:
            await pool.start()
            for trial in trials:
                other = replace(pool.slots[trial.name].current.settings, folder=trial.folder)
                await versions.try_out(pool, trial.name, other, trial.share, trial.shadow)
            settle()
            address = f"http{'s' if certificate else ''}://{host if ':' not in host else f'[{host}]'}:{socket.getsockname()[1]}"
            for model in pool:
                s = model.settings
                say(f"{s.name}: {s.rows} answers at a time, {_loaded(model)}")
                if model.adapters:
                    say(f"{s.name}: adapters {', '.join(f'{s.name}{JOIN}{name}' for name in model.adapters)}")
            say(f"serving {address}/v1, chat at {address}/")
            loop = asyncio.get_running_loop()
            for sign in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(sign, server.handle_exit, sign, None)
            if certificate is not None:
                renewing = asyncio.create_task(certificate.follow(say))
            with contextlib.suppress(asyncio.CancelledError):
                await server._serve([socket])
        finally:
            if renewing is not None:
                renewing.cancel()
            socket.close()
            await pool.stop()

    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:  # uvloop where it is installed
        runner.run(main())


def settle() -> None:
    """Nothing that is there by now is looked through for garbage again, which takes longer than an answer's tokens.

    The rest is looked through often, since what waits for it makes the process larger for good.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(2_000, 10, 5)


def _loaded(model: Model) -> str:
    """What a model is at, for people."""
    if not model.ready:
        return f"{model.engine}, loaded when it is asked"
    threads = f"{model.threads} thread{'s' if model.threads > 1 else ''}"
    return f"{model.context_length} tokens each, {model.engine} with {threads}"


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

"""Ollama's API: answers and embeddings. Models and definitions are in `ollama_models`.

What Ollama knows and this server does not serve is an error that names it, in Ollama's shape; so is a prompt that is too long, which Ollama
would cut. Answers come as lines of JSON unless `stream` is false.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import slmops
from slmops.errors import SlmopsError
from slmops.serve.dialects.ollama_calls import Calls
from slmops.serve.dialects.ollama_models import Shelf
from slmops.serve.dialects.ollama_options import Options, options_of
from slmops.serve.dialects.ollama_shapes import (
    Asked,
    Chat,
    Clock,
    Embed,
    Embedding,
    Generate,
    likely,
    line,
    of,
    parsed,
    seconds_of,
    stamp,
)  # fmt: skip
from slmops.serve.dialects.ollama_shapes import (
    said as told_of,
)
from slmops.serve.dialects.openai.embeddings import MOST_INPUTS
from slmops.serve.dialects.openai.types import GONE
from slmops.serve.events import Events
from slmops.serve.leaving import unless_gone
from slmops.serve.model import Ask, Model, Piece
from slmops.serve.pool import Found, Pool
from slmops.serve.prompts import ids_of, plain, written
from slmops.serve.record import current, within
from slmops.serve.refusals import ScopeError
from slmops.serve.saying import Saying, saying
from slmops.serve.scheduler import RequestError
from slmops.serve.tools import turns

LINES = "application/x-ndjson"
Handler = Callable[[Request], Coroutine[Any, Any, Response]]
Part = Callable[[str], dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """An answer to give: who, to what, how, what it may say, and what a piece of it looks like. `context`: whether its tokens are told
    at the end."""

    found: Found
    prompt: list[int]
    options: Options
    said: Saying
    part: Part
    context: bool = False


class Ollama:
    """The routes over the models of a server."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._shelf = Shelf(pool)

    def routes(self) -> list[Route]:
        """All that begin with `/api/`."""
        shelf = self._shelf
        posts = {
            "generate": self.generate, "chat": self.chat, "embed": self.embed, "embeddings": self.embeddings, "show": shelf.show,
            "create": shelf.create, "copy": shelf.copy, "pull": shelf.pull, "push": shelf.push,
        }  # fmt: skip
        gets = {"tags": shelf.tags, "ps": shelf.ps, "version": self.version}
        return [
            *(Route(f"/api/{name}", guarded(do), methods=["POST"]) for name, do in posts.items()),
            *(Route(f"/api/{name}", guarded(do), methods=["GET"]) for name, do in gets.items()),
            Route("/api/delete", guarded(shelf.delete), methods=["DELETE"]),
            Route("/api/blobs/{digest}", guarded(shelf.blob), methods=["HEAD", "POST"]),
        ]

    async def version(self, request: Request) -> Response:
        """`/api/version`: that of slmops."""
        return JSONResponse({"version": slmops.__version__})

    async def generate(self, request: Request) -> Response:
        """`/api/generate`."""
        clock = Clock()
        wanted = await parsed(request, Generate)
        found = await self._shelf.choose(wanted.wanted)
        may_keep(found.model, wanted.keep_alive)
        wanted.check()

        def part(text: str) -> dict[str, Any]:
            return {"model": wanted.wanted, "created_at": stamp(), "response": text}

        if not wanted.prompt:
            return await self._load(found, wanted, clock, part)
        options = self._options(found, wanted.options)
        said = saying(found.model.tokenizer, (), wanted.schema_of)
        prompt = await self._prompt(found, wanted)
        return await self._answer(request, wanted, Job(found, prompt, options, said, part, not wanted.raw), clock)

    async def chat(self, request: Request) -> Response:
        """`/api/chat`."""
        clock = Clock()
        wanted = await parsed(request, Chat)
        found = await self._shelf.choose(wanted.wanted)
        may_keep(found.model, wanted.keep_alive)
        wanted.check()

        def part(text: str) -> dict[str, Any]:
            message = {"role": "assistant", "content": text}
            return {"model": wanted.wanted, "created_at": stamp(), "message": message}

        if not wanted.messages:
            return await self._load(found, wanted, clock, part)
        options = self._options(found, wanted.options)
        said = saying(found.model.tokenizer, [one.tool() for one in wanted.tools], wanted.schema_of)
        prompt = await written(found, turns([turn.plain() for turn in wanted.messages]), said.tools)
        return await self._answer(request, wanted, Job(found, prompt, options, said, part), clock)

    async def embed(self, request: Request) -> Response:
        """`/api/embed`: vectors of length one."""
        clock = Clock()
        wanted = await parsed(request, Embed)
        found = await self._shelf.choose(wanted.wanted)
        may_keep(found.model, wanted.keep_alive)
        self._options(found, wanted.options)
        texts = [wanted.input] if isinstance(wanted.input, str) else wanted.input
        texts = [] if texts == [""] else texts
        if len(texts) > MOST_INPUTS:
            raise RequestError(f"at most {MOST_INPUTS} inputs are taken at once", "send them in several requests")
        made = await unless_gone(request.receive, self._vectors(found.model, texts, clock, cut=bool(wanted.truncate)))
        if made is None:
            return Response(status_code=GONE)
        vectors, tokens = made
        size = wanted.dimensions
        vectors = [_unit(vector[:size] if size else vector) for vector in vectors]
        keep(found.model, wanted.keep_alive)
        return JSONResponse(
            {
                "model": wanted.wanted, "embeddings": vectors, "total_duration": time.perf_counter_ns() - clock.began,
                "load_duration": clock.loading, "prompt_eval_count": tokens,
            }
        )  # fmt: skip

    async def embeddings(self, request: Request) -> Response:
        """`/api/embeddings`: one vector, as the model gives it."""
        wanted = await parsed(request, Embedding)
        found = await self._shelf.choose(wanted.wanted)
        may_keep(found.model, wanted.keep_alive)
        self._options(found, wanted.options)
        texts = [wanted.prompt] if wanted.prompt else []
        made = await unless_gone(request.receive, self._vectors(found.model, texts, Clock(), cut=False))
        if made is None:
            return Response(status_code=GONE)
        keep(found.model, wanted.keep_alive)
        return JSONResponse({"embedding": made[0][0] if texts else []})

    async def _vectors(
        self, model: Model, texts: Sequence[str], clock: Clock, cut: bool
    ) -> tuple[list[list[float]], int]:
        await _loaded(model, clock)
        prompts = await ids_of(texts, lambda: [model.tokenizer.ids(text) for text in texts])
        for place, prompt in enumerate(prompts):
            if len(prompt) > model.context_length:
                if not cut:
                    raise RequestError(
                        f"the input {place} has {len(prompt)} tokens, but the model holds {model.context_length}",
                        "shorten it, or ask for truncate: true",
                    )
                prompts[place] = prompt[: model.context_length]
        return (await model.embed(prompts) if prompts else []), sum(map(len, prompts))

    def _options(self, found: Found, given: Mapping[str, Any]) -> Options:
        return options_of(found.definition.parameters if found.definition else {}, given)

    async def _prompt(self, found: Found, wanted: Generate) -> list[int]:
        """Of `/api/generate`: the words as they are, or as one turn after what `context` holds."""
        model, definition = found.model, found.definition
        if wanted.raw:
            return await ids_of(wanted.prompt, lambda: plain(model, wanted.prompt))
        talk: list[dict[str, Any]] = [{"role": "user", "content": wanted.prompt}]
        if wanted.system:
            talk.insert(0, {"role": "system", "content": wanted.system})
        if wanted.context is None:
            return await written(found, talk, template=wanted.template)
        if definition and definition.system and not wanted.system:
            talk.insert(0, {"role": "system", "content": definition.system})
        template = wanted.template or (definition.template if definition else "")
        fresh = await written(Found(model), talk, template=template)
        begin = model.tokenizer.marks.get("bos_token")
        if wanted.context and begin is not None and fresh[:1] == [model.tokenizer.id_of(begin)]:
            fresh = fresh[1:]
        return [*wanted.context, *fresh]

    async def _load(self, found: Found, wanted: Asked, clock: Clock, part: Part) -> Response:
        """A request without words loads its model, or lets go of it where it is to be kept for no time."""
        reason = "load"
        if wanted.keep_alive is not None and seconds_of(wanted.keep_alive) == 0:
            reason = "unload"
        else:
            await _loaded(found.model, clock)
        keep(found.model, wanted.keep_alive)
        return JSONResponse({**part(""), "done": True, "done_reason": reason})

    async def _answer(self, request: Request, wanted: Asked, job: Job, clock: Clock) -> Response:
        model = job.found.model
        most, how = job.options.most(job.prompt), job.options.picking(wanted.told)
        ask = Ask(job.prompt, most, how, job.options.stop, whole=not wanted.stream)
        thought(model, wanted.think, wanted.wanted)
        await _loaded(model, clock)
        clock.asked = time.perf_counter_ns()
        pieces = model.answer(job.said.ask(ask))
        lines = self._lines(pieces, wanted, job, clock)
        try:  # the first piece tells whether the model takes the request at all
            first = await unless_gone(request.receive, anext(lines))
        except SlmopsError:
            await lines.aclose()
            raise
        if first is None:
            await lines.aclose()
            return Response(status_code=GONE)
        if wanted.stream:
            return Events(_told(first, lines), job.found.headers, LINES)
        parts = [first]

        async def rest() -> bool:
            async for part in lines:
                parts.append(part)
            return True

        try:
            if await unless_gone(request.receive, rest()) is None:
                return Response(status_code=GONE)
        finally:
            await lines.aclose()
        return JSONResponse(_joined(parts), headers=job.found.headers)

    async def _lines(
        self, pieces: AsyncGenerator[Piece, None], wanted: Asked, job: Job, clock: Clock
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The lines of an answer: one for each piece that says something, then what it took."""
        model, calls = job.found.model, Calls(job.said)
        tokens: list[int] = []
        finish = "stop"

        def line_of(text: str, made: list[dict[str, Any]]) -> dict[str, Any]:
            line = {**job.part(text), "done": False}
            if made:
                line["message"] = {**line["message"], "tool_calls": made}
            return line

        try:
            async for piece in pieces:
                clock.token()
                tokens.append(piece.token)
                finish = piece.finish or finish
                text, made = calls.add(piece.text)
                if text or made or piece.logprob is not None or len(tokens) == 1:
                    part = line_of(text, made)
                    if piece.logprob is not None:
                        part["logprobs"] = likely([piece], model.tokenizer.token)
                    yield part
            text, made = calls.rest()
            if text or made:
                yield line_of(text, made)
            last = {**job.part(""), "done": True, "done_reason": finish}
            if job.context:
                last["context"] = [*job.prompt, *tokens]
            yield {**last, **clock.told(len(job.prompt), len(tokens))}
        finally:
            await pieces.aclose()
            keep(model, wanted.keep_alive)


def guarded(do: Handler) -> Handler:
    """A handler whose errors are told in Ollama's shape."""

    @wraps(do)
    async def handler(request: Request) -> Response:
        try:
            return await do(request)
        except SlmopsError as failure:
            return of(failure)

    return handler


def thought(model: Model, think: bool | str | None, name: str) -> None:
    """The one place for `think`: answers come as the model writes them.

    Raises:
        RequestError: thinking was asked for, or to be left out by a model that may think.
    """
    if think or think == "":
        raise RequestError(f'"{name}" does not support thinking', "leave think out")
    if think is False and "think" in model.tokenizer.template:
        raise RequestError("whether the model thinks cannot be chosen", "leave think out")


def may_keep(model: Model, keep_alive: float | str | None) -> None:
    """Refuse a `keep_alive` that is the keeper's to give: to unload a model at once, or to hold it for longer than it is served to stay.

    Raises:
        RequestError: it is no time.
        ScopeError: the key has not the scope.
    """
    seconds, idle = seconds_of(keep_alive), model.settings.idle
    if keep_alive is None or current().keeper:
        return
    longer = idle is not None and (seconds is None or seconds > idle)
    if seconds == 0 or longer:
        most = "" if idle is None else f" up to {idle:g} s"
        said = "to unload a model at once" if seconds == 0 else f"a keep_alive of more than {idle:g} s"
        raise ScopeError(f"{said} needs a key with the scope admin", f"leave keep_alive out, or give a time{most}")


def keep(model: Model, keep_alive: float | str | None) -> None:
    """The one place where `keep_alive` is followed, until the next request. Without it a model stays as long as it is served to."""
    model.keep(model.settings.idle if keep_alive is None else seconds_of(keep_alive))


async def _loaded(model: Model, clock: Clock) -> None:
    begin = time.perf_counter_ns()
    await within(model.start())
    clock.loading = time.perf_counter_ns() - begin


async def _told(first: dict[str, Any], lines: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[str, None]:
    """A stream."""
    try:
        yield line(first)
        async for part in lines:
            yield line(part)
    except SlmopsError as failure:
        yield line({"error": told_of(failure)})
    finally:
        await lines.aclose()


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The lines of an answer as one."""
    whole = dict(parts[-1])
    if "message" in whole:
        text = "".join(part["message"]["content"] for part in parts)
        whole["message"] = {**whole["message"], "content": text}
        calls = [call for part in parts for call in part["message"].get("tool_calls", ())]
        if calls:
            whole["message"]["tool_calls"] = calls
    else:
        whole["response"] = "".join(part["response"] for part in parts)
    told = [row for part in parts for row in part.get("logprobs", ())]
    return {**whole, "logprobs": told} if told else whole


def _unit(vector: Sequence[float]) -> list[float]:
    length = math.sqrt(sum(value * value for value in vector))
    return [value / length for value in vector] if length else list(vector)

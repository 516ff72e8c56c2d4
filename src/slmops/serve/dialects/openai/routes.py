"""The routes of OpenAI's API over the models of a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from slmops.errors import SlmopsError
from slmops.serve.dialects.adopt import adopted, bounded, stops_of
from slmops.serve.dialects.openai import embeddings
from slmops.serve.dialects.openai.answers import Answer, Shape, events, together, usage_of
from slmops.serve.dialects.openai.chat import ChatShape
from slmops.serve.dialects.openai.errors import error, of
from slmops.serve.dialects.openai.response_types import Respond
from slmops.serve.dialects.openai.responses import Kept, ResponseShape
from slmops.serve.dialects.openai.responses import events as response_events
from slmops.serve.dialects.openai.text import TextShape
from slmops.serve.dialects.openai.types import GONE, MOST_ANSWERS, Chat, Common, Completion, Embedding, Wanted, parsed
from slmops.serve.events import Events
from slmops.serve.leaving import WhileThere, unless_gone
from slmops.serve.model import Ask, Model, Piece
from slmops.serve.pool import Found, Pool
from slmops.serve.prompts import SHORT, written
from slmops.serve.refusals import DeadlineError
from slmops.serve.saying import Saying, saying

Named = TypeVar("Named", bound=Common | Embedding)


class OpenAi:
    """The routes over the models of a server."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._kept = Kept()

    async def models(self, request: Request) -> Response:
        """`/v1/models`."""
        models = [model for name in self._pool.names if (model := self._pool.find(name))]
        found = [self._card(one) for one in (*map(Found, models), *self._pool.defined())]
        return JSONResponse({"object": "list", "data": found})

    async def model(self, request: Request) -> Response:
        """`/v1/models/NAME`."""
        found = self._pool.resolve(request.path_params["name"])
        return JSONResponse(self._card(found)) if found else self._unknown(request.path_params["name"])

    def _card(self, found: Found) -> dict[str, Any]:
        created = int(found.definition.modified) if found.definition else found.model.created
        return {"id": found.name, "object": "model", "created": created, "owned_by": "slmops"}

    def _unknown(self, name: str) -> Response:
        known = ", ".join(self._pool.names)
        return error(404, f"there is no model {name}; there are: {known}", param="model", code="model_not_found")

    async def _asked(self, request: Request, kind: type[Named]) -> tuple[Named, Found] | Response:
        """The body of a request, and what answers it; or why not."""
        wanted = await parsed(request, kind)
        if isinstance(wanted, Response):
            return wanted
        found = await self._pool.choose(wanted.model, wanted.user)
        return (wanted, found) if found else self._unknown(wanted.model)

    async def chat(self, request: Request) -> Response:
        """`/v1/chat/completions`."""
        asked = await self._asked(request, Chat)
        if isinstance(asked, Response):
            return asked
        wanted, found = asked
        model, definition = found.model, found.definition
        choice = wanted.choosing()
        schema = wanted.response_format.schema_of if wanted.response_format else None
        may = [tool.name for tool in choice.open]
        try:
            said = saying(model.tokenizer, choice.tools, schema, may=may, must=choice.must, many=choice.many)
        except SlmopsError as failure:
            return of(failure, "tools", "tools" if choice.tools else "response_format")
        try:
            wanted = adopted(wanted, definition)
            prompt = await written(found, wanted.turns(), said.tools)
            most = bounded(wanted.max_completion_tokens or wanted.max_tokens, [prompt], definition)
        except DeadlineError as failure:
            return of(failure, "messages")
        except SlmopsError as failure:
            return error(400, failure.message, param="messages")
        logprobs = wanted.top_logprobs if wanted.logprobs else None
        shape = ChatShape(found.name, model, said)
        return await self._answer(request, wanted, found, [prompt], most, logprobs, shape, said)

    async def completions(self, request: Request) -> Response:
        """`/v1/completions`."""
        asked = await self._asked(request, Completion)
        if isinstance(asked, Response):
            return asked
        wanted, found = asked
        model, definition = found.model, found.definition
        if _count(wanted.prompt) * wanted.n > MOST_ANSWERS:
            return error(400, f"at most {MOST_ANSWERS} answers are given to one request", param="prompt")
        prompts = await _prompts(wanted.prompt, model, "prompt")
        if isinstance(prompts, Response):
            return prompts
        try:
            wanted = adopted(wanted, definition)
            most = bounded(wanted.max_tokens, prompts, definition)
        except SlmopsError as failure:
            return of(failure, "prompt")
        shape = TextShape(found.name, model)
        return await self._answer(request, wanted, found, prompts, most, wanted.logprobs, shape, Saying())

    async def _answer(
        self, request: Request, wanted: Wanted, found: Found, prompts: list[list[int]], most: int | None, logprobs: int | None,
        shape: Shape, said: Saying,
    ) -> Response:  # fmt: skip
        model = found.model
        if refused := _odd_bias(wanted, model):
            return refused
        asked = [(prompt, number) for prompt in prompts for number in range(wanted.n)]
        asks = [
            Ask(prompt, most, wanted.picking(number, logprobs), wanted.stops, joined=True, whole=not wanted.stream)
            for prompt, number in asked
        ]
        pieces = together([model.answer(said.ask(ask)) for ask in asks])
        lengths = sum(map(len, prompts))
        if wanted.stream:
            first = await _begun(request, pieces, shape.prompt, shape.grammar)
            if isinstance(first, Response):
                return first
            usage = wanted.stream_options is not None and wanted.stream_options.include_usage
            return Events(events(first, pieces, shape, lengths, usage, len(asked)), found.headers)
        answers = await _all(request, pieces, len(asked), shape.prompt, shape.grammar)
        if isinstance(answers, Response):
            return answers
        return JSONResponse(shape.whole(answers, usage_of(lengths, answers)), headers=found.headers)

    async def embeddings(self, request: Request) -> Response:
        """`/v1/embeddings`."""
        asked = await self._asked(request, Embedding)
        if isinstance(asked, Response):
            return asked
        wanted, found = asked
        model = found.model
        if _count(wanted.input) > embeddings.MOST_INPUTS:
            return error(400, f"at most {embeddings.MOST_INPUTS} inputs are taken at once", param="input")
        prompts = await _prompts(wanted.input, model, "input")
        if isinstance(prompts, Response):
            return prompts
        try:
            vectors = await unless_gone(request.receive, model.embed(prompts))
            if vectors is None:
                return Response(status_code=GONE)
        except SlmopsError as failure:
            return of(failure, "input")
        try:
            return JSONResponse(embeddings.told(wanted, vectors, sum(map(len, prompts))))
        except SlmopsError as failure:
            return of(failure, "dimensions")

    async def responses(self, request: Request) -> Response:
        """`/v1/responses`."""
        asked = await self._asked(request, Respond)
        if isinstance(asked, Response):
            return asked
        wanted, found = asked
        model, definition = found.model, found.definition
        before: list[dict[str, Any]] = []
        if wanted.previous_response_id is not None:
            earlier = self._kept.turns(wanted.previous_response_id)
            if earlier is None:
                return _no_response(wanted.previous_response_id, "previous_response_id")
            before = earlier
        choice = wanted.choosing()
        may = [tool.name for tool in choice.open]
        try:
            schema = wanted.schema_of
            said = saying(model.tokenizer, choice.tools, schema, may=may, must=choice.must, many=choice.many)
        except SlmopsError as failure:
            return of(failure, "tools", "tools" if choice.tools else "text")
        try:
            wanted = adopted(wanted, definition)
            turns = before + wanted.turns()
            first_turn = [{"role": "system", "content": wanted.instructions}] if wanted.instructions else []
            prompt = await written(found, first_turn + turns, said.tools)
            most = bounded(wanted.max_output_tokens, [prompt], definition)
        except DeadlineError as failure:
            return of(failure, "input")
        except SlmopsError as failure:
            return error(400, failure.message, param="input")
        if refused := _odd_bias(wanted, model):
            return refused
        shape = ResponseShape(wanted, model, said, len(prompt))
        logprobs = wanted.top_logprobs if wanted.tells_logprobs else None
        how, stops = wanted.picking(0, logprobs), stops_of(definition)
        ask = said.ask(Ask(prompt, most, how, stops, joined=True, whole=not wanted.stream))
        pieces = together([model.answer(ask)])

        def keep(response: dict[str, Any]) -> None:
            if wanted.store:
                self._kept.keep(response, turns, wanted.items(), shape.turn())

        if wanted.stream:
            first = await _begun(request, pieces, "input", shape.grammar)
            if isinstance(first, Response):
                return first
            return Events(response_events(first, pieces, shape, keep), found.headers)
        answers = await _all(request, pieces, 1, "input", shape.grammar)
        if isinstance(answers, Response):
            return answers
        whole = shape.whole(answers[0])
        keep(whole)
        return JSONResponse(whole, headers=found.headers)

    async def response(self, request: Request) -> Response:
        """`/v1/responses/ID`: what was kept of one, or forget it."""
        id = request.path_params["id"]
        found = self._kept.response(id)
        if found is None:
            return _no_response(id)
        if request.method == "DELETE":
            self._kept.forget(id)
            return JSONResponse({"id": id, "object": "response", "deleted": True})
        if request.query_params:
            name = next(iter(request.query_params))
            return error(400, f"{name} is not supported", param=name, code="unsupported_parameter")
        return JSONResponse(found)

    async def response_input(self, request: Request) -> Response:
        """`/v1/responses/ID/input_items`."""
        found = self._kept.input(request.path_params["id"])
        if found is None:
            return _no_response(request.path_params["id"])
        ends = [found[0]["id"], found[-1]["id"]] if found else [None, None]
        return JSONResponse(
            {"object": "list", "data": found, "first_id": ends[0], "last_id": ends[1], "has_more": False}
        )


def _no_response(id: str, param: str | None = None) -> Response:
    return error(404, f"there is no response {id} (any more)", param=param, code="response_not_found")


def _odd_bias(wanted: Common, model: Model) -> Response | None:
    if wanted.logit_bias:
        size = model.tokenizer.size
        if not all(0 <= id < size for id in wanted.logit_bias):
            return error(400, f"a token id is not below {size}", param="logit_bias")
    return None


async def _begun(
    request: Request, pieces: AsyncGenerator[tuple[int, Piece], None], prompt: str, grammar: str
) -> tuple[int, Piece] | Response:
    """The first piece, which tells whether the model takes the request at all."""
    try:
        first = await unless_gone(request.receive, anext(pieces))
    except SlmopsError as failure:
        await pieces.aclose()
        return of(failure, prompt, grammar)
    if first is None:
        await pieces.aclose()
        return Response(status_code=GONE)
    return first


async def _all(
    request: Request, pieces: AsyncGenerator[tuple[int, Piece], None], count: int, prompt: str, grammar: str
) -> list[Answer] | Response:
    """All answers, when they are whole."""
    answers = [Answer(index) for index in range(count)]
    try:
        with WhileThere(request.receive) as client:
            async for index, piece in pieces:
                answers[index].pieces.append(piece)
        if client.gone:
            return Response(status_code=GONE)
    except SlmopsError as failure:
        return of(failure, prompt, grammar)
    finally:
        await pieces.aclose()
    return answers


def _count(given: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]) -> int:
    """How many prompts these are, before any is cut into tokens."""
    return 1 if isinstance(given, str) or (given and isinstance(given[0], int)) else len(given)


async def _prompts(
    given: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]], model: Model, param: str
) -> list[list[int]] | Response:
    """Token ids of texts, or those that came, if the tokenizer has them."""
    short = isinstance(given, str) and len(given) < SHORT
    prompts = _ids(given, model) if short else await asyncio.to_thread(_ids, given, model)
    if not prompts or not all(prompts):
        return error(400, f"the {param} is empty", param=param)
    if max(map(max, prompts)) >= model.tokenizer.size or min(map(min, prompts)) < 0:
        return error(400, f"a token id is not below {model.tokenizer.size}", param=param)
    return prompts


def _ids(given: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]], model: Model) -> list[list[int]]:
    if isinstance(given, str):
        return [model.tokenizer.ids(given)]
    if given and isinstance(given[0], int):
        return [[int(id) for id in given if isinstance(id, int)]]
    return [
        model.tokenizer.ids(one) if isinstance(one, str) else [one] if isinstance(one, int) else list(one)
        for one in given
    ]

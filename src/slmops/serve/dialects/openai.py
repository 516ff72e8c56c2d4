"""OpenAI's API: `/v1/models`, `/v1/chat/completions`, `/v1/completions`.

A field that is not known, or known and not served, is an error that names it: an answer that ignores what was asked for would be
wrong without anyone noticing.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from slmops.errors import ResourceError, SlmopsError
from slmops.serve.model import Ask, Model, Piece
from slmops.serve.pool import Pool
from slmops.serve.sampling import Picking
from slmops.serve.scheduler import RequestError

PATIENCE_S = 1
UNIONS = ("str", "list[str]", "list[int]", "list[list[int]]", "list[Part]", "constrained-str")
"""Parts of the place of an error that stand for one of several types."""
MOST_ANSWERS = 16
Share = Annotated[float, Field(ge=0, le=1)]
Kind = TypeVar("Kind", bound=BaseModel)
Done = TypeVar("Done")


class Body(BaseModel):
    """An object of a request: no other fields than these, and null is as good as absent, as in OpenAI's own."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class Wanted(Body):
    """What both kinds of request have."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Share = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] = 1
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None

    def picking(self, number: int, logprobs: int | None) -> Picking:
        """How the answer of this number is picked."""
        return Picking(
            self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, self.frequency_penalty,
            self.presence_penalty, self.logit_bias or {}, None if self.seed is None else (self.seed + number) & (2**63 - 1), logprobs,
        )  # fmt: skip

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class StreamOptions(Body):
    """Of a stream."""

    include_usage: bool = False


class Part(Body):
    """A part of a message's content. Only text is read."""

    type: Literal["text"]
    text: str


class Turn(Body):
    """A message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """For the chat template."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class Chat(Wanted):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0


class Completion(Wanted):
    """`/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: Literal[1] | None = None


Wanted.model_rebuild()


@dataclass
class Answer:
    """One choice as it grows."""

    index: int
    pieces: list[Piece] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def finish(self) -> str | None:
        """Why it ended."""
        return self.pieces[-1].finish if self.pieces else None


def error(
    status: int, message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> Response:
    """An error in OpenAI's shape."""
    headers = {"Retry-After": str(PATIENCE_S)} if status in (429, 503) else None
    return JSONResponse(
        {"error": {"message": message, "type": kind, "param": param, "code": code}}, status, headers=headers
    )


def of(failure: SlmopsError, param: str) -> Response:
    """An error of slmops in OpenAI's shape. `param`: the field that holds the prompt."""
    said = f"{failure.message} ({failure.hint})" if failure.hint else failure.message
    if isinstance(failure, ResourceError):
        return error(503, said, "server_error", code="overloaded")
    if isinstance(failure, RequestError):
        return error(400, said, param=param, code="context_length_exceeded" if "context" in failure.message else None)
    return error(500, said, "server_error")


class OpenAi:
    """The routes over the models of a server."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def models(self, request: Request) -> Response:
        """`/v1/models`."""
        found = [self._card(model) for model in self._pool]
        return JSONResponse({"object": "list", "data": found})

    async def model(self, request: Request) -> Response:
        """`/v1/models/NAME`."""
        model = self._pool.find(request.path_params["name"])
        return JSONResponse(self._card(model)) if model else self._unknown(request.path_params["name"])

    def _card(self, model: Model) -> dict[str, Any]:
        return {"id": model.settings.name, "object": "model", "created": model.created, "owned_by": "slmops"}

    def _unknown(self, name: str) -> Response:
        known = ", ".join(self._pool.names)
        return error(404, f"there is no model {name}; there are: {known}", param="model", code="model_not_found")

    async def chat(self, request: Request) -> Response:
        """`/v1/chat/completions`."""
        wanted = await _parsed(request, Chat)
        if isinstance(wanted, Response):
            return wanted
        model = self._pool.find(wanted.model)
        if model is None:
            return self._unknown(wanted.model)
        try:
            prompt = await asyncio.to_thread(model.encode, [turn.plain() for turn in wanted.messages])
        except SlmopsError as failure:
            return error(400, failure.message, param="messages")
        most = wanted.max_completion_tokens or wanted.max_tokens
        logprobs = wanted.top_logprobs if wanted.logprobs else None
        return await self._answer(request, wanted, model, [prompt], most, logprobs, ChatShape(wanted, model))

    async def completions(self, request: Request) -> Response:
        """`/v1/completions`."""
        wanted = await _parsed(request, Completion)
        if isinstance(wanted, Response):
            return wanted
        model = self._pool.find(wanted.model)
        if model is None:
            return self._unknown(wanted.model)
        prompts = await asyncio.to_thread(_prompts, wanted.prompt, model)
        if not prompts or not all(prompts):
            return error(400, "the prompt is empty", param="prompt")
        if max(map(max, prompts)) >= model.tokenizer.size or min(map(min, prompts)) < 0:
            return error(400, f"a token id is not below {model.tokenizer.size}", param="prompt")
        if len(prompts) * wanted.n > MOST_ANSWERS:
            return error(400, f"at most {MOST_ANSWERS} answers are given to one request", param="prompt")
        shape = TextShape(wanted, model)
        return await self._answer(request, wanted, model, prompts, wanted.max_tokens, wanted.logprobs, shape)

    async def _answer(
        self, request: Request, wanted: Wanted, model: Model, prompts: list[list[int]], most: int | None, logprobs: int | None,
        shape: Shape,
    ) -> Response:  # fmt: skip
        if wanted.logit_bias and not all(0 <= id < model.tokenizer.size for id in wanted.logit_bias):
            return error(400, f"a token id is not below {model.tokenizer.size}", param="logit_bias")
        asked = [(prompt, number) for prompt in prompts for number in range(wanted.n)]
        asks = [Ask(prompt, most, wanted.picking(number, logprobs), wanted.stops) for prompt, number in asked]
        streams = [model.answer(ask) for ask in asks]
        pieces = _together(streams)
        lengths = sum(map(len, prompts))
        try:  # the first piece tells whether the model takes the request at all
            first = await _unless_gone(request, anext(pieces))
        except SlmopsError as failure:
            await pieces.aclose()
            return of(failure, shape.prompt)
        if first is None:
            await pieces.aclose()
            return Response(status_code=499)
        if wanted.stream:
            usage = wanted.stream_options is not None and wanted.stream_options.include_usage
            return StreamingResponse(
                _events(first, pieces, shape, lengths, usage, len(asked)), media_type="text/event-stream"
            )
        answers = [Answer(index) for index in range(len(asked))]
        answers[first[0]].pieces.append(first[1])

        async def rest() -> bool:
            async for index, piece in pieces:
                answers[index].pieces.append(piece)
            return True

        try:
            if await _unless_gone(request, rest()) is None:
                return Response(status_code=499)
        except SlmopsError as failure:
            return of(failure, shape.prompt)
        finally:
            await pieces.aclose()
        return JSONResponse(shape.whole(answers, usage_of(lengths, answers)))


def usage_of(prompt: int, answers: Sequence[Answer]) -> dict[str, Any]:
    """Tokens read and written."""
    written = sum(len(answer.pieces) for answer in answers)
    cached = sum(answer.pieces[0].cached for answer in answers if answer.pieces)
    return {
        "prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": min(cached, prompt)},
    }  # fmt: skip


class Shape:
    """What an answer looks like in one of the two routes."""

    prefix, whole_kind, part_kind, prompt = "", "", "", ""

    def __init__(self, wanted: Wanted, model: Model) -> None:
        self._model = model
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": wanted.model}

    def opening(self, index: int) -> dict[str, Any] | None:
        """What comes before the first piece of a stream."""
        return None

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        """A choice of a stream."""
        raise NotImplementedError

    def choice(self, answer: Answer) -> dict[str, Any]:
        """A whole choice."""
        raise NotImplementedError

    def whole(self, answers: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        """The response without a stream."""
        choices = [self.choice(answer) for answer in answers]
        return {**self._head, "object": self.whole_kind, "choices": choices, "usage": usage}

    def event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None, tell: bool) -> str:
        """An event of a stream. `tell`: whether usage is told at all."""
        body: dict[str, Any] = {**self._head, "object": self.part_kind, "choices": choices}
        if tell:
            body["usage"] = usage
        return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


class ChatShape(Shape):
    """`/v1/chat/completions`."""

    prefix, whole_kind, part_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    prompt = "messages"

    def opening(self, index: int) -> dict[str, Any] | None:
        """The role."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        """See `Shape`."""
        delta = {"content": piece.text} if piece.text else {}
        return {"index": index, "delta": delta, "logprobs": self._told([piece]), "finish_reason": piece.finish}

    def choice(self, answer: Answer) -> dict[str, Any]:
        """See `Shape`."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {
            "index": answer.index,
            "message": message,
            "logprobs": self._told(answer.pieces),
            "finish_reason": answer.finish,
        }

    def _told(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if not pieces or pieces[0].logprob is None:
            return None
        rows = []
        for piece in pieces:
            likely = [self._one(token, value) for token, value in piece.likely]
            rows.append({**self._one(piece.token, piece.logprob), "top_logprobs": likely})
        return {"content": rows, "refusal": None}

    def _one(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._model.tokenizer.token(token)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


class TextShape(Shape):
    """`/v1/completions`."""

    prefix, whole_kind, part_kind, prompt = "cmpl", "text_completion", "text_completion", "prompt"

    def __init__(self, wanted: Wanted, model: Model) -> None:
        super().__init__(wanted, model)
        self._places: Counter[int] = Counter()  # how much of each answer has been told in a stream

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        """See `Shape`."""
        told = self._told([piece], self._places[index])
        self._places[index] += len(piece.text)
        return {"index": index, "text": piece.text, "logprobs": told, "finish_reason": piece.finish}

    def choice(self, answer: Answer) -> dict[str, Any]:
        """See `Shape`."""
        told = self._told(answer.pieces)
        return {"index": answer.index, "text": answer.text, "logprobs": told, "finish_reason": answer.finish}

    def _told(self, pieces: Sequence[Piece], place: int = 0) -> dict[str, Any] | None:
        if not pieces or pieces[0].logprob is None:
            return None
        name = self._model.tokenizer.token
        offsets = []
        for piece in pieces:
            offsets.append(place)
            place += len(piece.text)
        return {
            "tokens": [name(piece.token) for piece in pieces],
            "token_logprobs": [piece.logprob for piece in pieces],
            "top_logprobs": [{name(token): value for token, value in piece.likely} for piece in pieces],
            "text_offset": offsets,
        }


async def _parsed(request: Request, kind: type[Kind]) -> Kind | Response:
    """The body of a request, or the error that says what is wrong with it."""
    raw = await request.body()
    try:
        return kind.model_validate_json(raw)
    except ValidationError as failure:
        first = failure.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"] if str(part) not in UNIONS) or None
        if first["type"] == "json_invalid":
            return error(400, f"the body is not JSON: {first['msg']}")
        if first["type"] == "extra_forbidden":
            return error(400, f"{param} is not supported", param=param, code="unsupported_parameter")
        return error(400, f"{param or 'the body'}: {first['msg']}", param=param)


def _prompts(given: str | list[str] | list[int] | list[list[int]], model: Model) -> list[list[int]]:
    if isinstance(given, str):
        return [model.tokenizer.ids(given)]
    if given and isinstance(given[0], int):
        return [[int(id) for id in given if isinstance(id, int)]]
    return [
        model.tokenizer.ids(one) if isinstance(one, str) else [one] if isinstance(one, int) else list(one)
        for one in given
    ]


async def _together(streams: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of several answers as they come, each with the number of its answer. All are left when this one is."""
    found: asyncio.Queue[tuple[int, Piece | None, Exception | None]] = asyncio.Queue()

    async def follow(index: int, stream: AsyncGenerator[Piece, None]) -> None:
        failure: Exception | None = None
        try:
            async for piece in stream:
                found.put_nowait((index, piece, None))
        except Exception as error:
            failure = error
        found.put_nowait((index, None, failure))

    tasks = [asyncio.create_task(follow(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            index, piece, failure = await found.get()
            if failure is not None:
                raise failure
            if piece is None:
                left -= 1
            else:
                yield index, piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def _events(
    first: tuple[int, Piece], pieces: AsyncGenerator[tuple[int, Piece], None], shape: Shape, prompt: int, usage: bool, count: int
) -> AsyncGenerator[str, None]:  # fmt: skip
    """Server-sent events."""
    answers = [Answer(index) for index in range(count)]
    try:
        for index in range(count):
            opening = shape.opening(index)
            if opening:
                yield shape.event([opening], None, usage)
        index, piece = first
        while True:
            answers[index].pieces.append(piece)
            if piece.text or piece.finish or piece.logprob is not None:
                yield shape.event([shape.part(index, piece)], None, usage)
            try:
                index, piece = await anext(pieces)
            except StopAsyncIteration:
                break
        if usage:
            yield shape.event([], usage_of(prompt, answers), True)
        yield "data: [DONE]\n\n"
    except SlmopsError as failure:
        said = json.loads(bytes(of(failure, shape.prompt).body))
        yield f"data: {json.dumps(said)}\n\n"
    finally:
        await pieces.aclose()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Done]) -> Done | None:
    """What comes of some work, None if the client goes away before."""

    async def gone() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.1)

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

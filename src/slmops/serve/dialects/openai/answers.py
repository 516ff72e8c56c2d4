"""Answers as they grow, whole or as streams of events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from slmops.errors import SlmopsError
from slmops.serve.dialects.openai.errors import of
from slmops.serve.events import Last
from slmops.serve.model import Model, Piece

_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


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


def usage_of(prompt: int, answers: Sequence[Answer]) -> dict[str, Any]:
    """Tokens read and written."""
    written = sum(piece.tokens for answer in answers for piece in answer.pieces)
    cached = sum(answer.pieces[0].cached for answer in answers if answer.pieces)
    return {
        "prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": min(cached, prompt)},
    }  # fmt: skip


class Shape:
    """What an answer looks like in one of the two routes.

    Attributes:
        prompt: the field that holds the prompt.
        grammar: the one that says what an answer shall look like.
    """

    prefix, whole_kind, part_kind, prompt, grammar = "", "", "", "", "response_format"

    def __init__(self, name: str, model: Model) -> None:
        self._model = model
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(16)}", "created": int(time.time()), "model": name}
        self._event_head = _json({**self._head, "object": self.part_kind})[:-1]

    def opening(self, index: int) -> dict[str, Any] | None:
        """What comes before the first piece of a stream."""
        return None

    def part(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """A choice of a stream; None: the piece says nothing yet."""
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
        told = f',"usage":{_json(usage)}' if tell else ""
        return f'data: {self._event_head},"choices":{_json(choices)}{told}}}\n\n'


async def events(
    first: tuple[int, Piece], pieces: AsyncGenerator[tuple[int, Piece], None], shape: Shape, prompt: int, usage: bool, count: int
) -> AsyncGenerator[str, None]:  # fmt: skip
    """Server-sent events, those together that nothing has to be waited for between."""
    answers, going = [Answer(index) for index in range(count)], count
    ready = ""
    try:
        for index in range(count):
            opening = shape.opening(index)
            if opening:
                ready += shape.event([opening], None, usage)
        index, piece = first
        while True:
            answers[index].pieces.append(piece)
            part = shape.part(index, piece)
            if part is not None:
                ready += shape.event([part], None, usage)
            going -= piece.finish is not None
            if ready and going:
                yield ready
                ready = ""
            try:
                index, piece = await anext(pieces)
            except StopAsyncIteration:
                break
        if usage:
            ready += shape.event([], usage_of(prompt, answers), True)
        yield Last(f"{ready}data: [DONE]\n\n")
    except SlmopsError as failure:
        said = json.loads(bytes(of(failure, shape.prompt, shape.grammar).body))
        yield Last(f"{ready}data: {json.dumps(said)}\n\n")
    finally:
        await pieces.aclose()


async def together(streams: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of several answers as they come, each with the number of its answer. All are left when this one is."""
    if len(streams) == 1:
        try:
            async for one in streams[0]:
                yield 0, one
        finally:
            await streams[0].aclose()
        return
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

"""What an answer of `/v1/responses` looks like, whole or as a stream of events, and what is kept of it.

Responses are kept in memory, the last ones up to `MOST_BYTES`, unless `store` is false: for `previous_response_id`, and to be
asked for again.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Any

from slmops.errors import SlmopsError
from slmops.serve.dialects.openai.answers import Answer, usage_of
from slmops.serve.dialects.openai.errors import of
from slmops.serve.dialects.openai.response_types import Respond
from slmops.serve.model import Model, Piece
from slmops.serve.record import current
from slmops.serve.saying import Saying
from slmops.serve.tools import Delta, turns

MOST_BYTES = 16 << 20
"""Of kept responses, as JSON."""
Event = dict[str, Any]


class Kept:
    """The last responses, each for the key alone that asked for it. They are kept as JSON, which takes a fraction of what it says."""

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._most, self._bytes = most, 0
        self._all: OrderedDict[tuple[str, str], bytes] = OrderedDict()

    def keep(self, response: dict[str, Any], before: Sequence[Event], input: Sequence[Event], answer: Event) -> None:
        """A response, the turns that led to it and the turn that it is; the oldest are forgotten for it."""
        row = json.dumps([response, turns([*before, answer]), list(input)], separators=(",", ":")).encode()
        self._all[_own(response["id"])] = row
        self._bytes += len(row)
        while self._bytes > self._most:
            self._bytes -= len(self._all.popitem(last=False)[1])

    def forget(self, id: str) -> None:
        """One that is there."""
        self._bytes -= len(self._all.pop(_own(id)))

    def response(self, id: str) -> dict[str, Any] | None:
        """As it was told."""
        found: dict[str, Any] | None = self._part(id, 0)
        return found

    def turns(self, id: str) -> list[dict[str, Any]] | None:
        """All that was said up to its end."""
        found: list[dict[str, Any]] | None = self._part(id, 1)
        return found

    def input(self, id: str) -> list[dict[str, Any]] | None:
        """What it was asked with."""
        found: list[dict[str, Any]] | None = self._part(id, 2)
        return found

    def _part(self, id: str, part: int) -> Any:
        row = self._all.get(_own(id))
        return None if row is None else json.loads(row)[part]


def _own(id: str) -> tuple[str, str]:
    return current().key, id


class ResponseShape:
    """A response as it grows: its items, and the events of a stream."""

    def __init__(self, wanted: Respond, model: Model, said: Saying, prompt: int) -> None:
        self._wanted, self._model, self._said, self._prompt = wanted, model, said, prompt
        self.grammar = "tools" if said.tools else "text"
        self._reader = said.reader()
        self._id, self._created = f"resp_{secrets.token_hex(24)}", int(time.time())
        self._items: list[dict[str, Any]] = []
        self._logprobs: list[dict[str, Any]] = []
        self._number = 0

    def add(self, piece: Piece) -> Iterator[Event]:
        """The events of a piece, after those of `opening`."""
        if piece.logprob is not None:
            self._logprobs.append(self._told(piece))
        if self._reader is None:
            found = [Delta(piece.text)] if piece.text else []
        else:
            found = self._reader.add(piece.text) + (self._reader.rest() if piece.finish else [])
        for one in found:
            if one.name:
                yield from self._close(True)
                yield from self._call(one.name)
            elif one.call is not None:
                yield from self._arguments(one.arguments)
            else:
                yield from self._text(one.text)
        if piece.finish:
            if not self._items:
                yield from self._text("")
            yield from self._close(piece.finish == "stop")

    def opening(self) -> Iterator[Event]:
        """What comes first."""
        yield self._event("response.created", response=self._response("in_progress", None))
        yield self._event("response.in_progress", response=self._response("in_progress", None))

    def ending(self, answer: Answer) -> Event:
        """What comes last."""
        status = "completed" if answer.finish == "stop" else "incomplete"
        return self._event(f"response.{status}", response=self.whole(answer, grown=True))

    def failing(self, failure: SlmopsError) -> Event:
        """What comes last when the model fails."""
        said = json.loads(bytes(of(failure, "input", self.grammar).body))["error"]
        error = {"code": said["code"] or "server_error", "message": said["message"]}
        return self._event("response.failed", response={**self._response("failed", None), "error": error})

    def whole(self, answer: Answer, grown: bool = False) -> dict[str, Any]:
        """The response. `grown`: its pieces were added."""
        if not grown:
            for piece in answer.pieces:
                for _ in self.add(piece):
                    pass
        usage = usage_of(self._prompt, [answer])
        told = {
            "input_tokens": usage["prompt_tokens"], "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }  # fmt: skip
        return self._response("completed" if answer.finish == "stop" else "incomplete", told)

    def turn(self) -> dict[str, Any]:
        """What the model said, as a turn of a conversation."""
        turn: dict[str, Any] = {"role": "assistant", "content": ""}
        for item in self._items:
            if item["type"] == "message":
                turn["content"] += item["content"][0]["text"]
            elif item["status"] == "completed":
                function = {"name": item["name"], "arguments": item["arguments"]}
                turn.setdefault("tool_calls", []).append(
                    {"id": item["call_id"], "type": "function", "function": function}
                )
        return turn

    def _event(self, kind: str, **what: Any) -> Event:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **what}

    def _at(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _open(self, kind: str) -> bool:
        return bool(self._items) and self._items[-1]["type"] == kind and self._items[-1]["status"] == "in_progress"

    def _text(self, text: str) -> Iterator[Event]:
        if not self._open("message"):
            yield from self._close(True)
            item = {
                "id": f"msg_{secrets.token_hex(16)}",
                "type": "message",
                "status": "in_progress",
                "role": "assistant",
            }
            self._items.append({**item, "content": []})
            yield self._event(
                "response.output_item.added", output_index=len(self._items) - 1, item={**item, "content": []}
            )
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield self._event("response.content_part.added", **self._at(), content_index=0, part=dict(part))
            self._items[-1]["content"].append(part)
        if text:
            self._items[-1]["content"][0]["text"] += text
            told, self._logprobs = self._logprobs, []
            self._items[-1]["content"][0]["logprobs"] += told
            at = {**self._at(), "content_index": 0}
            yield self._event("response.output_text.delta", **at, delta=text, logprobs=told)

    def _call(self, name: str) -> Iterator[Event]:
        assert self._said.format is not None
        item = {
            "id": f"fc_{secrets.token_hex(16)}", "type": "function_call", "status": "in_progress", "name": name, "arguments": "",
            "call_id": self._said.format.new_id(),
        }  # fmt: skip
        self._items.append(item)
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=dict(item))

    def _arguments(self, text: str) -> Iterator[Event]:
        self._items[-1]["arguments"] += text
        yield self._event("response.function_call_arguments.delta", **self._at(), delta=text)

    def _close(self, whole: bool) -> Iterator[Event]:
        """End the item that is open, if one is."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return
        item, at = self._items[-1], self._at()
        if item["type"] == "message":
            part = item["content"][0]
            part["logprobs"] += self._logprobs
            self._logprobs = []
            done = {"text": part["text"], "logprobs": part["logprobs"]}
            yield self._event("response.output_text.done", **at, content_index=0, **done)
            yield self._event("response.content_part.done", **at, content_index=0, part=dict(part))
        else:
            done = {"arguments": item["arguments"], "name": item["name"]}
            yield self._event("response.function_call_arguments.done", **at, **done)
        item["status"] = "completed" if whole else "incomplete"
        yield self._event("response.output_item.done", output_index=at["output_index"], item=dict(item))

    def _told(self, piece: Piece) -> dict[str, Any]:
        def one(token: int, value: float | None) -> dict[str, Any]:
            text = self._model.tokenizer.token(token)
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        likely = [one(token, value) for token, value in piece.likely]
        return {**one(piece.token, piece.logprob), "top_logprobs": likely}

    def _response(self, status: str, usage: dict[str, Any] | None) -> dict[str, Any]:
        wanted = self._wanted
        choice, form = wanted.tool_choice, wanted.text.format if wanted.text else None
        return {
            "id": self._id, "object": "response", "created_at": self._created, "status": status, "error": None,
            "completed_at": int(time.time()) if status == "completed" else None, "background": False,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": wanted.instructions, "max_output_tokens": wanted.max_output_tokens, "model": wanted.model,
            "output": [dict(item) for item in self._items], "parallel_tool_calls": wanted.parallel_tool_calls,
            "previous_response_id": wanted.previous_response_id, "reasoning": {"effort": None, "summary": None},
            "store": wanted.store, "temperature": wanted.temperature, "top_p": wanted.top_p,
            "text": {"format": form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [{"parameters": None, **tool.model_dump(exclude_none=True)} for tool in wanted.tools],
            "top_logprobs": wanted.top_logprobs, "truncation": "disabled", "usage": usage, "user": wanted.user,
            "metadata": wanted.metadata or {},
        }  # fmt: skip


async def events(
    first: tuple[int, Piece], pieces: AsyncGenerator[tuple[int, Piece], None], shape: ResponseShape, keep: Callable[[dict[str, Any]], None],
) -> AsyncGenerator[str, None]:  # fmt: skip
    """Server-sent events."""
    answer = Answer(0)
    try:
        for event in shape.opening():
            yield _sent(event)
        piece = first[1]
        while True:
            answer.pieces.append(piece)
            for event in shape.add(piece):
                yield _sent(event)
            try:
                _, piece = await anext(pieces)
            except StopAsyncIteration:
                break
        end = shape.ending(answer)
        keep(end["response"])
        yield _sent(end)
    except SlmopsError as failure:
        yield _sent(shape.failing(failure))
    finally:
        await pieces.aclose()


def _sent(event: Event) -> str:
    return f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"

"""What an answer of `/v1/chat/completions` looks like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slmops.serve.dialects.openai.answers import Answer, Shape
from slmops.serve.model import Model, Piece
from slmops.serve.saying import Saying
from slmops.serve.tools import Delta, Reader, called


class ChatShape(Shape):
    """`/v1/chat/completions`."""

    prefix, whole_kind, part_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    prompt = "messages"

    def __init__(self, name: str, model: Model, said: Saying) -> None:
        super().__init__(name, model)
        self._said = said
        self.grammar = "tools" if said.tools else "response_format"
        self._readers: dict[int, Reader] = {}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The role."""
        reader = self._said.reader()
        if reader:
            self._readers[index] = reader
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def part(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """See `Shape`."""
        reader, finish = self._readers.get(index), piece.finish
        if reader is None:
            delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        else:
            found = reader.add(piece.text) + (reader.rest() if finish else [])
            delta = self._delta(found)
            finish = "tool_calls" if finish == "stop" and reader.calls else finish
        if not delta and not finish and piece.logprob is None:
            return None
        return {"index": index, "delta": delta, "logprobs": self._told([piece]), "finish_reason": finish}

    def _delta(self, found: Sequence[Delta]) -> dict[str, Any]:
        text, calls = "".join(one.text for one in found), []
        for one in found:
            if one.name:
                assert self._said.format is not None
                head = {"index": one.call, "id": self._said.format.new_id(), "type": "function"}
                calls.append({**head, "function": {"name": one.name, "arguments": ""}})
            elif one.call is not None:
                calls.append({"index": one.call, "function": {"arguments": one.arguments}})
        return ({"content": text} if text else {}) | ({"tool_calls": calls} if calls else {})

    def choice(self, answer: Answer) -> dict[str, Any]:
        """See `Shape`."""
        reader, finish = self._said.reader(), answer.finish
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if reader and self._said.format:
            found = reader.add(answer.text) + reader.rest()
            calls = called(found)
            text = "".join(one.text for one in found)
            message["content"] = text if text or not calls else None
            if calls:
                new = self._said.format.new_id
                message["tool_calls"] = [
                    {"id": new(), "type": "function", "function": {"name": name, "arguments": arguments}}
                    for name, arguments in calls
                ]
                finish = "tool_calls" if finish == "stop" else finish
        return {
            "index": answer.index,
            "message": message,
            "logprobs": self._told(answer.pieces),
            "finish_reason": finish,
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

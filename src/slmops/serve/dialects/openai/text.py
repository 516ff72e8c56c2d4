"""What an answer of `/v1/completions` looks like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from slmops.serve.dialects.openai.answers import Answer, Shape
from slmops.serve.model import Model, Piece


class TextShape(Shape):
    """`/v1/completions`."""

    prefix, whole_kind, part_kind, prompt = "cmpl", "text_completion", "text_completion", "prompt"

    def __init__(self, name: str, model: Model) -> None:
        super().__init__(name, model)
        self._places: Counter[int] = Counter()  # how much of each answer has been told in a stream

    def part(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """See `Shape`."""
        if not piece.text and not piece.finish and piece.logprob is None:
            return None
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

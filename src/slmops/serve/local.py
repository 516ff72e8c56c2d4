"""A model in this process, for programs that want answers without a server: the engine, the picking and the text of `slmops serve`,
one answer at a time.

    from slmops.serve.local import Local

    with Local("outputs/demo/bundle/model") as model:
        for piece in model.chat([{"role": "user", "content": "where is my parcel?"}]):
            print(piece.text, end="", flush=True)

Law: an answer has the tokens that the server gives to the same request.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from slmops.core.engine import Engine, Sampling
from slmops.engines.gguf_tokenizer import tokenizer_of
from slmops.errors import ModelError
from slmops.serve.adapters import find_adapters
from slmops.serve.engines import kind_of, open_rows
from slmops.serve.model import Ask, Piece, piece_of
from slmops.serve.sampling import Picking
from slmops.serve.scheduler import Request, Scheduler
from slmops.serve.text import Stop, Stream
from slmops.serve.worker import row_of


class Local:
    """A loaded model. Not safe for use by two threads at once.

    Args:
        folder: a model in a form that the server takes, or a GGUF file.
        context: tokens of prompt and answer; None: as the model can.
        threads: CPU threads.
        engine: None: the one that the folder is for.
        adapters: places by name, beside those in the folder.

    Raises:
        MissingExtraError: the runtime is not installed.
        ModelError: it cannot be loaded.
    """

    def __init__(
        self, folder: Path | str, *, context: int | None = None, threads: int = 1, engine: str | None = None,
        adapters: Mapping[str, Path] | None = None,
    ) -> None:  # fmt: skip
        place = Path(folder)
        kind = kind_of(place, engine)
        self.tokenizer = tokenizer_of(place, "runtime")
        found = find_adapters(place, kind, adapters or {})
        self._rows = open_rows(place, rows=1, context=context, threads=threads, engine=engine, adapters=found)
        self._scheduler = Scheduler(self._rows, queue=1)
        self.context_length = self._rows.context_length

    def __enter__(self) -> Local:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def encode(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation, ready for its answer."""
        return self.tokenizer.encode(messages)

    def chat(
        self, messages: Sequence[dict[str, Any]], *, most: int | None = None, how: Picking | None = None, stops: Sequence[str] = (),
        adapter: str | None = None,
    ) -> Iterator[Piece]:  # fmt: skip
        """The pieces of the answer to a conversation, as they come. See `answer`."""
        return self.answer(Ask(self.encode(messages), most, how or Picking(), stops, adapter=adapter))

    def answer(self, ask: Ask) -> Iterator[Piece]:
        """The pieces of an answer, as they come. Whoever leaves the iteration early ends it.

        Raises:
            RequestError: the prompt leaves no room for an answer, or the model has not this adapter.
        """
        if ask.grammar is not None:
            raise ValueError("grammars are read by the server alone")
        room = self.context_length - len(ask.prompt)
        how = replace(ask.how, seed=secrets.randbits(63)) if ask.how.seed is None and ask.how.temperature else ask.how
        most = max(1, min(ask.most or room, room))
        self._scheduler.submit(Request(1, tuple(ask.prompt), most, how, adapter=ask.adapter))
        stream, stop, ended = Stream(self.tokenizer, ask.shown), Stop(ask.stops), False
        try:
            while not ended:
                for progress in self._scheduler.step():
                    piece = piece_of([row_of(progress)], stream, stop)
                    ended = piece.finish is not None
                    yield piece
        finally:
            self._scheduler.cancel(1)

    def close(self) -> None:
        """Free the model."""
        self._rows.close()

    def say(self, prompt: Sequence[int], most: int | None, temperature: float) -> Iterator[Piece]:
        """See `Talker`."""
        return self.answer(Ask(prompt, most, Picking(temperature=temperature)))


class Talker(Protocol):
    """What a conversation in a terminal needs of a model."""

    def encode(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation, ready for its answer."""

    def say(self, prompt: Sequence[int], most: int | None, temperature: float) -> Iterator[Piece]:
        """The pieces of an answer. `most`: its tokens; None: as many as there is room for.

        Raises:
            ModelError: the prompt leaves no room.
        """

    def close(self) -> None:
        """Free the model."""


class Whole:
    """A model of a runtime that the server does not run, whose answers come whole."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.encode, self.close = engine.encode, engine.close

    def say(self, prompt: Sequence[int], most: int | None, temperature: float) -> Iterator[Piece]:
        """See `Talker`."""
        room = max(1, self._engine.context_length - len(prompt))
        how = Sampling(min(most or room, room), temperature, seed=secrets.randbits(31))
        answer = self._engine.generate([list(prompt)], how)[0]
        finish = "stop" if answer.finished else "length"
        yield Piece(answer.text, answer.tokens[-1] if answer.tokens else 0, finish, tokens=len(answer.tokens))


def talker(place: Path, threads: int) -> Talker:
    """A model to talk to: piece by piece where the server has an engine for it.

    Raises:
        MissingExtraError: the runtime is not installed.
        ModelError: it cannot be loaded.
    """
    from slmops import engines

    try:
        kind_of(place)
    except ModelError:  # a model for another runtime, or none
        return Whole(engines.open_engine(place, threads=threads))
    return Local(place, threads=threads)

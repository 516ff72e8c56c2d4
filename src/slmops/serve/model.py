"""A served model: its process, its tokenizer, and answers as streams of text.

A model's process that dies takes its answers with it, each with an error, and is started again; one that dies again and again
is left alone for longer each time.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import secrets
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from slmops.engines.plain_tokenizer import PlainTokenizer
from slmops.errors import ModelError, ResourceError, SlmopsError
from slmops.serve.sampling import Picking
from slmops.serve.scheduler import RequestError, check_length
from slmops.serve.text import Stop, Stream

LONGEST_LINE = 1 << 24
PATIENCE_S = 30.0
HEALTHY_S = 300.0
"""A model that ran so long had no reason to die that lasts."""


@dataclass(frozen=True)
class Piece:
    """What one token adds to an answer.

    Attributes:
        text: may be empty, as while a character is not whole or may be the beginning of a stop string.
        token: its id.
        finish: `stop` or `length` with the last one.
        cached: tokens of the prompt that had not to be read, with the first piece.
        logprob, likely: where they were asked for.
    """

    text: str
    token: int
    finish: str | None = None
    cached: int = 0
    logprob: float | None = None
    likely: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Ask:
    """What an answer is asked for with.

    Attributes:
        prompt: token ids.
        most: new tokens; None: as many as the context has room for.
        how: how they are picked.
        stops: texts that end the answer, themselves left out.
    """

    prompt: Sequence[int]
    most: int | None = None
    how: Picking = field(default_factory=Picking)
    stops: Sequence[str] = ()


@dataclass
class Settings:
    """How a model is served: `rows` answers at a time, `context` tokens each (None: as the model can), `queue` more requests waiting."""

    folder: Path
    name: str
    rows: int = 8
    context: int | None = None
    threads: int = 1
    queue: int = 256


@dataclass
class Model:
    """A model and its process. Used from one event loop."""

    settings: Settings
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.tokenizer = PlainTokenizer(self.settings.folder, "serve")
        self.context_length = self.vocabulary = 0
        self.deaths = 0
        self._process: asyncio.subprocess.Process | None = None
        self._loading: asyncio.Task[None] | None = None
        self._reader: asyncio.Task[None] | None = None
        self._ids = itertools.count(1)
        self._open: dict[int, asyncio.Queue[Any]] = {}
        self._again = self._since = 0.0
        self._stopped = False

    @property
    def active(self) -> int:
        """Answers that are being written or wait."""
        return len(self._open)

    @property
    def ready(self) -> bool:
        """Whether its process can be asked."""
        return self._process is not None and self._process.returncode is None and self.context_length > 0

    @property
    def pid(self) -> int | None:
        """Of its process."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start its process, if none is there, and wait until the model is loaded. Who gives up waiting does not stop the loading.

        Raises:
            ModelError: it cannot be loaded.
            ResourceError: it died a moment ago.
        """
        if self.ready:
            return
        wait = self._again - time.monotonic()
        if wait > 0:
            raise ResourceError(f"the model {self.settings.name} has failed", f"try again in {max(1.0, wait):.0f} s")
        if self._loading is None or self._loading.done():
            self._loading = asyncio.create_task(self._load())
        await asyncio.shield(self._loading)

    async def _load(self) -> None:
        command, pipe, s = [sys.executable, "-m", "slmops.serve.worker"], asyncio.subprocess.PIPE, self.settings
        process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, limit=LONGEST_LINE, start_new_session=True
        )
        self._process = process
        assert process.stdout is not None
        try:
            self._write({**asdict(s), "folder": str(s.folder)})
            line = await process.stdout.readline()
            first: dict[str, Any] = {"failed": f"the process of {s.name} died while it loaded the model"}
            if line:
                first = json.loads(line)
            if "failed" in first:
                raise ModelError(first["failed"], first.get("hint", ""))
        except BaseException as error:
            self._process = None
            _kill(process)
            await process.wait()
            self._died()
            if isinstance(error, ValueError):
                raise ModelError(f"the process of {s.name} said what cannot be read", "load it again") from error
            raise
        self.context_length, self.vocabulary = int(first["ready"]["context"]), int(first["ready"]["vocabulary"])
        self._since = time.monotonic()
        self._reader = asyncio.create_task(self._read(process))

    def _write(self, command: dict[str, Any]) -> None:
        if self._process is None or self._process.stdin is None:
            return
        with contextlib.suppress(ConnectionError, RuntimeError):  # the reader finds out
            self._process.stdin.write(json.dumps(command, separators=(",", ":")).encode() + b"\n")

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        why = f"the process of the model {self.settings.name} ended"
        try:
            while line := await process.stdout.readline():
                said = json.loads(line)
                for row in said.get("tokens", ()):
                    if row[0] in self._open:
                        self._open[row[0]].put_nowait(row)
                if "refused" in said and said["refused"] in self._open:
                    kind = ResourceError if said["busy"] else ModelError
                    self._open[said["refused"]].put_nowait(kind(said["why"], said["hint"]))
                if "failed" in said:
                    why = said["failed"]
        except ValueError:  # a line that is no JSON, or too long
            why = f"the process of the model {self.settings.name} said what cannot be read"
        finally:
            self.context_length = 0
            _kill(process)
            await process.wait()
            for waiting in self._open.values():
                waiting.put_nowait(ModelError(why, "ask again"))
            if not self._stopped:
                self._died()
                self._loading = asyncio.create_task(self._revive())

    async def _revive(self) -> None:
        """Load it again without being asked, as nobody asks a server that says it is not ready; until that succeeds."""
        while not self.ready:
            await asyncio.sleep(max(0.0, self._again - time.monotonic()))
            with contextlib.suppress(SlmopsError, OSError):
                await self._load()

    def _died(self) -> None:
        if self._since and time.monotonic() - self._since > HEALTHY_S:
            self.deaths = 0
        self.deaths += 1
        self._again = time.monotonic() + min(60.0, 0.5 * 2 ** min(self.deaths, 8)) if self.deaths > 1 else 0.0

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a rendered prompt."""
        return self.tokenizer.encode(messages)

    async def answer(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        """The pieces of an answer. Whoever leaves the iteration early frees its row at once.

        Raises:
            RequestError: the prompt does not fit, or has a token that the model has not.
            ModelError: the model's process died.
            ResourceError: too many requests wait, or the model failed a moment ago.
        """
        await self.start()
        if not self.ready:
            raise ModelError(f"the process of the model {self.settings.name} ended", "ask again")
        prompt, how = ask.prompt, ask.how
        room = self.context_length - len(prompt)
        check_length(prompt, self.context_length)
        odd = [id for id in (*prompt, *how.logit_bias) if not 0 <= id < self.vocabulary]
        if odd:
            raise RequestError(f"the model has no token {odd[0]}: it has {self.vocabulary}", "leave it out")
        if how.seed is None and how.temperature:
            how = replace(how, seed=secrets.randbits(63))
        id = next(self._ids)
        found: asyncio.Queue[Any] = asyncio.Queue()
        self._open[id] = found
        changed = {name: value for name, value in asdict(how).items() if value != getattr(Picking(), name)}
        self._write(
            {"ask": {"id": id, "prompt": list(prompt), "most": max(1, min(ask.most or room, room)), "how": changed}}
        )
        stream, stop, ended = Stream(self.tokenizer), Stop(ask.stops), False
        try:
            while not ended:
                row = await found.get()
                if isinstance(row, Exception):
                    ended = True
                    raise row
                _, token, finish, cached, *told = row
                ended = finish is not None
                text = stop.add(stream.add(token) + (stream.rest() if ended else ""))
                if stop.found:
                    finish = "stop"
                elif ended:
                    text += stop.rest()
                logprob, likely = told or (None, ())
                yield Piece(text, token, finish, cached, logprob, tuple((int(i), float(v)) for i, v in likely))
                if stop.found:
                    return
        finally:
            del self._open[id]
            if not ended:
                self._write({"cancel": id})

    async def stop(self) -> None:
        """End the process."""
        self._stopped = True
        if self._loading is not None and not self._loading.done():
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), PATIENCE_S)
        except TimeoutError:
            _kill(process)
            await process.wait()
        if self._reader is not None:
            await self._reader


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()

"""A served model: its process, its tokenizer, and answers as streams of text.

A model's process that dies takes its answers with it, each with an error, and is started again; one that dies again and again
is left alone for longer each time. It is started when the model is first asked, and ended by `unload`, never while somebody waits for
an answer; whether there is room for it, and when it has been idle for too long, `slmops.serve.pool` says.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import secrets
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, Protocol

from slmops.engines.gguf_tokenizer import tokenizer_of
from slmops.errors import ModelError, ResourceError
from slmops.serve.adapters import find_adapters
from slmops.serve.engines import kind_of
from slmops.serve.mailbox import Mailbox
from slmops.serve.pages import environment
from slmops.serve.process import Process
from slmops.serve.record import Told, Watch, remind, watching, within
from slmops.serve.refusals import DeadlineError
from slmops.serve.sampling import Picking
from slmops.serve.scheduler import GrammarError, RequestError, check_adapter, check_length
from slmops.serve.text import Stop, Stream

_json = json.JSONEncoder(separators=(",", ":")).encode
PLAIN = asdict(Picking())
PATIENCE_S = 30.0
HEALTHY_S = 300.0
"""A model that ran so long had no reason to die that lasts."""
RECENT = 0.2
"""Weight of the last answer in the mean of how long answers take."""
State = Literal["loaded", "loading", "unloaded", "failed"]


@dataclass(frozen=True)
class Piece:
    """What one token adds to an answer, or several that came at once.

    Attributes:
        text: may be empty, as while a character is not whole or may be the beginning of a stop string.
        token: its id; of several that of the last.
        finish: `stop` or `length` with the last one.
        cached: tokens of the prompt that had not to be read, with the first piece.
        logprob, likely: where they were asked for.
        tokens: of how many this is, more than one only where `Ask.joined` says so.
    """

    text: str
    token: int
    finish: str | None = None
    cached: int = 0
    logprob: float | None = None
    likely: tuple[tuple[int, float], ...] = ()
    tokens: int = 1


@dataclass(frozen=True)
class Ask:
    """What an answer is asked for with.

    Attributes:
        prompt: token ids.
        most: new tokens; None: as many as the context has room for.
        how: how they are picked.
        stops: texts that end the answer, themselves left out.
        grammar: what it may say; see `slmops.serve.grammar`.
        shown: special tokens whose text is a part of the answer, as marks of calls are.
        adapter: which of the model's adapters it is answered with; None: the model alone.
        joined: tokens that come at once may be one piece, where neither their probabilities nor `stops` have to be told apart.
        whole: nobody needs to hear between its first token and its last, so that they come at once; not where `stops` may end it.
    """

    prompt: Sequence[int]
    most: int | None = None
    how: Picking = field(default_factory=Picking)
    stops: Sequence[str] = ()
    grammar: str | None = None
    shown: frozenset[int] = frozenset()
    adapter: str | None = None
    joined: bool = False
    whole: bool = False


class Watcher(Protocol):
    """Sees an answer as it is written."""

    def add(self, piece: Piece) -> None:
        """The next piece."""

    def end(self, failure: BaseException | None) -> None:
        """It has ended: None, with its last token; else why not."""


@dataclass
class Settings:
    """How a model is served.

    Attributes:
        folder: or a GGUF file.
        rows: answers at a time.
        context: tokens of each; None: as the model can.
        threads: 0: as many as were measured to be fastest.
        queue: requests that may wait beside.
        load: at the server's `start`, on the first `demand`, or at the start where it fits beside those before it.
        idle: seconds after its last answer until it is unloaded; None: it stays until another needs its room.
        fallback: name of the model that answers where this one cannot in time, or for want of memory.
        canaries: a file of prompts that another version has to answer before it takes over.
        engine: None: the one that the folder is for.
        adapters: places by name, beside those in the folder.
        tell_ms: tokens that come within so many milliseconds are told together.
    """

    folder: Path
    name: str
    rows: int = 8
    context: int | None = None
    threads: int = 1
    queue: int = 256
    load: Literal["start", "fit", "demand"] = "fit"
    idle: float | None = None
    fallback: str | None = None
    canaries: Path | None = None
    engine: str | None = None
    adapters: dict[str, Path] = field(default_factory=dict)
    tell_ms: float = 10.0


@dataclass(eq=False)
class Model:
    """A model and its process. Used from one event loop.

    Attributes:
        version: of those under its name.
        clock: seconds, for idle times and pauses.
        admit: is awaited before its process is started, and raises where there is no room.
        watch: gets what each answer is asked for with; None: nobody watches.
        reserved: bytes of memory that are kept for its process; 0: none.
    """

    settings: Settings
    created: int = field(default_factory=lambda: int(time.time()))
    version: int = 1
    clock: Callable[[], float] = time.monotonic
    admit: Callable[[Model], Awaitable[None]] | None = None
    watch: Callable[[Ask], Watcher | None] | None = None
    reserved: int = 0

    def __post_init__(self) -> None:
        s = self.settings
        self.kept = s.idle
        self.used = self.clock()
        self.load_s: float | None = None
        self.answer_s: float | None = None
        self._wanted = 0
        self._changing = asyncio.Lock()
        self._ending: Process | None = None
        self.engine = kind_of(s.folder, s.engine)
        self.tokenizer = tokenizer_of(s.folder, "serve")
        self.adapters = find_adapters(s.folder, self.engine, s.adapters)
        self.context_length = self.vocabulary = self.threads = 0
        self.deaths = 0
        self._process: Process | None = None
        self._loading: asyncio.Task[None] | None = None
        self._reviving: asyncio.Task[None] | None = None
        self._reader: asyncio.Task[None] | None = None
        self._ids = itertools.count(1)
        self._open: dict[int, Mailbox[Any]] = {}
        self._watches: dict[int, Watch] = {}
        self.told = Told()
        self._again = self._since = 0.0
        self._stopped = self._failed = False

    @property
    def active(self) -> int:
        """Answers that are being written or wait."""
        return len(self._open)

    @property
    def rows_busy(self) -> int:
        """Answers that have a row."""
        return sum(watch.waited is not None for watch in self._watches.values())

    @property
    def ready(self) -> bool:
        """Whether its process can be asked."""
        return self._process is not None and self._process.returncode is None and self.context_length > 0

    @property
    def pid(self) -> int | None:
        """Of its process."""
        return self._process.pid if self._process else None

    @property
    def stopped(self) -> bool:
        """Whether it was ended for good."""
        return self._stopped

    @property
    def busy(self) -> bool:
        """Whether somebody waits for an answer, of which the first token may be far."""
        return bool(self._wanted or self._open)

    @property
    def idle(self) -> bool:
        """Whether its process is there and may be ended."""
        return self.ready and not self.busy and not self._changing.locked()

    @property
    def due(self) -> bool:
        """Whether it has been idle for as long as it is kept."""
        return self.idle and self.kept is not None and self.clock() - self.used >= self.kept

    @property
    def left(self) -> float | None:
        """Seconds until it is unloaded if nobody asks it; None: it stays."""
        return None if self.kept is None else max(0.0, self.used + self.kept - self.clock())

    @property
    def state(self) -> State:
        """What its process is at. `failed`: it died, or could not be loaded, and nobody has loaded it since."""
        if self.ready:
            return "loaded"
        if self._failed:
            return "failed"
        return "loading" if self._loading is not None and not self._loading.done() else "unloaded"

    @property
    def full(self) -> bool:
        """Whether one more request would be refused."""
        return self.active >= self.settings.rows + self.settings.queue

    @property
    def expected_s(self) -> float:
        """Seconds that one more answer may take, as the last ones did: the wait for a row, and itself. 0: nobody knows."""
        rounds = 1 + max(0, self.active + 1 - self.settings.rows) / self.settings.rows
        return rounds * (self.answer_s or 0.0)

    def keep(self, seconds: float | None) -> None:
        """Unload it so long after its last answer, until the next request says otherwise; None: leave it loaded. 0: as soon as nobody waits
        for an answer."""
        self.kept, self.used = seconds, self.clock()

    async def start(self) -> None:
        """Start its process, if none is there, and wait until the model is loaded. Who gives up waiting does not stop the loading.

        Raises:
            ModelError: it cannot be loaded.
            NoRoomError: there is not enough memory for it.
            ResourceError: it died a moment ago, or was replaced.
        """
        if not self.ready and self._reader is not None and not self._reader.done():
            await asyncio.wait([self._reader])  # a process has just ended, and what that leads to is not settled
        if self.ready:
            return
        if self._stopped:
            raise ResourceError(f"this version of {self.settings.name} was replaced", "ask again")
        wait = self._again - self.clock()
        if wait > 0:
            raise ResourceError(
                f"the model {self.settings.name} has failed", f"try again in {max(1.0, wait):.0f} s", retry_after=wait
            )
        loading, own = self._attempt(), asyncio.current_task()
        try:
            await asyncio.shield(loading)
        except asyncio.CancelledError:
            if loading.cancelled() and not (own and own.cancelling()):  # it was stopped or unloaded, not who waits
                raise ResourceError(f"the model {self.settings.name} was unloaded", "ask again") from None
            raise

    def _attempt(self) -> asyncio.Task[None]:
        """The loading that is under way, or that begins now: there is one at a time."""
        if self._loading is None or self._loading.done():
            self._loading = asyncio.create_task(self._begin())
            self._loading.add_done_callback(_seen)  # who asked may have given up
        return self._loading

    async def _begin(self) -> None:
        """Load it where there is room. One that died has its room still, and keeps it if it cannot be loaded."""
        async with self._changing:
            kept = self.reserved
            if self.admit is not None and not kept:
                await self.admit(self)
            try:
                begun = self.clock()
                await self._load()
            except BaseException:
                self.reserved = kept
                raise
            self.load_s, self.used = self.clock() - begun, self.clock()

    async def _load(self) -> None:
        s = self.settings
        try:
            large = environment() if self.engine == "onnx" else None  # it helps the others nothing
            process = await Process.start([sys.executable, "-m", "slmops.serve.worker"], large)
        except OSError as error:
            self._died()
            raise ModelError(
                f"no process could be started for the model {s.name}: {error}", "try again later"
            ) from error
        self._process = process
        try:
            order = {**asdict(s), "engine": self.engine, "adapters": self.adapters}
            self._write(json.loads(json.dumps(order, default=str)))
            line = await process.first()
            first: dict[str, Any] = {"failed": f"the process of {s.name} died while it loaded the model"}
            if line:
                first = json.loads(line)
            if "failed" in first:
                raise ModelError(first["failed"], first.get("hint", ""))
        except BaseException as error:
            self._process = None
            process.kill()
            await process.wait()
            if not self._stopped:
                self._died()
            if isinstance(error, ValueError):
                raise ModelError(f"the process of {s.name} said what cannot be read", "load it again") from error
            raise
        self.context_length, self.vocabulary = int(first["ready"]["context"]), int(first["ready"]["vocabulary"])
        self.threads = int(first["ready"]["threads"])
        self._since, self._failed = self.clock(), False
        if self._reviving is not None:
            self._reviving.cancel()
        self._reader = asyncio.create_task(self._read(process))

    def _write(self, command: dict[str, Any]) -> None:
        if self._process is not None:
            self._process.write(_json(command).encode() + b"\n")

    async def _read(self, process: Process) -> None:
        why = f"the process of the model {self.settings.name} ended"

        def hear(line: bytes) -> None:
            nonlocal why
            said = json.loads(line.decode())
            self._hear(said)
            why = said.get("failed", why)

        try:
            await process.follow(hear)
        except ValueError:  # a line that is no JSON, or too long
            why = f"the process of the model {self.settings.name} said what cannot be read"
        finally:
            self.context_length = 0
            try:  # it has closed its output: it is about to end
                await asyncio.wait_for(process.wait(), 1.0)
            except TimeoutError:
                process.kill()
                await process.wait()
            for waiting in self._open.values():
                waiting.put(ModelError(why, "ask again"))
            if not self._stopped and process is not self._ending:
                self._died()
                self._reviving = asyncio.create_task(self._revive())

    def _hear(self, said: dict[str, Any]) -> None:
        """Hand on what the process says to those whom it is for."""
        for id, rows in itertools.groupby(said.get("tokens", ()), itemgetter(0)):
            if id in self._open:
                self._open[id].put(list(rows))
        if "embedded" in said and said["embedded"][0] in self._open:
            self._open[said["embedded"][0]].put(said["embedded"])
        for id, waited in said.get("began", ()):
            if id in self._watches:
                self._watches[id].started(waited)
        if "refused" in said and said["refused"] in self._open:
            kinds = (("busy", ResourceError), ("grammar", GrammarError), ("asked", RequestError))
            kind = next((kind for mark, kind in kinds if said.get(mark)), ModelError)
            self._open[said["refused"]].put(kind(said["why"], said["hint"]))

    async def _revive(self) -> None:
        """Load it again without being asked, as nobody asks a server that says it is not ready; until that succeeds. Who asks for the
        model in the meantime waits for one attempt at most."""
        while not self.ready:
            while (wait := self._again - self.clock()) > 0:
                await asyncio.sleep(wait)
            await asyncio.wait([self._attempt()])

    async def _give_up(self) -> None:
        """End what loads it, or will."""
        some = [task for task in (self._reviving, self._loading) if task is not None and not task.done()]
        for task in some:
            task.cancel()
        await asyncio.gather(*some, return_exceptions=True)

    def _died(self) -> None:
        if self._since and self.clock() - self._since > HEALTHY_S:
            self.deaths = 0
        self.deaths += 1
        self.told.deaths += 1
        self._failed = True
        self._again = self.clock() + min(60.0, 0.5 * 2 ** min(self.deaths, 8)) if self.deaths > 1 else 0.0

    def encode(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Token ids of a rendered prompt."""
        return self.tokenizer.encode(messages, tools)

    async def answer(self, ask: Ask, watched: bool = True) -> AsyncGenerator[Piece, None]:
        """The pieces of an answer. Whoever leaves the iteration early frees its row at once.

        Args:
            watched: tell who watches the model.

        Raises:
            RequestError: the prompt does not fit, or has a token that the model has not.
            ModelError: the model's process died.
            ResourceError: too many requests wait, or the model failed a moment ago.
            NoRoomError: the model is not loaded, and there is not enough memory for it.
            DeadlineError: the request's time is over.
            LimitError: its key has too many answers already.
        """
        self._wanted += 1
        watcher, failure = None, None
        if watched:
            self.kept = self.settings.idle
        try:
            if self.watch is not None and watched:
                if ask.how.seed is None and ask.how.temperature:  # so that another version can be asked the same
                    ask = replace(ask, how=replace(ask.how, seed=secrets.randbits(63)))
                watcher = self.watch(ask)
            await within(self.start())
            begun = self.clock()
            async with contextlib.aclosing(self._answer(ask)) as pieces:
                async for piece in pieces:
                    if piece.finish:
                        took = self.clock() - begun
                        self.answer_s = (
                            took if self.answer_s is None else self.answer_s + RECENT * (took - self.answer_s)
                        )
                    if watcher is not None:
                        watcher.add(piece)
                    yield piece
        except BaseException as error:
            failure = error
            raise
        finally:
            self._wanted -= 1
            self.used = self.clock()
            if watcher is not None:
                watcher.end(failure)

    def _check_ready(self) -> None:
        if not self.ready:
            raise ModelError(f"the process of the model {self.settings.name} ended", "ask again")

    async def _answer(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        self._check_ready()
        prompt, how = ask.prompt, ask.how
        room = self.context_length - len(prompt)
        check_length(prompt, self.context_length)
        check_adapter(ask.adapter, self.adapters)
        self._check_tokens((*prompt, *how.logit_bias))
        if how.seed is None and how.temperature:
            how = replace(how, seed=secrets.randbits(63))
        id = next(self._ids)
        found: Mailbox[Any] = Mailbox()
        watch = watching(self.settings.name, len(prompt), self.told)
        self._open[id], self._watches[id], late, finish = found, watch, remind(found), None
        changed = {name: value for name, value in vars(how).items() if value != PLAIN[name]}
        asked = {"id": id, "prompt": list(prompt), "most": max(1, min(ask.most or room, room)), "how": changed}
        more = {"grammar": ask.grammar, "adapter": ask.adapter, "whole": (ask.whole and not ask.stops) or None}
        self._write({"ask": {**asked, **{name: value for name, value in more.items() if value is not None}}})
        stream, stop, ended = Stream(self.tokenizer, ask.shown), Stop(ask.stops), False
        joined = ask.joined and not ask.stops and how.logprobs is None
        try:
            while not ended:
                rows = await found.get()
                if isinstance(rows, Exception):
                    ended = not isinstance(rows, DeadlineError)
                    raise rows
                for some in [rows] if joined else [[row] for row in rows]:
                    ended = some[-1][2] is not None
                    piece = piece_of(some, stream, stop)
                    finish = piece.finish
                    watch.token(piece.cached, piece.text, piece.tokens)
                    yield piece
                    if stop.found:
                        return
        finally:
            del self._open[id], self._watches[id]
            watch.end(finish, sys.exc_info()[1])
            if late is not None:
                late.cancel()
            if not ended:
                self._write({"cancel": id})

    def _check_tokens(self, ids: Iterable[int]) -> None:
        odd = next((id for id in ids if not 0 <= id < self.vocabulary), None)
        if odd is not None:
            raise RequestError(f"the model has no token {odd}: it has {self.vocabulary}", "leave it out")

    async def embed(self, prompts: Sequence[Sequence[int]], adapter: str | None = None) -> list[list[float]]:
        """The mean of the model's last hidden states over all tokens of each prompt, each of length 1.

        Whoever gives up waiting frees the model of the rest.

        Raises:
            RequestError: a prompt is empty, longer than the context or has a token that the model has not; or the model cannot.
            ModelError: the model's process died.
            ResourceError: too many requests wait, or the model failed a moment ago.
            DeadlineError: the request's time is over.
            LimitError: its key has too many answers already.
        """
        self._wanted += 1
        self.kept = self.settings.idle
        try:
            await within(self.start())
            return await self._embed(prompts, adapter)
        finally:
            self._wanted -= 1
            self.used = self.clock()

    async def _embed(self, prompts: Sequence[Sequence[int]], adapter: str | None) -> list[list[float]]:
        self._check_ready()
        check_adapter(adapter, self.adapters)
        self._check_tokens(id for prompt in prompts for id in prompt)
        id = next(self._ids)
        found: Mailbox[Any] = Mailbox()
        watch = watching(self.settings.name, sum(map(len, prompts)), self.told)
        self._open[id], late = found, remind(found)
        vectors: list[list[float]] = []
        self._write({"embed": {"id": id, "prompts": [list(prompt) for prompt in prompts], "adapter": adapter}})
        refused = False
        try:
            while len(vectors) < len(prompts):
                row = await found.get()
                if isinstance(row, Exception):
                    refused = not isinstance(row, DeadlineError)
                    raise row
                vectors.append(row[2])
        finally:
            del self._open[id]
            watch.end("stop" if len(vectors) == len(prompts) else None, sys.exc_info()[1])
            if late is not None:
                late.cancel()
            if len(vectors) < len(prompts) and not refused:
                self._write({"cancel": id})
        return vectors

    async def unload(self) -> bool:
        """End its process and give its memory back, unless somebody waits for an answer. It is loaded again when it is asked.

        A model that died is no longer started again by itself.
        """
        if self.busy:
            return False
        if self._failed:
            await self._give_up()
        async with self._changing:
            if self.busy:
                return False
            self._failed, self._ending = False, self._process
            await self._end()
        return True

    async def stop(self) -> None:
        """End the process for good."""
        self._stopped = True
        await self._give_up()
        async with self._changing:
            await self._end()

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.close()
            try:
                await asyncio.wait_for(process.wait(), PATIENCE_S)
            except TimeoutError:
                process.kill()
                await process.wait()
            if self._reader is not None:
                await self._reader
        self.reserved = 0


def piece_of(rows: Sequence[Sequence[Any]], stream: Stream, stop: Stop) -> Piece:
    """What some tokens of an answer add: [id, token, finish, cached] of each, and log probabilities where they were asked for."""
    _, token, finish, _, *told = rows[-1]
    text = stop.add(stream.add(*(row[1] for row in rows)) + (stream.rest() if finish else ""))
    if stop.found:
        finish = "stop"
    elif finish:
        text += stop.rest()
    logprob, likely = told or (None, ())
    return Piece(
        text, token, finish, rows[0][3], logprob, tuple((int(id), float(value)) for id, value in likely), len(rows)
    )


def _seen(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()

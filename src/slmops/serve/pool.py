"""The models of a server, by name: which are loaded, which version answers, and how much memory they may take together.

A model is loaded when it is first asked, or at the start. Before that its memory is reserved: what its process will take at most
(`slmops.serve.memory`) beside what is reserved already has to stay below a budget, and below what the machine has. Where it does
not, idle models are unloaded, the one that was asked longest ago first; where that is not enough, the request is refused or goes to
a smaller model that the settings allow. A model that somebody waits for is never unloaded.

What one model does is in `slmops.serve.model`, swaps and candidates in `slmops.serve.versions`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from slmops.errors import ModelError, NoRoomError, SlmopsError
from slmops.serve import memory
from slmops.serve.adapters import JOIN, Adapted
from slmops.serve.definitions import LATEST, Definition, Definitions, short
from slmops.serve.model import Model, Settings

if TYPE_CHECKING:
    from slmops.serve.versions import Candidate

TEND_S = 0.25
GRACE_S = 2.0
"""A version that was replaced is kept at least so long, for requests that had found it and have yet to ask it."""
RETRY_S = 5.0
"""When to ask again for a model that there is no room for: idle ones may be unloaded by then."""


@dataclass
class Slot:
    """What stands under a name. `before`: how the version before was served; `count`: versions that there have been; `changing`: one is
    about to take over."""

    current: Model
    before: Settings | None = None
    before_version: int = 0
    candidate: Candidate | None = None
    count: int = 1
    changing: bool = False


@dataclass(frozen=True)
class Found:
    """What a name stands for: a model, by itself or as a definition has it."""

    model: Model
    definition: Definition | None = None

    @property
    def name(self) -> str:
        """What answers are signed with."""
        return short(self.definition.name) if self.definition else self.model.settings.name

    @property
    def headers(self) -> dict[str, str]:
        """Who answers."""
        return {"X-Slmops-Model": self.model.settings.name, "X-Slmops-Version": str(self.model.version)}


class Pool:
    """Models under their names, in the order in which they came. Used from one event loop.

    Args:
        budget: bytes that all models may take together; None: a share of what is free at the first load.
        clock: seconds, for idle times.
        reserve: bytes to keep for a model.
        free: bytes that the machine has left; None: it does not say.

    Attributes:
        left: seconds that the request which is being answered has left; None: as long as it takes.
        definitions: names that stand for models with more; None: none are kept.
        grace: see `GRACE_S`.
    """

    def __init__(
        self, wanted: Sequence[Settings] = (), *, budget: int | None = None, clock: Callable[[], float] = time.monotonic,
        reserve: Callable[[Settings], int] = lambda settings: memory.reservation(settings).total,
        free: Callable[[], int | None] = memory.free,
    ) -> None:  # fmt: skip
        self.budget, self._clock, self._reserve, self._free = budget, clock, reserve, free
        self.left: Callable[[], float | None] = lambda: None
        self.definitions: Definitions | None = None
        self.grace = GRACE_S
        self.slots: dict[str, Slot] = {}
        self.trying: list[Model] = []
        """Versions that have yet to show that they can take over, or that are about to end."""
        self._leaving: list[Model] = []
        """Versions that no new request goes to."""
        self._admitting, self._ended = asyncio.Lock(), asyncio.Event()
        self._tender: asyncio.Task[None] | None = None
        for settings in wanted:
            self.add(settings)

    def __iter__(self) -> Iterator[Model]:
        return iter([slot.current for slot in self.slots.values()])

    @property
    def names(self) -> list[str]:
        """Of all models, and of each with each of its adapters."""
        return [name for model in self for name in _names(model)]

    @property
    def reserved(self) -> int:
        """Bytes that are kept for the models that are loaded."""
        return sum(model.reserved for model in self.processes())

    def processes(self) -> list[Model]:
        """All models that may have a process: those under a name, candidates, and versions that finish their last answers."""
        candidates = [slot.candidate.model for slot in self.slots.values() if slot.candidate]
        return [*self, *candidates, *self.trying, *self._leaving]

    def find(self, name: str) -> Model | None:
        """A model, loaded or not, or one with an adapter; None if there is none of this name. `pick` says who answers."""
        if name in self.slots:
            return self.slots[name].current
        base, _, adapter = name.rpartition(JOIN)
        return _wearing(self.slots[base].current, adapter) if base in self.slots else None

    async def pick(self, name: str, who: str | None = None, within: float | None = None) -> Model | None:
        """Who answers a request for a model: its candidate, for a share of those that ask; a smaller model that its settings allow,
        where this one has no room, no free place, or takes longer than there is time; else itself. None if there is none of this name.

        Args:
            who: the same asker always gets the same version; None: each request for itself.
            within: seconds until the answer has to be there; None: as `left` says.
        """
        within = self.left() if within is None else within
        slot = self.slots.get(name)
        if slot is None:
            base, _, adapter = name.rpartition(JOIN)
            if base not in self.slots or not _wearing(self.slots[base].current, adapter):
                return None
            picked = await self.pick(base, who, within)  # one without this adapter cannot stand in
            return (_wearing(picked, adapter) if picked else None) or self.find(name)
        tried = slot.candidate
        if (
            tried is not None
            and tried.takes(who)
            and await self._answers(tried.model, within)
            and slot.candidate is tried
        ):
            return tried.model
        model, seen = slot.current, {name}
        while (other := self.find(model.settings.fallback or "")) is not None and other.settings.name not in seen:
            if await self._answers(model, within):
                break
            seen.add(other.settings.name)
            model = other
        return self.find(model.settings.name) or model  # another version may have taken over while this one was loaded

    async def _answers(self, model: Model, within: float | None) -> bool:
        """Whether a model can be expected to answer in time; it is loaded if it can be."""
        if model.full or (within is not None and model.expected_s > within):
            return False
        if not model.ready:
            if within is not None and (model.load_s or 0.0) + model.expected_s > within:
                within = 0.0  # the next request will find it loaded
            try:
                async with asyncio.timeout(None if within is None else within / 2):
                    await model.start()
            except (SlmopsError, TimeoutError):
                return False
        return True

    def resolve(self, name: str) -> Found | None:
        """A model by its name, with `:latest` or without, or by that of a definition which is made from it.

        Raises:
            ModelError: the definition is damaged.
        """
        model = self.find(name) or self.find(name.removesuffix(LATEST))
        if model is not None:
            return Found(model)
        definition = self.definitions.get(name) if self.definitions else None
        model = self.find(definition.base) if definition else None
        return Found(model, definition) if model else None

    async def choose(self, name: str, who: str | None = None) -> Found | None:
        """What a name stands for, with the model that answers now; see `resolve` and `pick`."""
        found = self.resolve(name)
        model = await self.pick(found.model.settings.name, who) if found else None
        return Found(model, found.definition) if found and model else None

    def defined(self) -> Iterator[Found]:
        """All definitions whose model is there."""
        for definition in self.definitions or ():
            model = self.find(definition.base)
            if model is not None:
                yield Found(model, definition)

    def add(self, settings: Settings) -> Model:
        """A new model, which is not loaded yet. One that had its name finishes its answers and ends.

        Raises:
            ModelError: its tokenizer cannot be read.
        """
        model = self.make(settings)
        old = self.slots.get(settings.name)
        self.slots[settings.name] = Slot(model)
        if old is not None:
            self.leave(old.current)
            if old.candidate is not None:
                self.leave(old.candidate.model)
        return model

    def make(self, settings: Settings, version: int = 1) -> Model:
        """A model that takes part in the pool's memory, and stands under no name."""
        return Model(settings, version=version, clock=self._clock, admit=self._admit)

    def leave(self, model: Model) -> None:
        """No new request goes to a model; it ends when its answers are finished."""
        model.watch = None
        model.used = self._clock()
        self._leaving.append(model)

    def replace(self, name: str, model: Model) -> None:
        """Let another version answer from now on. The one that did finishes its answers and ends, and can be returned to."""
        slot = self.slots[name]
        old, slot.current = slot.current, model
        slot.before, slot.before_version = old.settings, old.version
        model.keep(old.kept)
        self.leave(old)

    def back(self, name: str) -> Model | None:
        """The version before, if its process has not ended; it is no longer about to. None: it has to be loaded."""
        version = self.slots[name].before_version
        found = next((one for one in self._leaving if one.settings.name == name and one.version == version), None)
        if found is not None and not found.stopped:
            self._leaving.remove(found)
            return found
        return None

    async def remove(self, name: str) -> bool:
        """Take a model away; it ends when its answers are finished. False if there is none of this name."""
        slot = self.slots.pop(name, None)
        if slot is None:
            return False
        self.leave(slot.current)
        if slot.candidate is not None:
            self.leave(slot.candidate.model)
        await self.tend()
        return True

    def check(self) -> None:
        """Refuse settings that cannot work.

        Raises:
            ModelError: a fallback that is no model, or a model that never fits and has none.
        """
        budget = self._bounded()
        for model in self:
            s = model.settings
            if s.fallback is not None and (s.fallback not in self.slots or s.fallback == s.name):
                raise ModelError(f"{s.name} falls back to {s.fallback}, which is no other model here", "serve it too")
            need = self._reserve(s)
            if budget is not None and need > budget and s.fallback is None:
                raise ModelError(
                    f"{s.name} takes up to {gigabytes(need)} with {s.rows} rows, but models may take {gigabytes(budget)}",
                    "serve it with fewer --rows or a shorter --context, or give more --memory",
                )

    async def start(self) -> None:
        """Load those that are to be loaded at the start, and unload idle ones from now on.

        Raises:
            ModelError: one cannot be loaded, or never fits.
            NoRoomError: one that has to be loaded does not fit beside the others.
        """
        self.check()
        for model in sorted(self, key=lambda model: model.settings.load != "start"):
            if model.settings.load == "start" or (model.settings.load == "fit" and self._lacking(model) <= 0):
                with contextlib.suppress(*() if model.settings.load == "start" else (NoRoomError,)):
                    await model.start()
        self._tender = asyncio.create_task(self._tend())

    async def stop(self) -> None:
        """End all processes."""
        self._ended.set()
        if self._tender is not None:  # it may be ending a process
            await asyncio.gather(self._tender, return_exceptions=True)
        await asyncio.gather(*(model.stop() for model in self.processes()))

    async def _tend(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(SlmopsError, OSError):
                await self.tend()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), TEND_S)

    async def tend(self) -> None:
        """Unload what has been idle for too long, end versions that have finished, and keep for each what it has been seen to take."""
        for model in self.processes():
            if model in self._leaving:
                if not model.busy and self._clock() - model.used >= self.grace:
                    self._leaving.remove(model)
                    await self._last(model)
            elif model.due and model not in self.trying:
                await model.unload()
            elif model.ready:
                model.reserved = max(model.reserved, memory.peak(model.pid))

    async def _last(self, model: Model) -> None:
        """End a version for good. Its memory counts until its process is gone."""
        self.trying.append(model)
        try:
            await model.stop()
        finally:
            self.trying.remove(model)

    def _bounded(self) -> int | None:
        if self.budget is None:
            self.budget = memory.budget()
        return self.budget

    def _lacking(self, model: Model) -> int:
        """Bytes that are missing to load a model; not above 0 where it fits."""
        need, others = self._reserve(model.settings), [one for one in self.processes() if one is not model]
        lacking = -1 << 62
        budget, free = self._bounded(), self._free()
        if budget is not None:
            lacking = need + sum(one.reserved for one in others) - budget
        if free is not None:  # others may still take what is reserved for them
            promised = sum(max(0, one.reserved - memory.resident(one.pid)) for one in others)
            lacking = max(lacking, need + promised - free)
        return lacking

    async def _admit(self, model: Model) -> None:
        """Reserve memory for a model that is about to be loaded, and unload idle ones where it needs their room.

        Raises:
            NoRoomError: there is not enough, even so.
        """
        async with self._admitting:
            # a version is not unloaded for another of the same model, nor while it has to show what it can
            name, held = model.settings.name, self.trying
            others = [one for one in self.processes() if one.idle and one not in held]
            idle = [one for one in others if one.settings.name != name or one in self._leaving]
            lacking = self._lacking(model)
            if lacking > sum(one.reserved for one in idle):
                need = self._reserve(model.settings)
                alone = self.budget is not None and need > self.budget
                raise NoRoomError(
                    f"there is no memory for the model {model.settings.name}: it takes up to {gigabytes(need)}, {gigabytes(lacking)} "
                    f"more than there is{'' if alone else ' beside the models that are in use'}",
                    "serve it with fewer rows or a shorter context, or give the server more memory" if alone else "ask again later",
                    retry_after=RETRY_S,
                )  # fmt: skip
            for one in sorted(idle, key=lambda one: one.used):
                if self._lacking(model) <= 0:
                    break
                if one.idle:  # else it may have begun to load, and wait for this to end
                    await one.unload()
            if self._lacking(model) > 0:  # somebody asked one of them in the meantime
                raise NoRoomError(
                    f"there is no memory for the model {model.settings.name} beside the models that are in use", "ask again later",
                    retry_after=RETRY_S,
                )  # fmt: skip
            model.reserved = self._reserve(model.settings)


def gigabytes(bytes_: float) -> str:
    """Bytes for people: `1.25 GB`, `80 MB`."""
    return f"{bytes_ / 1e9:.2f} GB" if bytes_ >= 1e9 else f"{bytes_ / 1e6:.0f} MB"


def _names(model: Model) -> list[str]:
    name = model.settings.name
    return [name, *(f"{name}{JOIN}{adapter}" for adapter in model.adapters)]


def _wearing(model: Model, adapter: str) -> Model | None:
    """A model with one of its adapters; None if it has not this one."""
    return cast(Model, Adapted(model, adapter)) if adapter in model.adapters else None

"""Another version of a served model: it takes over when it has answered canary prompts as it should, or is tried on real requests first.

A swap loads the new version beside the old one, asks it the canaries, and then new requests go to it, while answers that were begun
are finished by the old version's process, which then ends. Whatever goes wrong before leaves the old version as it was. A candidate
answers a share of the requests (the same askers always), or a copy of requests that the current version answers, and
`slmops.serve.pairs` compares the two.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import secrets
from collections.abc import Sequence
from contextvars import Context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from slmops.core.model import Value
from slmops.engines.gguf_tokenizer import tokenizer_of, tokenizer_place
from slmops.errors import DataError, ModelError, ResourceError, SlmopsError
from slmops.serve.model import Ask, Model, Piece, Settings
from slmops.serve.pairs import Answered, Pairs
from slmops.serve.pool import Pool, Slot

SHOWN = 10
"""Canaries that failed and are told of."""
SAME = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""What two versions share where one can be asked with the other's tokens."""


class CanaryError(ModelError):
    """A new version did not answer the canaries as it should. `failed`: number, wanted and got of the first ones that failed."""

    def __init__(self, message: str, hint: str, failed: list[dict[str, Any]]) -> None:
        super().__init__(message, hint)
        self.failed = failed


class ConflictError(ModelError):
    """This cannot be done to a model as it stands."""


class Turn(Value):
    """A message of a canary."""

    role: Literal["system", "user", "assistant"]
    content: str


class Canary(Value):
    """A prompt that a version has to answer before it takes over, greedily.

    Attributes:
        messages, prompt: one of them; `prompt` without the chat template.
        expect: what it has to say, apart from space around it; None: what the version before says.
        max_tokens: of the answer.
    """

    messages: Annotated[tuple[Turn, ...], Field(min_length=1)] | None = None
    prompt: Annotated[str, Field(min_length=1)] | None = None
    expect: str | None = None
    max_tokens: Annotated[int, Field(ge=1, le=4096)] = 64

    @model_validator(mode="after")
    def _one(self) -> Canary:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give messages or prompt")
        return self


def read_canaries(file: Path) -> list[Canary]:
    """The canaries of a JSONL file.

    Raises:
        DataError: it cannot be read, or a line is no canary.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"the canaries cannot be read: {error}", "give a file in UTF-8", file=str(file)) from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(Canary.model_validate_json(line))
            except ValidationError as error:
                said = error.errors(include_url=False)[0]["msg"]
                hint = 'a line is {"messages": […], "expect": "…"}; see docs/guides/serve.md'
                raise DataError(f"not a canary: {said}", hint, file=str(file), line=number) from None
    if not found:
        raise DataError("there is no canary in it", "give at least one prompt", file=str(file))
    return found


async def say(model: Model, canary: Canary) -> str:
    """The greedy answer to a canary."""
    if canary.messages is not None:
        prompt = await asyncio.to_thread(model.encode, [turn.model_dump() for turn in canary.messages])
    else:
        prompt = await asyncio.to_thread(model.tokenizer.ids, canary.prompt or "")
    return "".join([piece.text async for piece in model.answer(Ask(prompt, canary.max_tokens), watched=False)])


async def judge(new: Model, old: Model, canaries: Sequence[Canary], agreement: float) -> dict[str, Any]:
    """How a new version answers the canaries.

    Args:
        agreement: share of them that it has to answer as expected, or as the old version does.

    Raises:
        CanaryError: it does not reach that share.
        ResourceError: one of them could not be asked.
    """
    failed = []
    for number, canary in enumerate(canaries, 1):
        wanted = canary.expect if canary.expect is not None else await say(old, canary)
        try:
            got = await say(new, canary)
        except ResourceError:  # it could not be asked
            raise
        except SlmopsError as error:
            failed.append({"canary": number, "wanted": wanted, "error": error.message})
            continue
        if got.strip() != wanted.strip():
            failed.append({"canary": number, "wanted": wanted, "got": got})
    good = len(canaries) - len(failed)
    if good < agreement * len(canaries):
        raise CanaryError(
            f"the new version answered {good} of {len(canaries)} canaries as it should, and needs {agreement:.0%}",
            "the version before goes on", failed[:SHOWN],
        )  # fmt: skip
    return {"canaries": len(canaries), "passed": good}


def _slot(pool: Pool, name: str) -> Slot:
    slot = pool.slots.get(name)
    if slot is None:
        raise KeyError(name)
    if slot.changing:
        raise ConflictError(f"{name} is being changed already", "wait until that is over")
    return slot


def _canaries(slot: Slot, given: Sequence[Canary] | None) -> list[Canary]:
    if given:
        return list(given)
    file = slot.current.settings.canaries
    if file is None:
        raise ConflictError(
            f"{slot.current.settings.name} has no canaries", "give some, or serve it with a file of them"
        )
    return read_canaries(file)


async def _enter(pool: Pool, slot: Slot, model: Model, canaries: Sequence[Canary], agreement: float) -> dict[str, Any]:
    """Load a version and ask it the canaries; if it does not come through, it is ended."""
    pool.trying.append(model)
    try:
        await model.start()
        found = await judge(model, slot.current, canaries, agreement) if canaries else {}
    except BaseException:
        await model.stop()
        raise
    finally:
        pool.trying.remove(model)
    return found


async def swap(
    pool: Pool, name: str, settings: Settings, canaries: Sequence[Canary] | None = None, agreement: float = 1.0
) -> dict[str, Any]:
    """Let a new version take over.

    Args:
        settings: of the new version, under the same name.
        canaries: None: those of the model's settings.
        agreement: see `judge`.

    Raises:
        KeyError: there is no such model.
        ConflictError: it has no canaries, is being changed, or has a candidate.
        CanaryError: it does not answer them as it should.
        NoRoomError: there is no memory for both versions.
        ModelError: it cannot be loaded.
    """
    slot = _slot(pool, name)
    if slot.candidate is not None:
        raise ConflictError(f"{name} has a candidate", "promote it, or end it first")
    asked = _canaries(slot, canaries)
    slot.changing = True
    try:
        model = pool.make(settings, slot.count + 1)
        found = await _enter(pool, slot, model, asked, agreement)
        slot.count += 1
        pool.replace(name, model)
    finally:
        slot.changing = False
    return {"version": model.version, "before": slot.before_version, **found}


async def rollback(pool: Pool, name: str) -> dict[str, Any]:
    """Return to the version before: at once where its process is still there, else when it is loaded. A second time, forward again.

    Raises:
        KeyError: there is no such model.
        ConflictError: there was no other version, or it is being changed, or has a candidate.
        NoRoomError, ModelError: it cannot be loaded; the version that is there goes on.
    """
    slot = _slot(pool, name)
    if slot.before is None:
        raise ConflictError(f"{name} has had no other version", "swap one in first")
    if slot.candidate is not None:
        raise ConflictError(f"{name} has a candidate", "promote it, or end it first")
    slot.changing = True
    try:
        model = pool.back(name)
        if model is None:
            model = pool.make(slot.before, slot.before_version)
            await _enter(pool, slot, model, (), 1.0)
        pool.replace(name, model)
    finally:
        slot.changing = False
    return {"version": model.version, "before": slot.before_version}


@dataclass
class Candidate:
    """A version that is tried on real requests.

    Attributes:
        share: of the requests that it answers.
        shadow: of the others that it is asked too, to compare; its answers are thrown away.
    """

    model: Model
    share: float = 0.0
    shadow: float = 0.0
    pairs: Pairs = field(default_factory=Pairs)

    def __post_init__(self) -> None:
        self._random = random.Random(self.model.version)
        self._mirrors: set[asyncio.Task[None]] = set()

    def takes(self, who: str | None) -> bool:
        """Whether it answers a request of somebody."""
        if not self.share:
            return False
        asked = f"{self.model.settings.name}\0{self.model.version}\0{who if who is not None else secrets.token_hex(8)}"
        place = int.from_bytes(hashlib.sha256(asked.encode()).digest()[:8], "big") / 2**64
        return place < self.share

    def watch(self, current: Model) -> None:
        """See the answers of both versions from now on."""
        current.watch = self._current
        self.model.watch = lambda ask: _Seen(self, self.pairs.candidate, self.model)

    def _current(self, ask: Ask) -> _Seen:
        seen = _Seen(self, self.pairs.current, self.model)
        if self.shadow and self._random.random() < self.shadow:
            if len(self._mirrors) >= self.model.settings.rows:
                self.pairs.missed += 1
            else:
                seen.mirror = asyncio.create_task(self._mirror(ask, seen), context=Context())  # on nobody's account
                self._mirrors.add(seen.mirror)
                seen.mirror.add_done_callback(self._mirrors.discard)
        return seen

    async def _mirror(self, ask: Ask, seen: _Seen) -> None:
        """Ask the candidate the same, at the same time."""
        own = _Seen(self, None, self.model)
        try:
            async for piece in self.model.answer(ask, watched=False):
                own.add(piece)
        except SlmopsError:
            self.pairs.failed += 1
            return
        other = await seen.whole
        if other is not None and (answered := own.answered()) is not None:
            self.pairs.add(other, answered)

    async def end(self) -> None:
        """Watch no more."""
        for mirror in list(self._mirrors):
            mirror.cancel()
        await asyncio.gather(*self._mirrors, return_exceptions=True)


class _Seen:
    """An answer as it is written."""

    def __init__(self, candidate: Candidate, arm: Any, timed: Model) -> None:
        self._clock, self._arm = timed.clock, arm
        self._begun, self._first, self._last = timed.clock(), 0.0, 0.0
        self._pieces: list[Piece] = []
        self.mirror: asyncio.Task[None] | None = None
        self.whole: asyncio.Future[Answered | None] = asyncio.get_running_loop().create_future()

    def add(self, piece: Piece) -> None:
        """See `Watcher`."""
        now = self._clock() - self._begun
        self._first = self._first if self._pieces else now
        self._last = now
        self._pieces.append(piece)

    def answered(self) -> Answered | None:
        """The answer, if it is whole."""
        if not self._pieces or self._pieces[-1].finish is None:
            return None
        text = "".join(piece.text for piece in self._pieces)
        return Answered(text, sum(piece.tokens for piece in self._pieces), self._first, self._last)

    def end(self, failure: BaseException | None) -> None:
        """See `Watcher`."""
        found = self.answered()
        if not self.whole.done():
            self.whole.set_result(found)
        if found is not None:
            self._arm.answered += 1
        elif isinstance(failure, SlmopsError):
            self._arm.failed += 1
        else:
            self._arm.left += 1
        if found is None and self.mirror is not None:
            self.mirror.cancel()


async def try_out(
    pool: Pool, name: str, settings: Settings, share: float, shadow: float, canaries: Sequence[Canary] = (),
    agreement: float = 1.0,
) -> dict[str, Any]:  # fmt: skip
    """Try a version on real requests.

    Args:
        share, shadow: see `Candidate`.
        canaries: what it has to answer before; none: it only has to be loaded.

    Raises:
        KeyError, CanaryError, NoRoomError, ModelError: as `swap` does.
        ConflictError: the model has a candidate, is being changed, or the versions have other tokenizers and cannot be shadowed.
    """
    slot = _slot(pool, name)
    if slot.candidate is not None:
        raise ConflictError(f"{name} has a candidate", "promote it, or end it first")
    slot.changing = True
    try:
        if shadow and not await asyncio.to_thread(_same, slot.current.settings.folder, settings.folder):
            raise ConflictError(
                "the versions have other tokenizers or chat templates: requests cannot be copied",
                "give share in place of shadow",
            )
        model = pool.make(settings, slot.count + 1)
        found = await _enter(pool, slot, model, canaries, agreement)
        slot.count += 1
        slot.candidate = Candidate(model, share, shadow)
        slot.candidate.watch(slot.current)
    finally:
        slot.changing = False
    return {"version": model.version, "share": share, "shadow": shadow, **found}


def _same(one: Path, other: Path) -> bool:
    """Whether two models have the same tokens and template: the same files, or, where a GGUF file has them in itself, the same in use."""

    def read(folder: Path, name: str) -> bytes:
        return (folder / name).read_bytes() if (folder / name).is_file() else b""

    one, other = tokenizer_place(one), tokenizer_place(other)
    if not (one.is_file() or other.is_file()):
        return all(read(one, name) == read(other, name) for name in SAME)
    a, b = tokenizer_of(one, "serve"), tokenizer_of(other, "serve")
    return a.template == b.template and a.size == b.size and a.spellings() == b.spellings()


async def settle(
    pool: Pool, name: str, promote: bool, canaries: Sequence[Canary] | None = None, agreement: float = 1.0
) -> dict[str, Any]:
    """End the trial of a candidate: it takes over, if it answers the canaries, or it is ended. What was found is told.

    Raises:
        KeyError: there is no such model.
        ConflictError: it has no candidate, or no canaries, or is being changed.
        CanaryError: the candidate does not answer as it should; it stays a candidate.
    """
    slot = _slot(pool, name)
    candidate = slot.candidate
    if candidate is None:
        raise ConflictError(f"{name} has no candidate", "try a version out first")
    found: dict[str, Any] = {}
    slot.changing = True
    try:
        if promote:
            found = await judge(candidate.model, slot.current, _canaries(slot, canaries), agreement)
        await candidate.end()
        slot.candidate, slot.current.watch, candidate.model.watch = None, None, None
        if promote:
            pool.replace(name, candidate.model)
        else:
            pool.leave(candidate.model)
    finally:
        slot.changing = False
    return {"version": slot.current.version, **found, "report": await asyncio.to_thread(candidate.pairs.report)}

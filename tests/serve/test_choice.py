"""Which model a request goes to, and which make room for it, with models that have no process."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from slmops.errors import NoRoomError
from slmops.serve import record
from slmops.serve.app import application
from slmops.serve.gate import State
from slmops.serve.model import Settings
from slmops.serve.pool import Found, Pool, Slot
from slmops.serve.versions import Candidate


class Loaded:
    """Stands for a model that is loaded."""

    pid, full, ready, load_s, used = 0, False, True, 1.0, 0.0

    def __init__(self, name: str, version: int = 1, expected_s: float = 0.0) -> None:
        self.settings, self.version, self.expected_s = Settings(Path(), name), version, expected_s
        self.adapters: dict[str, Path] = {}
        self.idle, self.reserved = True, 10
        self.beside: list[Loaded] = []
        """Are in use from the moment when this one is unloaded."""

    async def unload(self) -> bool:
        assert self.idle, "who waits for it here waits for ever"
        self.idle, self.reserved = False, 0
        for other in self.beside:
            other.idle = False
        return True


def pool_of(*models: Any) -> Pool:
    pool = Pool(reserve=lambda settings: 20, free=lambda: None, budget=20)
    pool.slots = {model.settings.name: Slot(model) for model in models}
    return pool


def test_a_candidate_that_would_be_too_late_leaves_it_to_the_version_before() -> None:
    current: Any = Loaded("m")
    pool = pool_of(current)
    tried: Any = Loaded("m", 2, expected_s=2.0)
    pool.slots["m"].candidate = Candidate(tried, 1.0)
    assert asyncio.run(pool.pick("m", within=3.0)) is tried
    assert asyncio.run(pool.pick("m", within=1.0)) is current


def test_who_has_a_key_is_no_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """All requests with a key would go to one version."""
    model: Any = Loaded("m")
    pool = pool_of(model)
    application(pool, State())
    asked: list[str | None] = []

    async def pick(name: str, who: str | None = None, within: float | None = None) -> Any:
        asked.append(who)
        return model

    monkeypatch.setattr(pool, "pick", pick)
    token = record.enter(record.Record(key="desk"))
    try:
        assert asyncio.run(pool.choose("m")) == asyncio.run(pool.choose("m", "anna")) == Found(model)
    finally:
        record.leave(token)
    assert asked == [None, "anna"]


def test_room_is_not_waited_for_at_a_model_that_is_asked_in_the_meantime() -> None:
    a, b = Loaded("a"), Loaded("b")
    a.beside = [b]
    wanted: Any = Loaded("c")
    with pytest.raises(NoRoomError, match="in use"):
        asyncio.run(pool_of(a, b)._admit(wanted))
    a, b = Loaded("a"), Loaded("b")
    asyncio.run(pool_of(a, b)._admit(wanted))
    assert wanted.reserved == 20 and a.reserved == b.reserved == 0

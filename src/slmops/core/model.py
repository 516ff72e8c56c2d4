"""The base of all typed values that users write or that go to disk: frozen, strict, no unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Value(BaseModel):
    """A frozen value. Unknown keys and wrong types are errors; `1` is accepted where a float is wanted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

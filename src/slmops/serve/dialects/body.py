"""What the bodies of requests have in common, in all dialects.

Whatever is wrong with a body, what it takes to say so is bounded: one error of a list is enough, of fields that are not known one is looked
at, and a body with more errors than anybody reads gets their number.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

MOST_ENTRIES = 1 << 16
"""Of an object whose names are the client's own."""
MOST_ERRORS = 1000
"""That are written out."""
Item = TypeVar("Item")
Key = TypeVar("Key")
Entry = TypeVar("Entry")


def _few(data: Any) -> Any:
    if isinstance(data, dict) and len(data) > MOST_ENTRIES:
        raise PydanticCustomError("too_long", "it has more than {most} entries", {"most": MOST_ENTRIES})
    return data


Items = Annotated[list[Item], Field(fail_fast=True)]
"""A list that is read up to its first error."""
Entries = Annotated[dict[Key, Entry], BeforeValidator(_few)]
"""An object that is not read at all if it is too large."""
StopText = Annotated[str, Field(max_length=256)]
"""A text that ends an answer: looked for at each token."""


class Body(BaseModel):
    """An object of a request: no other fields than these, and null is as good as absent, as in the dialects' own servers."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {key: value for key, value in data.items() if value is not None}
        if len(given) > len(cls.model_fields):
            known = {field.alias or name for name, field in cls.model_fields.items()}
            odd = next(key for key in given if key not in known)
            given = {key: value for key, value in given.items() if key in known or key == odd}
        return given


def errors_of(failure: ValidationError) -> list[Any]:
    """What is wrong with a body, or how much where that is more than `MOST_ERRORS`."""
    count = failure.error_count()
    if count > MOST_ERRORS:
        return [{"type": "too_many", "loc": (), "msg": f"{count} things are wrong with it"}]
    return failure.errors(include_url=False, include_input=False)


ODD_WORDS = (b"NaN", b"Infinity")
ODD = (re.compile(rb"[eE]\+?[0-9]{3}"), re.compile(rb"(?<![0-9])[0-9]{300}"))
"""What a body has to have in it for a number that is not finite, looked for one by one: all in one pattern takes three times as long."""


def check_numbers(raw: bytes) -> None:
    """Refuse a body with a number that JSON cannot say again; whatever else is wrong with it is left to who reads it.

    Raises:
        ValueError: it has NaN, Infinity, or a number beyond what a float holds.
    """
    if not any(word in raw for word in ODD_WORDS) and not any(odd.search(raw) for odd in ODD):
        return
    found: list[str] = []

    def constant(text: str) -> NoReturn:
        found.append(text)
        raise ValueError

    def number(text: str) -> float:
        value = float(text)
        if value in (float("inf"), float("-inf")):
            constant(text)
        return value

    try:
        json.loads(raw, parse_constant=constant, parse_float=number)
    except (ValueError, RecursionError):
        if found:
            raise ValueError(f"{found[0][:20]} is no finite number") from None

"""Whether a JSON schema can be given to llguidance: each of its keywords has a value of the kind that JSON Schema gives it, and no number
ends the process that reads it.

What llguidance refuses it shows in part, and stops itself where it would cut a letter in two; to say where that was, it reads all debug
information of its process, which takes tens of megabytes that never come back. And where integers lie at the lower end of 64 bits it
calls itself until the stack is full, which ends the process. So neither gets there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from slmops.serve.scheduler import GrammarError


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _is_type(value: Any) -> bool:
    return isinstance(value, str) or _texts(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)  # also true, as draft 4 has it for exclusive bounds


KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "type": (_is_type, "a text or a list of texts"),
    "required": (_texts, "a list of texts"),
    **dict.fromkeys(("enum", "anyOf", "allOf", "oneOf", "prefixItems"), (lambda value: isinstance(value, list), "a list")),
    **dict.fromkeys(("properties", "patternProperties", "$defs", "definitions"), (lambda value: isinstance(value, dict), "an object")),
    **dict.fromkeys(("$ref", "pattern", "format"), (lambda value: isinstance(value, str), "a text")),
    **dict.fromkeys(
        ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minimum", "maximum", "exclusiveMinimum",
         "exclusiveMaximum", "multipleOf"), (_is_number, "a number"),
    ),
}  # fmt: skip
LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
OBJECTS = ("properties", "patternProperties", "$defs", "definitions")
ONE = ("items", "additionalItems", "additionalProperties", "not")
UPPER = ("maximum", "exclusiveMaximum", "const", "enum")
"""Say what a number is at most."""
LOWEST = -(2**62)


def _too_low(value: Any) -> bool:
    """Whether a number below `LOWEST` is in it."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, int | float) and one < LOWEST:
            return True
        left += one.values() if isinstance(one, Mapping) else one if isinstance(one, list) else ()
    return False


def check(schema: Any, place: str = "the schema") -> None:
    """Refuse what is no schema, or ends who reads it, and say where.

    Raises:
        GrammarError: something has the wrong kind, or is too low.
    """
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise GrammarError(f"{place} is no schema: neither an object nor true or false", "write one")
    for name, value in schema.items():
        if name in KINDS and not KINDS[name][0](value):
            raise GrammarError(f"{name} of {place} is not {KINDS[name][1]}", "write it as JSON Schema has it")
        if name in UPPER and _too_low(value):
            raise GrammarError(f"{name} of {place} is below {LOWEST}", "give a larger number, or leave it out")
        inside = {}
        if name in OBJECTS:
            inside = {f"{name}.{key}": one for key, one in value.items()}
        elif name in LISTS or (name == "items" and isinstance(value, list)):
            inside = {f"{name}.{number}": one for number, one in enumerate(value)}
        elif name in ONE:
            inside = {name: value}
        for key, one in inside.items():
            check(one, f"{place}.{key}"[-200:])

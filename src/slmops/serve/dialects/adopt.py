"""Definitions in OpenAI's dialect: what a definition says holds where a request says nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from slmops.serve.definitions import Definition
from slmops.serve.dialects.ollama_options import options_of

if TYPE_CHECKING:
    from slmops.serve.dialects.openai.types import Common

Kind = TypeVar("Kind", bound="Common")
NAMES = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty", "seed": "seed", "stop": "stop",
}  # fmt: skip
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def adopted(wanted: Kind, definition: Definition | None) -> Kind:
    """A request with the parameters of a definition.

    Raises:
        RequestError: the definition holds what is not served.
    """
    if definition is None:
        return wanted
    options = options_of(definition.parameters)
    said, how = options.model_fields_set, options.picking(None)
    update = {theirs: getattr(options, ours) for ours, theirs in NAMES.items() if ours in said}
    update |= {name: getattr(how, name) for name in ("top_k", "top_p", "seed") if name in said}
    if options.repeat_last_n == 0:
        update |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    fields = type(wanted).model_fields
    if "num_predict" in said and not wanted.model_fields_set.intersection(LENGTHS):
        length = next(name for name in LENGTHS if name in fields)
        update[length] = options.num_predict if options.num_predict > 0 else None
    kept = {name: value for name, value in update.items() if name in fields and name not in wanted.model_fields_set}
    return wanted.model_copy(update=kept)


def bounded(most: int | None, prompts: Sequence[list[int]], definition: Definition | None) -> int | None:
    """New tokens at most, by the context of a definition.

    Raises:
        RequestError: it has no room for a prompt and an answer.
    """
    if definition is None or definition.parameters.get("num_ctx") is None:
        return most
    options = options_of({"num_ctx": definition.parameters["num_ctx"], "num_predict": most or -1})
    return min((room for prompt in prompts if (room := options.most(prompt)) is not None), default=most)


def stops_of(definition: Definition | None) -> list[str]:
    """Texts that end an answer, for a route that has none of its own."""
    return options_of(definition.parameters).stop if definition else []

"""Calls of tools in Ollama's form: each is told whole, with its arguments as an object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from slmops.serve.saying import Saying
from slmops.serve.tools import Delta

Told = tuple[str, list[dict[str, Any]]]


class Calls:
    """Text and whole calls of one answer, from its pieces as they come: `add` each, then `rest`.

    A call that was cut off cannot be told as one: it comes as the text that there is of it.
    """

    def __init__(self, said: Saying) -> None:
        self._reader, self._format = said.reader(), said.format
        self._name = self._arguments = ""
        self._told = 0

    def add(self, text: str) -> Told:
        """What a piece adds."""
        return self._taken(self._reader.add(text)) if self._reader else (text, [])

    def rest(self) -> Told:
        """What was held back, when no more text comes."""
        text, calls = self._taken(self._reader.rest()) if self._reader else ("", [])
        more, last = self._closed()
        return text + more, calls + last

    def _taken(self, found: Sequence[Delta]) -> Told:
        text, calls = "", list[dict[str, Any]]()
        for one in found:
            if one.name or one.call is None:
                more, last = self._closed()
                text, calls = text + more, calls + last
            self._name = one.name or self._name
            self._arguments += one.arguments
            text += one.text
        return text, calls

    def _closed(self) -> Told:
        name, given = self._name, self._arguments
        self._name = self._arguments = ""
        if not name:
            return "", []
        try:
            arguments = json.loads(given or "{}")
        except (ValueError, RecursionError):
            return f'{{"name": {json.dumps(name)}, "arguments": {given}', []
        assert self._format is not None
        function = {"index": self._told, "name": name, "arguments": arguments}
        self._told += 1
        return "", [{"id": self._format.new_id(), "function": function}]

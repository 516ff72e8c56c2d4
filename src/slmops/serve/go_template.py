"""The common part of Go templates, in which Modelfiles and requests to Ollama write prompts.

Read are `{{ .System }}`, `{{ .Prompt }}`, `{{ .Response }}`, `{{ if .X }} … {{ else if .Y }} … {{ else }} … {{ end }}`, comments, and
the hyphens that trim white space. Everything else is refused by name, as a prompt that lacks a part would go unnoticed. There are no
loops: a conversation is written turn by turn, with one run of the template for each, and ends where the answer of the last belongs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slmops.serve.scheduler import RequestError

FIELDS = ("System", "Prompt", "Response")
GO = re.compile(r"\{\{-?\s*(?:\.|\$|/\*|(?:if|else|end|range|with|define|template|block|break|continue)\b)")

DEEPEST = 100
"""So many if may stand in each other, else if included."""
MOST = 1 << 20
"""Characters that a conversation may have, and each part of the template that is run counts as one."""


@dataclass(frozen=True)
class Text:
    """As it stands."""

    text: str


@dataclass(frozen=True)
class Field:
    """The place of a value."""

    name: str


@dataclass(frozen=True)
class If:
    """One of two parts, by whether a value is empty."""

    name: str
    then: tuple[Node, ...]
    other: tuple[Node, ...] = ()


Node = Text | Field | If


def is_go(text: str) -> bool:
    """Whether a template is Go's, and not Jinja."""
    return "{%" not in text and GO.search(text) is not None


class GoTemplate:
    """A template that was read.

    Raises:
        RequestError: it holds what is not read, is not closed, or has no place for the prompt.
    """

    def __init__(self, text: str) -> None:
        self._parts = _Parts(text)
        self._nodes = self._parts.block(())
        named = self._parts.named
        if "Prompt" not in named:
            raise RequestError("the template has no {{ .Prompt }}", "it is where the user's words go")
        if "Response" not in named:
            self._nodes = (*self._nodes, Field("Response"))
        self._named = named

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of a conversation, up to where its next answer begins.

        Args:
            messages: with `role` (system, user, assistant) and `content`.

        Raises:
            RequestError: a message has no place in the template, or it writes too much.
        """
        done: list[str] = []
        left = MOST
        turn = dict.fromkeys(FIELDS, "")

        def write(nodes: Sequence[Node]) -> None:
            nonlocal left
            for text in _run(nodes, turn):
                left -= len(text) + 1
                if left < 0:
                    raise RequestError(f"the template writes more than {MOST} characters", "shorten the conversation")
                done.append(text)

        def close() -> None:
            write(self._nodes)
            turn.update(dict.fromkeys(FIELDS, ""))

        for message in messages:
            role, content = message["role"], str(message["content"] or "")
            if message.get("tool_calls"):
                raise RequestError("the template has no place for calls of tools", "leave the template out")
            if role == "system":
                if turn["Prompt"] or turn["Response"]:
                    close()
                if content and "System" not in self._named:
                    raise RequestError(
                        "the template has no {{ .System }} for the system's text", "leave one of both out"
                    )
                turn["System"] = f"{turn['System']}\n\n{content}" if turn["System"] else content
            elif role == "user":
                if turn["Prompt"] or turn["Response"]:
                    close()
                turn["Prompt"] = content
            elif role == "assistant":
                if turn["Response"]:
                    close()
                turn["Response"] = content
            else:
                raise RequestError(f"the template has no place for a message of {role}", "leave the template out")
        write(_up_to_answer(self._nodes)[0])
        return "".join(done)


class _Parts:
    """Reads the parts of a template one after the other. `named`: the values that have a place of their own."""

    def __init__(self, text: str) -> None:
        self.named: set[str] = set()
        self._parts: list[tuple[bool, str]] = []
        place, trim = 0, False
        while (begin := text.find("{{", place)) >= 0:
            end = text.find("}}", begin + 2)
            if end < 0:
                raise RequestError("the template has a {{ without its }}", "close it")
            before, inner = text[place:begin], text[begin + 2 : end]
            before = before.lstrip() if trim else before
            trims = inner[:1] == "-" and inner[1:2].isspace()
            inner = inner[1:] if trims else inner
            trim = inner[-1:] == "-" and inner[-2:-1].isspace()
            inner = inner[:-1] if trim else inner
            self._parts.append((False, before.rstrip() if trims else before))
            self._parts.append((True, inner.strip()))
            place = end + 2
        rest = text[place:]
        self._parts.append((False, rest.lstrip() if trim else rest))
        self._deep = 0
        self._at = 0

    def block(self, ends: tuple[str, ...]) -> tuple[Node, ...]:
        """Nodes up to one of these words, which is left to the caller; () is the end of the text."""
        nodes: list[Node] = []
        while self._at < len(self._parts):
            is_action, text = self._parts[self._at]
            if not is_action:
                nodes += [Text(text)] if text else []
            elif text == "end" or text == "else" or text.startswith("else "):
                if text.split()[0] not in ends:
                    raise RequestError(f"the template has a {{{{ {text[:100]} }}}} without its if", "leave it out")
                return tuple(nodes)
            elif text.startswith("if "):
                self._at += 1
                nodes.append(self._if(text.removeprefix("if ")))
                continue
            elif not (text.startswith("/*") and text.endswith("*/")):
                name = _field(text, text)
                self.named.add(name)
                nodes.append(Field(name))
            self._at += 1
        if ends:
            raise RequestError("the template has an {{ if }} without its {{ end }}", "close it")
        return tuple(nodes)

    def _if(self, condition: str) -> If:
        self._deep += 1
        if self._deep > DEEPEST:
            raise RequestError(f"the template has more than {DEEPEST} if in each other", "nest fewer")
        made = self._open_if(condition)
        self._deep -= 1
        return made

    def _open_if(self, condition: str) -> If:
        name = _field(condition, f"if {condition}")
        then = self.block(("else", "end"))
        _, text = self._parts[self._at]
        self._at += 1
        if text == "end":
            return If(name, then)
        if text == "else":
            other = self.block(("end",))
            self._at += 1
            return If(name, then, other)
        further = text.removeprefix("else").strip()
        if not further.startswith("if "):
            raise _unread(text)
        return If(name, then, (self._if(further.removeprefix("if ")),))


def _field(text: str, whole: str) -> str:
    name = text.strip()
    if name[:1] != "." or name[1:] not in FIELDS:
        raise _unread(whole)
    return name[1:]


def _unread(action: str) -> RequestError:
    return RequestError(
        f"the template has {{{{ {action[:100]} }}}}, which is not read",
        "of Go templates .System, .Prompt, .Response and if … else … end are; a template in Jinja may have more",
    )


def _run(nodes: Sequence[Node], values: Mapping[str, str]) -> Iterator[str]:
    """A text for each node."""
    for node in nodes:
        if isinstance(node, Text):
            yield node.text
        elif isinstance(node, Field):
            yield values[node.name]
        else:
            yield ""
            yield from _run(node.then if values[node.name] else node.other, values)


def _up_to_answer(nodes: Sequence[Node]) -> tuple[tuple[Node, ...], bool]:
    """What stands before the answer and the answer, and whether it is there."""
    kept: list[Node] = []
    for node in nodes:
        if isinstance(node, If):
            then, found = _up_to_answer(node.then)
            other, also = _up_to_answer(node.other)
            kept.append(If(node.name, then, other))
            found = found or also
        else:
            kept.append(node)
            found = node == Field("Response")
        if found:
            return tuple(kept), True
    return tuple(kept), False

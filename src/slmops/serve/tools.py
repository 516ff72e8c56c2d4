"""Calls of tools in what a model says, for every dialect: found in its text as it comes, and asked for by a grammar.

Which form a model calls in is read off its chat template (`format_of`): Hermes and Qwen, Mistral, Llama 3, or plain JSON. One place knows
the forms; a `Reader` finds the calls of an answer, a `grammar` leaves it no other way than to call.

Law: what a reader tells is the same however the text is cut, deltas of one kind joined; a text without a call comes through as it is.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slmops.engines.plain_tokenizer import PlainTokenizer
from slmops.serve.grammar import OBJECT, VALUES, json_rule, literal
from slmops.serve.scheduler import RequestError

HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
"""A call up to its arguments, in the order in which models write it."""
ANY_TEXT = r"/(.|\n)*/"


@dataclass(frozen=True)
class Tool:
    """A function that an answer may call. `parameters`: the JSON schema of its arguments; `strict`: they shall hold to it in any case."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    def told(self) -> dict[str, Any]:
        """For the chat template."""
        function: dict[str, Any] = {"name": self.name}
        if self.description:
            function["description"] = self.description
        function["parameters"] = self.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}

    def schema(self, loose: bool = False) -> Mapping[str, Any]:
        """Of its arguments, for a grammar. `loose`: any object, unless it is strict."""
        if loose and not self.strict:
            return OBJECT
        return self.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class Delta:
    """What a piece of an answer adds: `text`, or to its `call` of this number a `name`, which comes first and once, or `arguments`."""

    text: str = ""
    call: int | None = None
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True)
class Format:
    """How a model writes calls.

    Attributes:
        begin: what comes before calls; "": an answer is a call if it begins with one.
        end: what comes after each.
        key: what it calls the arguments.
        many: whether there can be several in an answer.
        array: whether calls stand in a list.
        may: what may come before a call, instead of `begin`.
    """

    name: str
    begin: str = ""
    end: str = ""
    key: str = "arguments"
    many: bool = True
    array: bool = False
    may: str = ""
    short_ids: bool = False

    def special(self, tokenizer: PlainTokenizer) -> dict[str, int]:
        """Its marks that are special tokens: whoever makes text of an answer has to show them."""
        ids = {mark: tokenizer.id_of(mark) for mark in (self.begin, self.end, self.may) if mark}
        return {mark: id for mark, id in ids.items() if id is not None and tokenizer.special(id)}

    def new_id(self) -> str:
        """A call's name for the result that answers it."""
        if self.short_ids:
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"

    def grammar(self, tools: Sequence[Tool], special: Mapping[str, int], *, many: bool) -> str:
        """An answer that is nothing but calls of these tools, one or `many`, each with arguments that hold to their schema."""
        return f"start: calls\n{self._calls(tools, special, many, loose=False)}"

    def grammar_or_text(
        self, tools: Sequence[Tool], special: Mapping[str, int], *, many: bool, text: Mapping[str, Any] | bool | None
    ) -> str:
        """An answer that may call tools, or be text.

        Args:
            text: JSON of this schema is the text; None: anything, also before calls.
        """
        if text is not None and not self.begin:
            return f"start: {json_rule(self._or_text(tools, text))}"
        calls = self._calls(tools, special, many, loose=True)
        if text is not None:
            return f"start: calls | text\ntext: {json_rule(text)}\n{calls}"
        if not self.begin:
            return f"start: calls | NONE\nNONE: /([^{{\\[](.|\\n)*)?/\n{calls}"
        if self.begin in special:
            return f"start: TEXT calls? \nTEXT: {ANY_TEXT}\n{calls}"
        rest = "" if self.array else f"({literal(self._gap)} {literal(self.begin)} rest)*"
        body = f"start: (mark rest {rest if many else ''})? TEXT\nmark[lazy]: TEXT {literal(self.begin)}\nTEXT: {ANY_TEXT}\n"
        return body + self._calls(tools, special, many, loose=True, begun=True)

    def _or_text(self, tools: Sequence[Tool], text: Mapping[str, Any] | bool) -> dict[str, Any]:
        """A call and JSON of a schema as one schema, as both begin alike."""
        parts = [tool.schema(loose=True) for tool in tools] + [text]
        defs = {f"p{number}": _moved(part, f"#/$defs/p{number}") for number, part in enumerate(parts)}
        some: list[dict[str, Any]] = [{"$ref": f"#/$defs/p{len(tools)}"}]
        for number, tool in enumerate(tools):
            both = {"name": {"const": tool.name}, self.key: {"$ref": f"#/$defs/p{number}"}}
            some.append({"type": "object", "properties": both, "required": list(both), "additionalProperties": False})
        return {"anyOf": some, "$defs": defs}

    @property
    def _gap(self) -> str:
        return "\n" if self.end else "; "

    def _mark(self, mark: str, special: Mapping[str, int]) -> str:
        return f"<[{special[mark]}]>" if mark in special else literal(mark)

    def _calls(
        self, tools: Sequence[Tool], special: Mapping[str, int], many: bool, loose: bool, begun: bool = False
    ) -> str:
        """The rules `calls`, or `rest` of one whose beginning was there, and what they need."""
        lines, many = [], many and self.many
        for number, tool in enumerate(tools):
            before = f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "{self.key}": '
            lines.append(f'c{number}: {literal(before)} a{number} "}}"\na{number}: {json_rule(tool.schema(loose))}')
        lines.append("one: " + " | ".join(f"c{number}" for number in range(len(tools))))
        begin = self._mark(self.begin, special) if self.begin else ""
        if self.array:
            body = f'" "? "[" one{" (/, ?/ one)*" if many else ""} "]"'
            return "\n".join([f"rest: {body}" if begun else f"calls: {begin} {body}", *lines])
        after = f'"\\n" {self._mark(self.end, special)}' if self.end else ""
        space = '"\\n"' if self.end else ""
        lines.append(f"rest: {space} one {after}")
        if not begun:
            more = f" ({literal(self._gap)} {begin} rest)*" if many else ""
            lines.append(f"calls: {begin} rest{more}")
        return "\n".join(lines)


HERMES = Format("hermes", "<tool_call>", "</tool_call>")
MISTRAL = Format("mistral", "[TOOL_CALLS]", array=True, short_ids=True)
LLAMA = Format("llama", key="parameters", many=False, may="<|python_tag|>")
PLAIN = Format("plain", many=False)


def format_of(template: str) -> Format:
    """How a model with this chat template writes calls.

    Raises:
        RequestError: its template has no tools, or has them in a form that is not known.
    """
    if "tools" not in template:
        raise RequestError(
            "the chat template of this model has no tools", "serve a model that was trained to call tools"
        )
    if "<function=" in template or "[ARGS]" in template:
        raise RequestError("this model writes calls of tools in a form that is not known", "serve another model")
    if "<tool_call>" in template:
        return HERMES
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    return LLAMA if "parameters" in template and "ipython" in template else PLAIN


def _moved(schema: Any, place: str) -> Any:
    """A schema that stands at another place of a larger one: its references into itself."""
    if isinstance(schema, Mapping):
        found = {key: value if key in VALUES else _moved(value, place) for key, value in schema.items()}
        if isinstance(reference := found.get("$ref"), str) and reference.startswith("#"):
            found["$ref"] = place + reference[1:]
        return found
    return [_moved(value, place) for value in schema] if isinstance(schema, list) else schema


@dataclass
class _Scan:
    """Where a JSON value ends that begins with a bracket."""

    depth: int = 0
    quoted: bool = False
    escaped: bool = False

    def end(self, text: str) -> int | None:
        """The place after its last character, None if that is not there; the next text goes on where this one ends."""
        for place, letter in enumerate(text):
            if self.quoted:
                if self.escaped:
                    self.escaped = False
                elif letter == "\\":
                    self.escaped = True
                elif letter == '"':
                    self.quoted = False
            elif letter == '"':
                self.quoted = True
            elif letter in "{[":
                self.depth += 1
            elif letter in "}]":
                self.depth -= 1
                if not self.depth:
                    return place + 1
        return None


@dataclass
class Reader:
    """Finds calls in the text of one answer as it comes: `add` each piece, then `rest`.

    Args:
        format: how they are written.
        names: of the tools. What looks like a call of another one is text.
        most: calls; what follows the last one is left out. None: as many as come.
    """

    format: Format
    names: Collection[str]
    most: int | None = None
    calls: int = 0
    _held: str = ""
    _raw: str = ""
    _state: str = "start"
    _scan: _Scan = field(default_factory=_Scan)

    @property
    def full(self) -> bool:
        """Whether no more can come."""
        return self.most is not None and self.calls >= self.most and self._state not in ("head", "arguments")

    def add(self, text: str) -> list[Delta]:
        """What this piece adds."""
        self._held += text
        found: list[Delta] = []
        while (step := getattr(self, f"_{self._state}")()) is not None:
            found += step
        return _joined(found)

    def rest(self) -> list[Delta]:
        """What was held back, when no more text comes."""
        if self._state in ("start", "text", "free", "head") and not self.full:
            text = self._raw + self._held
            self._held = self._raw = ""
            if self.calls and not text.strip():
                return []
            return [Delta(text)] if text else []
        return []

    # Each state takes what it can from the held text and tells what it found; None: it needs more.

    def _start(self) -> list[Delta] | None:
        form = self.format
        if form.begin:
            self._state = "text"
            return []
        text = self._held.lstrip()
        if not text or (form.may and form.may.startswith(text) and len(text) < len(form.may)):
            return None
        if form.may and text.startswith(form.may):
            place = self._held.index(form.may) + len(form.may)
            self._raw, self._held, self._state = self._held[:place], self._held[place:], "head"
        else:
            self._state = "head" if text[0] in "{[" else "free"
        return []

    def _free(self) -> list[Delta] | None:
        text, self._held = self._held, ""
        return [Delta(text)] if text else None

    def _text(self) -> list[Delta] | None:
        begin = self.format.begin
        place = self._held.find(begin)
        if place >= 0:
            text = self._held[:place].rstrip()
            self._raw = self._held[len(text) : place] + begin
            self._held, self._state = self._held[place + len(begin) :], "head"
            return [Delta(text)] if text else []
        # white space is held back: before a call it goes with it
        keep = next(
            (n for n in range(min(len(begin) - 1, len(self._held)), 0, -1) if self._held.endswith(begin[:n])), 0
        )
        text = self._held[: len(self._held) - keep].rstrip()
        self._held = self._held[len(text) :]
        return [Delta(text)] if text else None

    def _head(self) -> list[Delta] | None:
        text = self._held.lstrip()
        if self.format.array or not self.format.end:
            text = text.removeprefix("[").removeprefix(",").lstrip() if not self.calls else text.lstrip("[,; \n")
        if not text:
            return None
        if text[0] != "{":
            return self._no_call()
        match = HEAD.match(text)
        if match:
            try:
                name = json.loads(match[1])
            except ValueError:  # an escape that JSON has not
                return self._no_call()
            if name not in self.names:
                return self._no_call()
            self._raw, self._held, self._state, self._scan = "", text[match.end() :], "arguments", _Scan()
            self.calls += 1
            return [Delta(call=self.calls - 1, name=name)]
        end = _Scan().end(text)
        if end is None:
            return None
        try:
            made = json.loads(text[:end])
        except (ValueError, RecursionError):
            return self._no_call()
        given, name = made.get("arguments", made.get("parameters", {})), made.get("name")
        if not isinstance(name, str) or name not in self.names or not isinstance(given, dict | str):
            return self._no_call()
        self._raw, self._held, self._state, self._scan = "", text[end - 1 :], "tail", _Scan(1)
        self.calls += 1
        said = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        return [Delta(call=self.calls - 1, name=name), Delta(call=self.calls - 1, arguments=said)]

    def _no_call(self) -> list[Delta]:
        text = self._raw
        self._raw, self._state = "", "text" if self.format.begin else "free"
        return [Delta(text)] if text else []

    def _arguments(self) -> list[Delta] | None:
        if not self._held:
            return None
        end = self._scan.end(self._held)
        text = self._held[:end]
        self._held = self._held[len(text) :]
        if end is not None:
            self._state, self._scan = "tail", _Scan(1)
        return [Delta(call=self.calls - 1, arguments=text)]

    def _tail(self) -> list[Delta] | None:
        """What is left of the object."""
        end = self._scan.end(self._held)
        self._held = "" if end is None else self._held[end:]
        if end is None:
            return None
        self._state = "between"
        return []

    def _between(self) -> list[Delta] | None:
        """After a call: its mark of an end, the next call, or text."""
        if self.full:
            self._held = ""
            return None
        text, end = self._held.lstrip(), self.format.end
        if not text or (end and end.startswith(text) and len(text) < len(end)):
            return None
        if end and text.startswith(end):
            self._held, self._state = text[len(end) :], "text"
        elif not end and text[0] in ",;":
            self._held, self._state = text[1:], "head"
        elif not end and text[0] == "]":
            self._held = text[1:]
        else:
            self._state = "text" if self.format.begin else "free"
        return []


def _joined(found: Sequence[Delta]) -> list[Delta]:
    """Texts next to each other as one."""
    made: list[Delta] = []
    for delta in found:
        last = made[-1] if made else None
        if last and not delta.name and not last.name and last.call == delta.call:
            made[-1] = Delta(last.text + delta.text, last.call, "", last.arguments + delta.arguments)
        else:
            made.append(delta)
    return made


def called(found: Sequence[Delta]) -> list[tuple[str, str]]:
    """Name and arguments of each call."""
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for one in found:
        if one.call is not None:
            names[one.call] = one.name or names[one.call]
            arguments[one.call] = arguments.get(one.call, "") + one.arguments
    return [(names[call], arguments[call]) for call in names]


def turns(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages for the chat template: the arguments of calls as the objects that templates expect, not as texts.

    Raises:
        RequestError: the arguments of a call are no JSON object.
    """
    made = []
    for message in messages:
        turn = dict(message)
        if turn.get("tool_calls"):
            turn["tool_calls"] = [_call_turn(call) for call in turn["tool_calls"]]
        made.append(turn)
    return made


def _call_turn(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if isinstance(function["arguments"], str):
        try:
            function["arguments"] = json.loads(function["arguments"] or "{}")
        except (ValueError, RecursionError):
            function["arguments"] = None
    if not isinstance(function["arguments"], dict):
        raise RequestError(
            f"the arguments of the call of {function['name']} are no JSON object", "send them as they came"
        )
    return {**call, "function": function}

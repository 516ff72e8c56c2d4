'''Modelfiles, as people write them for Ollama: lines like `FROM desk`, `SYSTEM """…"""`, `PARAMETER temperature 0.2`.

Laws: `parse(write(file))` is the file again. Nothing is skipped: a line that is not known is an error with its number.
A text cannot hold three double quotes in a row, as the form has no way to write them.
'''

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from slmops.serve.scheduler import RequestError

WORDS = ("from", "parameter", "template", "system", "adapter", "license", "message")
ROLES = ("system", "user", "assistant")
QUOTES = '"""'
LONGEST = 256 << 10
"""Characters of a Modelfile."""


@dataclass(frozen=True)
class Modelfile:
    """What a Modelfile says. Texts are "" where it does not say them.

    Attributes:
        parameters: name and value as they stand, in order; `stop` may come more than once.
        messages: role and content, in order.
    """

    base: str
    parameters: tuple[tuple[str, str], ...] = ()
    template: str = ""
    system: str = ""
    adapters: tuple[str, ...] = ()
    licenses: tuple[str, ...] = ()
    messages: tuple[tuple[str, str], ...] = ()


def parse(text: str) -> Modelfile:
    """Read a Modelfile.

    Raises:
        RequestError: a line cannot be read, there is no FROM, or it is too long.
    """
    if len(text) > LONGEST:
        raise RequestError(f"the Modelfile has {len(text)} characters, more than {LONGEST}", "shorten it")
    once: dict[str, str] = {}
    parameters: list[tuple[str, str]] = []
    messages: list[tuple[str, str]] = []
    adapters: list[str] = []
    licenses: list[str] = []
    place, counted, line = 0, 0, 1
    while True:
        place = _next(text, place)
        if place == len(text):
            break
        line, counted = line + text.count("\n", counted, place), place
        found = re.compile(r"\S+").match(text, place)
        assert found is not None
        word, place = found[0].lower(), found.end()
        if word not in WORDS:
            close = difflib.get_close_matches(word, WORDS, n=1)
            raise _wrong(
                line,
                f"{found[0][:100]} is no word of a Modelfile",
                f"did you mean {close[0].upper()}?" if close else "",
            )
        first = ""
        if word in ("parameter", "message"):
            name = re.compile(r"[^\S\n]+(\S+)").match(text, place)
            if name is None:
                raise _wrong(line, f"{word.upper()} has no name" if word == "parameter" else "MESSAGE has no role")
            first, place = name[1].lower(), name.end()
        value, place = _value(text, place, line)
        if not value and word not in ("system", "message"):
            raise _wrong(line, f"{word.upper()} {first[:100]}".strip() + " has no value")
        if word == "parameter":
            parameters.append((first, value))
        elif word == "message":
            if first not in ROLES:
                raise _wrong(line, f"{first[:100]} is no role of a message", f"there are {', '.join(ROLES)}")
            messages.append((first, value))
        elif word == "adapter":
            adapters.append(value)
        elif word == "license":
            licenses.append(value)
        elif word == "from" and "from" in once:
            raise _wrong(line, "FROM stands twice")
        else:
            once[word] = value  # of several, the last holds
    if "from" not in once:
        raise RequestError("the Modelfile has no FROM", "begin with FROM and the name of a served model")
    return Modelfile(
        once["from"], tuple(parameters), once.get("template", ""), once.get("system", ""), tuple(adapters), tuple(licenses),
        tuple(messages),
    )  # fmt: skip


def write(file: Modelfile) -> str:
    """The text of a Modelfile."""
    lines = [f"FROM {_written(file.base)}"]
    if file.template:
        lines.append(f"TEMPLATE {_quoted(file.template)}")
    if file.system:
        lines.append(f"SYSTEM {_quoted(file.system)}")
    lines += [f"ADAPTER {_written(adapter)}" for adapter in file.adapters]
    lines += [f"PARAMETER {name} {_written(value)}" for name, value in file.parameters]
    lines += [f"MESSAGE {role} {_quoted(content)}" for role, content in file.messages]
    lines += [f"LICENSE {_quoted(text)}" for text in file.licenses]
    return "\n".join(lines) + "\n"


def _wrong(line: int, message: str, hint: str = "") -> RequestError:
    return RequestError(f"line {line} of the Modelfile: {message}", hint)


def _next(text: str, place: int) -> int:
    """The place of the next word that is no comment."""
    found = re.compile(r"(?:\s+|#[^\n]*)*").match(text, place)
    return found.end() if found else place


def _value(text: str, place: int, line: int) -> tuple[str, int]:
    """A value and the place after it: in three quotes over lines, in one pair of quotes, or the rest of the line."""
    while text[place : place + 1] in (" ", "\t"):
        place += 1
    if text.startswith(QUOTES, place):
        end = text.find(QUOTES, place + 3)
        if end < 0:
            raise _wrong(line, 'the text that begins with """ has no end')
        while text.startswith('"', end + 3):  # the text itself ends with a quote
            end += 1
        return text[place + 3 : end], _line_end(text, end + 3, line)
    end = text.find("\n", place)
    whole = text[place : len(text) if end < 0 else end].strip()
    place = len(text) if end < 0 else end
    if whole.startswith('"'):
        if len(whole) < 2 or not whole.endswith('"'):
            raise _wrong(line, 'the text that begins with " has no end on its line')
        whole = whole[1:-1]
    return whole, place


def _line_end(text: str, place: int, line: int) -> int:
    end = text.find("\n", place)
    end = len(text) if end < 0 else end
    if text[place:end].strip():
        raise _wrong(line, f'{text[place:end].strip()[:100]} stands after the text in """')
    return end


def _quoted(text: str) -> str:
    return f"{QUOTES}{text}{QUOTES}"


def _written(value: str) -> str:
    """Plain where that reads back as the same."""
    plain = value == value.strip() and value and not value.startswith('"') and "\n" not in value
    return value if plain else _quoted(value)

"""What Ollama's API takes and tells: bodies, errors, lines of a stream, times."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from slmops.errors import SlmopsError
from slmops.serve.definitions import UnknownError
from slmops.serve.dialects.body import Body, Entries, Items, check_numbers, errors_of
from slmops.serve.grammar import OBJECT
from slmops.serve.model import Piece
from slmops.serve.refusals import PATIENCE_S, patience_of, status_of
from slmops.serve.scheduler import RequestError
from slmops.serve.tools import Tool

UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
LONGEST_TIME = 32
"""Characters of a text that says how long."""
FOREVER = "9999-12-31T23:59:59Z"
Kind = TypeVar("Kind", bound=BaseModel)


class Named(Body):
    """A request about a model. `name` is the field's old name."""

    model: str = ""
    name: str = ""

    @property
    def wanted(self) -> str:
        """The name.

        Raises:
            RequestError: there is none.
        """
        if not (self.model or self.name):
            raise RequestError("model is required")
        return self.model or self.name


class FunctionOfCall(Body):
    """What a call calls."""

    name: str
    arguments: dict[str, Any] | str = Field(default_factory=dict)
    index: int | None = None


class Call(Body):
    """A call of a tool that the model made before."""

    function: FunctionOfCall
    id: str = ""
    type: Literal["function"] = "function"


class Turn(Body):
    """A message."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str = ""
    images: list[Any] = Field(default_factory=list)
    tool_calls: Items[Call] = Field(default_factory=list)
    tool_name: str = ""
    tool_call_id: str = ""

    def plain(self) -> dict[str, Any]:
        """For a template.

        Raises:
            RequestError: it holds what is not served.
        """
        if self.images:
            raise RequestError("images are not served", "send text alone")
        if self.thinking:
            raise RequestError("thinking is not served", "leave it out of the messages")
        if self.tool_calls and self.role != "assistant":
            raise RequestError("only an assistant calls tools", "leave tool_calls out of the message")
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            turn["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": call.function.arguments}}
                for call in self.tool_calls
            ]  # fmt: skip
        if self.role == "tool":
            turn |= {"name": self.tool_name} if self.tool_name else {}
            turn |= {"tool_call_id": self.tool_call_id} if self.tool_call_id else {}
        return turn


class Function(Body):
    """A function that may be called. `strict` is OpenAI's and means the same: clients of both dialects send it here too."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool = False


class ToolOf(Body):
    """A tool."""

    type: Literal["function"] = "function"
    function: Function

    def tool(self) -> Tool:
        """See `slmops.serve.tools`."""
        return Tool(self.function.name, self.function.description, self.function.parameters, self.function.strict)


class Asked(Named):
    """What requests for an answer have."""

    stream: bool = True
    options: dict[str, Any] = Field(default_factory=dict)
    format: str | dict[str, Any] = ""
    keep_alive: float | str | None = None
    think: bool | str | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    truncate: bool | None = None
    shift: bool | None = None

    def check(self) -> None:
        """Refuse what cannot be had.

        Raises:
            RequestError: it says which.
        """
        if self.truncate or self.shift:
            name = "truncate" if self.truncate else "shift"
            raise RequestError(
                f"{name} is not served: a prompt is never cut", f"leave {name} out and shorten the prompt"
            )
        if isinstance(self.format, str) and self.format not in ("", "json"):
            raise RequestError(f"the format {self.format[:100]} is not known", "give json or a JSON schema")
        seconds_of(self.keep_alive)

    @property
    def schema_of(self) -> dict[str, Any] | None:
        """Of the answer; None: any text."""
        return (OBJECT if self.format == "json" else None) if isinstance(self.format, str) else self.format

    @property
    def told(self) -> int | None:
        """How many log probabilities are told with each token; None: none at all."""
        return self.top_logprobs if self.logprobs or self.top_logprobs else None


class Generate(Asked):
    """`/api/generate`."""

    prompt: str = ""
    suffix: str = ""
    system: str = ""
    template: str = ""
    context: Items[int] | None = None
    raw: bool = False
    images: list[Any] = Field(default_factory=list)

    def check(self) -> None:
        """See `Asked`."""
        super().check()
        if self.images:
            raise RequestError("images are not served", "send text alone")
        if self.suffix:
            raise RequestError("suffix is not served: the model writes only at the end", "leave it out")
        if self.raw and (self.template or self.system or self.context):
            raise RequestError("raw mode does not support template, system, or context")


class Chat(Asked):
    """`/api/chat`."""

    messages: Items[Turn] = Field(default_factory=list)
    tools: Annotated[Items[ToolOf], Field(max_length=128)] = Field(default_factory=list)


class Embed(Named):
    """`/api/embed`."""

    input: str | Items[str] = Field(default_factory=list)
    truncate: bool | None = None
    dimensions: Annotated[int, Field(ge=0)] = 0
    options: dict[str, Any] = Field(default_factory=dict)
    keep_alive: float | str | None = None


class Embedding(Named):
    """`/api/embeddings`, the older form."""

    prompt: str = ""
    options: dict[str, Any] = Field(default_factory=dict)
    keep_alive: float | str | None = None


class Show(Named):
    """`/api/show`."""

    verbose: bool = False


class Create(Named):
    """`/api/create`, as JSON or with a whole Modelfile."""

    modelfile: str = ""
    base: Annotated[str, Field(alias="from")] = ""
    template: str = ""
    system: str = ""
    license: str | Items[str] = Field(default_factory=list)
    parameters: dict[str, Any] = Field(default_factory=dict)
    messages: Items[Turn] = Field(default_factory=list)
    adapters: Entries[str, str] = Field(default_factory=dict)
    files: Entries[str, str] = Field(default_factory=dict)
    path: str = ""
    quantize: str = ""
    quantization: str = ""
    stream: bool = True


class Copy(Body):
    """`/api/copy`."""

    source: str
    destination: str


async def parsed(request: Request, kind: type[Kind]) -> Kind:
    """The body of a request, whatever its content type.

    Raises:
        RequestError: it says what is wrong with it.
    """
    raw = await request.body()
    if not raw:
        raise RequestError("missing request body")
    try:
        check_numbers(raw)
    except ValueError as failure:
        raise RequestError(f"the body is not JSON: {failure}") from failure
    try:
        return kind.model_validate_json(raw)
    except ValidationError as failure:
        first = errors_of(failure)[0]
        place = ".".join(str(part) for part in first["loc"])
        if first["type"] == "json_invalid":
            raise RequestError(f"the body is not JSON: {first['msg']}") from failure
        if first["type"] == "extra_forbidden":
            raise RequestError(f"{place} is not known or not served", "leave it out") from failure
        raise RequestError(f"{place or 'the body'}: {first['msg']}") from failure


def refuse(status: int, message: str, *_: Any, retry_after: float | None = None, **__: Any) -> Response:
    """An error in Ollama's shape."""
    headers = {"Retry-After": str(math.ceil(retry_after or PATIENCE_S))} if status in (429, 503, 507) else None
    return JSONResponse({"error": message}, status, headers=headers)


def said(failure: SlmopsError) -> str:
    """An error in a sentence."""
    return f"{failure.message} ({failure.hint})" if failure.hint else failure.message


def of(failure: SlmopsError) -> Response:
    """An error of slmops in Ollama's shape."""
    if isinstance(failure, UnknownError):
        return refuse(404, said(failure))
    return refuse(status_of(failure), said(failure), retry_after=patience_of(failure))


def seconds_of(text: float | str | None) -> float | None:
    """How long a model is to be kept: seconds, `5m`, `1h30m`; a negative one is for ever, as None is here.

    Raises:
        RequestError: it is no time.
    """
    if text is None:
        return None
    if isinstance(text, str) and len(text) > LONGEST_TIME:
        raise RequestError(f"keep_alive: {text[:LONGEST_TIME]}… is no time", "give seconds, or a text like 5m")
    try:
        value = float(text)
        if math.isnan(value):
            raise RequestError(f"keep_alive: {text} is no time")
    except ValueError:
        found = re.fullmatch(r"([+-]?)((?:(?:\d+\.?\d*|\.\d+)(?:ns|us|µs|μs|ms|s|m|h))+)", str(text))
        if not found:
            raise RequestError(f"keep_alive: {str(text)[:100]} is no time", "give seconds, or a text like 5m") from None
        parts = re.findall(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)", found[2])
        value = sum(float(number) * UNITS[unit] for number, unit in parts) * (-1 if found[1] == "-" else 1)
    return None if value < 0 or math.isinf(value) else value


def stamp(seconds: float | None = None) -> str:
    """A time as RFC 3339 has it, in UTC. None: now."""
    at = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return at.isoformat(timespec="microseconds").replace("+00:00", "Z")


def line(body: dict[str, Any]) -> str:
    """A line of a stream."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")) + "\n"


@dataclass
class Clock:
    """What an answer took, in ns: measured at the server, so waiting for a row belongs to the prompt's part.

    Attributes:
        began: when the request came.
        loading: what it took until its model was there.
        asked: when the model got the prompt.
        first, last: when the first and the last token came.
    """

    began: int = field(default_factory=time.perf_counter_ns)
    loading: int = 0
    asked: int = 0
    first: int = 0
    last: int = 0

    def token(self) -> None:
        """One came."""
        self.last = time.perf_counter_ns()
        self.first = self.first or self.last

    def told(self, prompt: int, written: int) -> dict[str, int]:
        """Durations and counts."""
        return {
            "total_duration": time.perf_counter_ns() - self.began, "load_duration": self.loading,
            "prompt_eval_count": prompt, "prompt_eval_duration": self.first - self.asked,
            "eval_count": written, "eval_duration": self.last - self.first,
        }  # fmt: skip


def likely(pieces: Sequence[Piece], name: Any) -> list[dict[str, Any]]:
    """Log probabilities of tokens. `name`: gives the text of a token."""

    def one(token: int, value: float | None) -> dict[str, Any]:
        text = name(token)
        return {"token": text, "logprob": value, "bytes": None if "\ufffd" in text else list(text.encode())}

    rows = []
    for piece in pieces:
        row = one(piece.token, piece.logprob)
        if piece.likely:
            row["top_logprobs"] = [one(token, value) for token, value in piece.likely]
        rows.append(row)
    return rows

"""What clients send, field by field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from slmops.serve.dialects.body import Body, Entries, Items, StopText, check_numbers, errors_of
from slmops.serve.dialects.openai.errors import error
from slmops.serve.grammar import OBJECT
from slmops.serve.sampling import Picking
from slmops.serve.tools import Tool, turns

UNIONS = frozenset(
    [
        "str",
        "constrained-str",
        "Turn",
        "Named",
        "AllowedTools",
        "NamedTool",
        "message",
        "function_call",
        "function_call_output",
    ]
)
"""Parts of the place of an error that stand for one of several types."""
GONE = 499
"""The status of an answer that nobody waits for any more."""
MOST_ANSWERS = 16
MOST_TOOLS = 128
Share = Annotated[float, Field(ge=0, le=1)]
Kind = TypeVar("Kind", bound=BaseModel)
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


def misplaced(param: str, said: str) -> PydanticCustomError:
    """An error of the field `param`, found when all of them were read."""
    return PydanticCustomError("misplaced", "{said}", {"param": param, "said": said})


class Common(Body):
    """What all requests for answers have. Some fields change no answer here and are taken for the sake of clients that set them."""

    model: str
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    min_p: Share = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Entries[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: Entries[str, str] | None = None

    def picking(self, number: int, logprobs: int | None) -> Picking:
        """How the answer of this number is picked."""
        return Picking(
            self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, self.frequency_penalty,
            self.presence_penalty, self.logit_bias or {}, None if self.seed is None else (self.seed + number) & (2**63 - 1), logprobs,
        )  # fmt: skip


class StreamOptions(Body):
    """Of a stream. Nothing is padded here, so there is no obfuscation to leave out."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class Wanted(Common):
    """What both kinds of completion have."""

    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] = 1
    stop: StopText | Annotated[Items[StopText], Field(max_length=4)] | None = None
    store: Literal[False] | None = None

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Part(Body):
    """A part of a message's content. Only text is read."""

    type: Literal["text"]
    text: str


class FunctionOfCall(Body):
    """What a call calls."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call that the model made before."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionOfCall


class Turn(Body):
    """A message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Items[Part] | None = None
    name: str | None = None
    tool_calls: Items[ToolCall] | None = None
    tool_call_id: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _whole(self) -> Turn:
        if self.tool_calls is not None and self.role != "assistant":
            raise ValueError("only an assistant calls tools")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("a tool_call_id stands in messages of the role tool, and in all of them")
        if self.content is None and not self.tool_calls:
            raise ValueError("a message has content")
        return self

    def plain(self) -> dict[str, Any]:
        """For the chat template."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        turn: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls:
            turn["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        if self.name is not None and self.role == "tool":
            turn["name"] = self.name
        return turn


class Function(Body):
    """A function that may be called."""

    name: Name
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool = False


class ToolOf(Body):
    """A tool."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """Names a function."""

    name: str


class Named(Body):
    """This tool shall be called."""

    type: Literal["function"]
    function: FunctionName


class Allowed(Body):
    """These tools may, or one of them shall, be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[Items[Named], Field(min_length=1)]


class AllowedTools(Body):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: Allowed


class Schema(Body):
    """JSON of this schema. It is held to in any case, `strict` or not; what cannot be is refused."""

    name: Name
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    """What an answer looks like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema stands beside the type json_schema")
        return self

    @property
    def schema_of(self) -> dict[str, Any] | None:
        """Of the answer; None: any text."""
        if self.type == "text":
            return None
        return OBJECT if self.json_schema is None else self.json_schema.schema_ or {}


class Choosing:
    """Which tools an answer may call: those that are `open`, and whether it `must`."""

    def __init__(self, tools: Sequence[Tool], choice: str | Sequence[str], must: bool, *, many: bool) -> None:
        names = [tool.name for tool in tools] if isinstance(choice, str) else list(choice)
        unknown = [name for name in names if name not in {tool.name for tool in tools}]
        if unknown:
            raise misplaced("tool_choice", f"there is no tool {unknown[0]}")
        if len({tool.name for tool in tools}) < len(tools):
            raise misplaced("tools", "two of them have one name")
        self.tools = [] if choice == "none" else list(tools)
        self.open = [tool for tool in self.tools if tool.name in names]
        self.must, self.many = must or choice == "required", many


class Chat(Wanted):
    """`/v1/chat/completions`."""

    messages: Annotated[Items[Turn], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    response_format: ResponseFormat | None = None
    tools: Annotated[Items[ToolOf], Field(min_length=1, max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Named | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    modalities: Items[Literal["text"]] | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    prediction: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _choose(self) -> Chat:
        if self.tools is None and (self.tool_choice not in (None, "none") or self.parallel_tool_calls is not None):
            param = "parallel_tool_calls" if self.tool_choice in (None, "none") else "tool_choice"
            raise misplaced(param, "it stands beside tools")
        if self.tools is not None:
            self.choosing()
        return self

    def turns(self) -> list[dict[str, Any]]:
        """For the chat template."""
        return turns([turn.plain() for turn in self.messages])

    def choosing(self) -> Choosing:
        """Which tools may be called."""
        functions = [tool.function for tool in self.tools or ()]
        tools = [Tool(f.name, f.description, f.parameters, f.strict) for f in functions]
        many, choice = self.parallel_tool_calls is not False, self.tool_choice
        if isinstance(choice, Named):
            return Choosing(tools, [choice.function.name], True, many=False)
        if isinstance(choice, AllowedTools):
            allowed = choice.allowed_tools
            return Choosing(tools, [one.function.name for one in allowed.tools], allowed.mode == "required", many=many)
        return Choosing(tools, choice or "auto", False, many=many)


class Completion(Wanted):
    """`/v1/completions`."""

    prompt: str | Items[str] | Items[int] | Items[Items[int]]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: Literal[1] | None = None


class Embedding(Body):
    """`/v1/embeddings`."""

    model: str
    input: str | Items[str] | Items[int] | Items[Items[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None


async def parsed(request: Request, kind: type[Kind]) -> Kind | Response:
    """The body of a request, or the error that says what is wrong with it."""
    try:
        raw = await request.body()
    except ClientDisconnect:
        return Response(status_code=GONE)
    try:
        check_numbers(raw)
    except ValueError as failure:
        return error(400, f"the body is not JSON: {failure}")
    try:
        return kind.model_validate_json(raw)
    except ValidationError as failure:
        found = errors_of(failure)
        # of what is wrong with the first field, that which one of its types came furthest with
        first = max((one for one in found if one["loc"][:1] == found[0]["loc"][:1]), key=_far)
        places = [str(part) for part in first["loc"] if not _is_union(part)]
        if first["type"] == "misplaced":
            places.append(first["ctx"]["param"])
        param = ".".join(places) or None
        if first["type"] == "json_invalid":
            return error(400, f"the body is not JSON: {first['msg']}")
        if first["type"] == "extra_forbidden":
            return error(400, f"{param} is not supported", param=param, code="unsupported_parameter")
        said = first["msg"].removeprefix("Value error, ")
        return error(400, f"{param or 'the body'}: {said}", param=param)


def _far(one: Any) -> tuple[int, int, bool]:
    """How far the reading of a field came before an error: its depth, its place in a list, and whether the type was right."""
    last = one["loc"][-1] if one["loc"] else None
    return len(one["loc"]), last if isinstance(last, int) else -1, not one["type"].endswith("_type")


def _is_union(part: Any) -> bool:
    return isinstance(part, str) and (part in UNIONS or part.startswith(("list[", "function-", "literal[")))

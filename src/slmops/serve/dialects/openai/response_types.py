"""What clients send to `/v1/responses`, field by field."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from slmops.serve.dialects.body import Body, Items
from slmops.serve.dialects.openai.types import MOST_TOOLS, Choosing, Common, Name, misplaced
from slmops.serve.grammar import OBJECT
from slmops.serve.tools import Tool, turns

LOGPROBS = "message.output_text.logprobs"


class InputPart(Body):
    """A part of a message's content. Only text is read. What comes with the text of an earlier answer says nothing more."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = None


class Message(Body):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Items[InputPart]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class FunctionCall(Body):
    """A call that the model made before."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class FunctionOutput(Body):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | Items[InputPart]
    id: str | None = None
    status: str | None = None


def _kind(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return "message" if kind is None else str(kind)


Item = Annotated[
    Annotated[Message, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionOutput, Tag("function_call_output")],
    Discriminator(_kind),
]


class FunctionTool(Body):
    """A function that may be called."""

    type: Literal["function"]
    name: Name
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool = False


class NamedTool(Body):
    """This tool shall be called."""

    type: Literal["function"]
    name: str


class TextFormat(Body):
    """What the text looks like."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _whole(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("schema stands beside the type json_schema")
        return self


class TextOf(Body):
    """How the text is."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningOf(Body):
    """Models here do not think apart."""

    effort: Literal["none"] | None = None
    summary: None = None


class Obfuscation(Body):
    """Nothing is padded here, so there is nothing to leave out."""

    include_obfuscation: Literal[False] | None = None


class Respond(Common):
    """`/v1/responses`."""

    input: str | Annotated[Items[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    previous_response_id: str | None = None
    store: bool = True
    text: TextOf | None = None
    tools: Items[FunctionTool] = Field(default_factory=list, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    max_tool_calls: None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    include: Items[Literal["message.output_text.logprobs"]] = Field(default_factory=list)
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    reasoning: ReasoningOf | None = None
    stream_options: Obfuscation | None = None

    @model_validator(mode="after")
    def _choose(self) -> Respond:
        if not self.tools and self.tool_choice not in ("none", "auto"):
            raise misplaced("tool_choice", "it stands beside tools")
        self.choosing()
        return self

    @property
    def tells_logprobs(self) -> bool:
        """Whether log probabilities are asked for."""
        return LOGPROBS in self.include

    @property
    def schema_of(self) -> dict[str, Any] | None:
        """Of the text; None: any."""
        form = self.text.format if self.text else None
        if form is None or form.type == "text":
            return None
        return OBJECT if form.schema_ is None else form.schema_

    def choosing(self) -> Choosing:
        """Which tools may be called."""
        tools = [Tool(f.name, f.description, f.parameters, f.strict) for f in self.tools]
        if isinstance(self.tool_choice, NamedTool):
            return Choosing(tools, [self.tool_choice.name], True, many=False)
        return Choosing(tools, self.tool_choice, False, many=self.parallel_tool_calls)

    def turns(self) -> list[dict[str, Any]]:
        """For the chat template; calls that follow each other are one turn.

        Raises:
            RequestError: the arguments of a call are no JSON object.
        """
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        made: list[dict[str, Any]] = []
        for item in self.input:
            if isinstance(item, Message):
                role = "system" if item.role == "developer" else item.role
                made.append({"role": role, "content": _text(item.content)})
            elif isinstance(item, FunctionOutput):
                made.append({"role": "tool", "content": _text(item.output), "tool_call_id": item.call_id})
            else:
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                if not made or made[-1]["role"] != "assistant":
                    made.append({"role": "assistant", "content": ""})
                made[-1].setdefault("tool_calls", []).append(call)
        return turns(made)

    def items(self) -> list[dict[str, Any]]:
        """The input as it is told to whoever asks for it."""
        given = [Message(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        made = []
        for item in given:
            told = item.model_dump(exclude_none=True)
            told.setdefault("id", f"{'msg' if isinstance(item, Message) else 'fc'}_{secrets.token_hex(16)}")
            if isinstance(item, Message) and isinstance(item.content, str):
                kind = "output_text" if item.role == "assistant" else "input_text"
                told["content"] = [{"type": kind, "text": item.content}]
            made.append({"status": "completed", **told})
        return made


def _text(content: str | list[InputPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)

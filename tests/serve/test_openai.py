"""What OpenAI's own client makes of the server: tools, response formats, responses. The model is random: grammars make it say
what is wanted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest

from slmops.engines import minimal
from tests.serve.test_server import served

pytestmark = pytest.mark.slow
TEMPLATE = """\
{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}\
 as <tool_call>{"name", "arguments"}</tool_call><|end|>{% endif %}\
{% for message in messages %}<|{{ 'user' if message.role == 'tool' else message.role }}|>{{ message.content }}\
{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
PLACE = {
    "type": "object", "required": ["city", "days"], "additionalProperties": False,
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
}  # fmt: skip
WEATHER = {"name": "weather", "description": "of a place", "parameters": PLACE}
ADD = {
    "name": "add",
    "strict": True,
    "parameters": {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]},
}
TOOLS: list[Any] = [{"type": "function", "function": function} for function in (WEATHER, ADD)]
ENDING = {str(len(minimal.SPECIAL) + ord(letter)): 5 for letter in '"}],'}


class Point(pydantic.BaseModel):
    x: int
    seen: bool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calls")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minimal, "CONTEXT", 2048)
        patch.setattr(minimal, "TEMPLATE", TEMPLATE)
        minimal.write_minimal(folder, "onnx_genai")
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with served(folder, "--rows", "4") as (client, _):
        yield f"{client.base_url}/v1"


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(model="tiny", **({"messages": HELLO, "seed": 1, "logit_bias": ENDING} | more))


def test_answers_hold_to_a_schema_whole_and_in_pieces(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE, "strict": True}}
    whole = ask(client, response_format=form).choices[0]
    assert set(json.loads(whole.message.content)) == {"city", "days"} and whole.finish_reason == "stop"
    pieces = [chunk.choices[0] for chunk in ask(client, response_format=form, stream=True)]
    assert "".join(piece.delta.content or "" for piece in pieces) == whole.message.content
    assert isinstance(json.loads(ask(client, response_format={"type": "json_object"}).choices[0].message.content), dict)
    bias: Any = ENDING
    parsed = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Point, logit_bias=bias)
    assert isinstance(parsed.choices[0].message.parsed, Point)
    cut = ask(client, response_format=form, max_completion_tokens=3).choices[0]
    assert cut.finish_reason == "length"


def test_tools_are_called_and_answered(client: openai.OpenAI) -> None:
    one = {"tools": TOOLS, "parallel_tool_calls": False}
    choice = ask(client, **one, tool_choice="required").choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert set(json.loads(call.function.arguments)) == ({"x"} if call.function.name == "add" else {"city", "days"})
    named = {"type": "function", "function": {"name": "weather"}}
    pieces = [chunk.choices[0] for chunk in ask(client, tools=TOOLS, tool_choice=named, stream=True)]
    deltas = [call for piece in pieces for call in piece.delta.tool_calls or []]
    assert [d.function.name for d in deltas if d.function.name] == ["weather"] and deltas[0].id and deltas[0].index == 0
    assert set(json.loads("".join(d.function.arguments for d in deltas))) == {"city", "days"} and len(deltas) > 1
    assert pieces[-1].finish_reason == "tool_calls"
    with client.chat.completions.stream(model="tiny", messages=HELLO, tools=TOOLS, tool_choice=named) as stream:  # type: ignore[arg-type]
        assert stream.get_final_completion().choices[0].message.tool_calls
    turns = [*HELLO, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    before = ask(client, tools=TOOLS, max_tokens=1).usage.prompt_tokens
    assert ask(client, messages=turns, tools=TOOLS, max_tokens=1).usage.prompt_tokens > before
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "add"}}]}
    some = ask(client, **one, tool_choice={"type": "allowed_tools", "allowed_tools": allowed}).choices[0]
    assert some.message.tool_calls[0].function.name == "add"
    assert ask(client, tools=TOOLS, tool_choice="none", max_tokens=1).usage.prompt_tokens < before


def test_responses_are_whole_streamed_kept_and_gone_on_with(client: openai.OpenAI) -> None:
    warm: Any = {"seed": 1, "logit_bias": ENDING}
    endless: Any = {"seed": 1, "logit_bias": {str(minimal.END): -100}}
    first = client.responses.create(
        model="tiny", input="hello", instructions="be brief", max_output_tokens=4, extra_body=endless
    )
    assert first.status == "incomplete" and first.usage and first.usage.output_tokens == 4
    kept = client.responses.retrieve(first.id)
    assert kept.id == first.id and kept.output_text == first.output_text
    more = client.responses.create(model="tiny", input="more", previous_response_id=first.id, max_output_tokens=2)
    assert more.usage and more.usage.input_tokens > first.usage.input_tokens - len("be brief")
    client.responses.delete(first.id)
    for gone in (first.id, client.responses.create(model="tiny", input="x", store=False, max_output_tokens=1).id):
        with pytest.raises(openai.NotFoundError):
            client.responses.create(model="tiny", input="more", previous_response_id=gone)
    parsed = client.responses.parse(model="tiny", input="hello", text_format=Point, extra_body=warm)
    assert isinstance(parsed.output_parsed, Point) and parsed.status == "completed"
    tools: list[Any] = [{"type": "function", **ADD}]
    with client.responses.stream(
        model="tiny", input="hello", tools=tools, tool_choice="required", parallel_tool_calls=False, extra_body=warm
    ) as stream:
        kinds = [event.type for event in stream]
        made = stream.get_final_response().output[0]
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed" and made.type == "function_call"
    items: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "hello"}]}, made.model_dump(exclude={"parsed_arguments"}),
        {"type": "function_call_output", "call_id": made.call_id, "output": "3"},
    ]  # fmt: skip
    last = client.responses.create(
        model="tiny", input=items, tools=tools, max_output_tokens=3, stream=True, extra_body=endless
    )
    events = list(last)
    told = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[-1].type == "response.incomplete" and events[-1].response.output_text == told
    assert [event.sequence_number for event in events] == list(range(len(events)))


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        (
            "chat/completions",
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}},
            "tool_choice",
        ),
        ("chat/completions", {"tools": [*TOOLS, TOOLS[0]]}, "tools"),
        ("chat/completions", {"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type"),
        (
            "chat/completions",
            {"tools": [{"type": "function", "function": {"name": "x", "parameters": {"type": "string"}}}]},
            "tools",
        ),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, "messages.0"),
        ("chat/completions", {"reasoning_effort": "high"}, "reasoning_effort"),
        ("chat/completions", {"store": True}, "store"),
        ("chat/completions", {"response_format": {"type": "json_schema"}}, "response_format"),
        ("responses", {"input": [{"type": "reasoning", "id": "x", "summary": []}]}, "input.0"),
        ("responses", {"background": True}, "background"),
        ("responses", {"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ("responses", {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "text"),
        ("embeddings", {"input": ""}, "input"),
        ("completions", {"prompt": "x", "suffix": "y"}, "suffix"),
    ],
)
def test_what_cannot_be_done_is_an_error_that_names_it(url: str, path: str, change: dict[str, Any], param: str) -> None:
    body = (
        {"model": "tiny"}
        | {"chat/completions": {"messages": HELLO}, "responses": {"input": "x"}}.get(path, {})
        | change
    )
    refused = httpx.post(f"{url}/{path}", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), refused.text


def test_what_changes_no_answer_is_taken(client: openai.OpenAI) -> None:
    quiet = {
        "service_tier": "auto", "prompt_cache_key": "a", "safety_identifier": "b", "user": "c", "metadata": {"d": "e"},
        "modalities": ["text"], "reasoning_effort": "none", "verbosity": "medium",
        "prediction": {"type": "content", "content": "x"}, "store": False,
    }  # fmt: skip
    assert ask(client, max_tokens=2, **quiet).usage.completion_tokens <= 2

"""Every feature of OpenAI's dialect, with openai-python as it comes.

    slmops serve desk=MODEL_FOLDER
    pip install openai pydantic && python examples/clients/every_openai.py http://127.0.0.1:8000/v1 desk

A third word names an adapter that the model is served with. Parts that need a chat template with tools, or a model that gives
embeddings, are left out, and said so, where the model has none.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import openai
import pydantic

HELLO: list[Any] = [{"role": "user", "content": "Where is my parcel?"}]
FUNCTION = {
    "name": "find_order", "description": "Look an order up", "strict": True,
    "parameters": {
        "type": "object", "required": ["number"], "additionalProperties": False,
        "properties": {"number": {"type": "integer", "minimum": 1, "maximum": 9999}},
    },
}  # fmt: skip


class Intent(pydantic.BaseModel):
    """What an answer is read as."""

    urgent: bool
    stars: int = pydantic.Field(ge=1, le=5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", metavar="URL")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("adapter", metavar="ADAPTER", nargs="?")
    options = parser.parse_args()
    client, model = openai.OpenAI(base_url=options.url, api_key="none"), options.model
    say = client.chat.completions.create
    assert model in [card.id for card in client.models.list()] and client.models.retrieve(model).id == model

    whole = say(model=model, messages=HELLO, max_completion_tokens=8, temperature=0, logprobs=True, top_logprobs=2)
    assert whole.usage and whole.choices[0].logprobs and whole.choices[0].logprobs.content
    pieces = list(
        say(
            model=model,
            messages=HELLO,
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(choice.delta.content or "" for piece in pieces for choice in piece.choices)
    assert text == whole.choices[0].message.content and pieces[-1].usage
    some = say(model=model, messages=HELLO, max_tokens=4, n=3, stop=["\n"], logit_bias={"4": -100}, seed=1)
    assert len(some.choices) == 3
    every: Any = {
        "max_tokens": 6, "seed": 1, "temperature": 1.2, "top_p": 0.9, "frequency_penalty": 0.1, "presence_penalty": 0.1,
        "extra_body": {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1},
    }  # fmt: skip
    again = [say(model=model, messages=HELLO, **every).choices[0].message.content for _ in range(2)]
    assert again[0] == again[1]
    print("chat: whole, streamed with usage, log probabilities, n, stop, bias, sampling, seed")
    if options.adapter:
        adapted = f"{model}+{options.adapter}"
        assert adapted in [card.id for card in client.models.list()]
        assert say(model=adapted, messages=HELLO, max_tokens=8, temperature=0).model == adapted
        print("adapter:", adapted)

    parsed = (
        client.chat.completions.parse(model=model, messages=HELLO, response_format=Intent).choices[0].message.parsed
    )
    assert isinstance(parsed, Intent)
    kind: Any = {"type": "json_object"}
    answer = say(model=model, messages=HELLO, response_format=kind, max_tokens=200, seed=1).choices[0]
    assert answer.finish_reason == "length" or isinstance(json.loads(answer.message.content or ""), dict)
    with client.chat.completions.stream(model=model, messages=HELLO, response_format=Intent) as held_stream:
        assert isinstance(held_stream.get_final_completion().choices[0].message.parsed, Intent)
    print("response_format:", parsed)

    done = client.completions.create(model=model, prompt="Hello", max_tokens=4, logprobs=1, temperature=0)
    assert done.choices[0].logprobs
    told = client.completions.create(model=model, prompt="Hello", max_tokens=4, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in told if part.choices) == done.choices[0].text
    assert len(client.completions.create(model=model, prompt=["Hello", "Bye"], max_tokens=2).choices) == 2
    print("completions: whole, streamed, several prompts")

    tools: Any = [{"type": "function", "function": FUNCTION}]
    try:
        choice = say(
            model=model, messages=HELLO, tools=tools, tool_choice="required", parallel_tool_calls=False
        ).choices[0]
    except openai.BadRequestError as error:
        print("tools left out:", error.body)
        tools = None
    if tools:
        (call,) = choice.message.tool_calls or ()
        assert choice.finish_reason == "tool_calls" and call.type == "function"
        assert 1 <= json.loads(call.function.arguments)["number"] <= 9999
        result: Any = {"role": "tool", "tool_call_id": call.id, "content": "on its way"}
        assert say(model=model, messages=[*HELLO, choice.message, result], tools=tools, max_tokens=4).choices  # type: ignore[list-item]
        with client.chat.completions.stream(
            model=model, messages=HELLO, tools=tools, tool_choice="required", parallel_tool_calls=False
        ) as stream:
            (same,) = stream.get_final_completion().choices[0].message.tool_calls or ()
        assert same.function.name == "find_order"
        named: Any = {"type": "function", "function": {"name": "find_order"}}
        (one,) = say(model=model, messages=HELLO, tools=tools, tool_choice=named).choices[0].message.tool_calls or ()
        assert one.type == "function" and one.function.name == "find_order"
        none = say(model=model, messages=HELLO, tools=tools, tool_choice="none", max_tokens=4).choices[0].message
        assert (
            not none.tool_calls
            and say(model=model, messages=HELLO, tools=tools, tool_choice="auto", max_tokens=4).usage
        )
        print("tools: required, named, none, auto, answered, streamed:", call.function.arguments)

    first = client.responses.create(model=model, input="Hello", instructions="Be brief.", max_output_tokens=4)
    again = client.responses.create(
        model=model, input="More", previous_response_id=first.id, max_output_tokens=4, stream=True
    )
    assert [event.type for event in again][-1] in ("response.completed", "response.incomplete")
    held = client.responses.parse(model=model, input="Hello", text_format=Intent)
    assert isinstance(held.output_parsed, Intent)
    assert client.responses.retrieve(first.id).id == first.id
    assert [item.type for item in client.responses.input_items.list(first.id)] == ["message"]
    if tools:
        flat: Any = [{"type": "function", **FUNCTION}]
        reply = client.responses.create(
            model=model, input="Hello", tools=flat, tool_choice="required", parallel_tool_calls=False
        )
        (asked,) = (item for item in reply.output if item.type == "function_call")
        output: Any = [{"type": "function_call_output", "call_id": asked.call_id, "output": "on its way"}]
        assert client.responses.create(
            model=model, input=output, previous_response_id=reply.id, tools=flat, max_output_tokens=4
        ).usage
    client.responses.delete(first.id)
    print("responses: gone on with, streamed, parsed, kept, deleted", "with tools" if tools else "without tools")

    try:
        found = client.embeddings.create(model=model, input=["Where is my parcel?", "Hello"]).data
        assert len(found) == 2 and all(math.isclose(math.hypot(*one.embedding), 1, abs_tol=1e-4) for one in found)
        (short,) = client.embeddings.create(model=model, input="Hello", dimensions=8, encoding_format="float").data
        assert len(short.embedding) == 8
        print("embeddings:", len(found[0].embedding), "dimensions, and", len(short.embedding))
    except openai.BadRequestError as error:
        print("embeddings left out:", error.body)

    try:
        say(model="none", messages=HELLO)
    except openai.NotFoundError as error:
        print("errors:", error.code)
    else:
        raise AssertionError("a model that is not there is no error")
    try:
        say(model=model, messages=HELLO, temperature=3)
    except openai.BadRequestError as error:
        assert error.param == "temperature"
    else:
        raise AssertionError("a wrong temperature is no error")


if __name__ == "__main__":
    main()

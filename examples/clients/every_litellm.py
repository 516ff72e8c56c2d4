"""Every feature of both dialects that LiteLLM reaches, with LiteLLM as it comes.

    pip install litellm
    python examples/clients/every_litellm.py http://127.0.0.1:8000/v1 MODEL [ADAPTER]

Parts that need a chat template with tools, or a model that gives embeddings, are left out, and said so, where the model has none.
LITELLM_LOCAL_MODEL_COST_MAP=True spares machines without a network the wait for its list of prices.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

import litellm

HELLO: list[Any] = [{"role": "user", "content": "Where is my parcel?"}]
PARAMETERS = {
    "type": "object", "required": ["number"], "additionalProperties": False,
    "properties": {"number": {"type": "integer", "minimum": 1, "maximum": 9999}},
}  # fmt: skip
FUNCTION = {"name": "find_order", "description": "Look an order up.", "parameters": PARAMETERS, "strict": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", metavar="URL")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("adapter", metavar="ADAPTER", nargs="?")
    options = parser.parse_args()
    litellm.suppress_debug_info = True
    openai_dialect(options.url, options.model, options.adapter)
    ollama_dialect(options.url.removesuffix("/v1"), options.model, options.adapter)


def openai_dialect(url: str, model: str, adapter: str | None) -> None:
    place: dict[str, Any] = {"api_base": url, "api_key": "none", "num_retries": 0, "max_retries": 0}
    to = {**place, "model": f"openai/{model}", "messages": HELLO}
    assert model in litellm.get_valid_models(
        check_provider_endpoint=True, custom_llm_provider="openai", api_base=url, api_key="none"
    )
    greedy = {"max_completion_tokens": 8, "temperature": 0}
    whole = litellm.completion(**to, **greedy, logprobs=True, top_logprobs=2)
    assert whole.choices[0].logprobs and whole.usage.completion_tokens <= 8
    pieces = list(litellm.completion(**to, **greedy, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for piece in pieces for choice in piece.choices)
    assert text == whole.choices[0].message.content
    assert litellm.stream_chunk_builder(pieces).usage.completion_tokens == whole.usage.completion_tokens
    assert asyncio.run(litellm.acompletion(**to, **greedy)).choices[0].message.content == text
    assert len(litellm.completion(**to, n=2, max_tokens=2, stop=["\n"], logit_bias={"4": -100}).choices) == 2
    every = {
        "max_tokens": 6, "seed": 1, "temperature": 1.2, "top_p": 0.9, "frequency_penalty": 0.1, "presence_penalty": 0.1,
        "extra_body": {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1},
    }  # fmt: skip
    again = [litellm.completion(**to, **every).choices[0].message.content for _ in range(2)]
    assert again[0] == again[1]
    print("chat: whole, streamed with usage, log probabilities, n, stop, bias, sampling, seed")
    if adapter:
        adapted = f"{model}+{adapter}"
        assert litellm.completion(**{**to, "model": f"openai/{adapted}"}, **greedy).model.endswith(adapted)
        print("adapter:", adapted)

    form = {"type": "json_schema", "json_schema": {"name": "order", "schema": PARAMETERS, "strict": True}}
    held = json.loads(litellm.completion(**to, response_format=form).choices[0].message.content)
    assert 1 <= held["number"] <= 9999
    answer = litellm.completion(**to, response_format={"type": "json_object"}, max_tokens=200, seed=1).choices[0]
    assert answer.finish_reason == "length" or isinstance(json.loads(answer.message.content), dict)
    print("response_format:", held)

    plain = {**place, "model": f"text-completion-openai/{model}", "prompt": "Hello", "max_tokens": 4, "temperature": 0}
    done = litellm.text_completion(**plain, logprobs=1)
    assert done.choices[0].logprobs
    told = litellm.text_completion(**plain, stream=True)
    assert "".join(piece.choices[0].text or "" for piece in told if piece.choices) == done.choices[0].text
    print("completions: whole, streamed")

    tools: Any = [{"type": "function", "function": FUNCTION}]
    must = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    try:
        made = litellm.completion(**to, **must)
    except litellm.BadRequestError as error:
        print("tools left out:", error.message)
        tools = None
    if tools:
        message = made.choices[0].message
        (call,) = message.tool_calls
        assert made.choices[0].finish_reason == "tool_calls"
        turns = [*HELLO, message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "on its way"}]
        for choice in ("auto", "none"):
            more = {**to, "messages": turns, "tools": tools, "tool_choice": choice}
            assert litellm.completion(**more, max_tokens=4).choices
        named = {"type": "function", "function": {"name": "find_order"}}
        assert litellm.completion(**to, tools=tools, tool_choice=named).choices[0].message.tool_calls
        streamed = litellm.stream_chunk_builder(list(litellm.completion(**to, **must, stream=True)))
        assert streamed.choices[0].message.tool_calls[0].function.name == "find_order"
        print("tools: required, named, none, auto, answered, streamed:", call.function.arguments)

    to = {**place, "model": f"openai/{model}", "input": "Hello"}
    del to["num_retries"], to["max_retries"]
    first = litellm.responses(**to, instructions="Be brief.", max_output_tokens=16)
    assert first.usage.output_tokens <= 16  # the least that LiteLLM asks for
    again = litellm.responses(**to, previous_response_id=first.id, max_output_tokens=16, stream=True)
    assert [event.type for event in again][-1] in ("response.completed", "response.incomplete")
    text_form = {"format": {"type": "json_schema", "name": "order", "schema": PARAMETERS, "strict": True}}
    parsed = next(item for item in litellm.responses(**to, text=text_form).output if item.type == "message")
    assert json.loads(parsed.content[0].text)["number"]
    if tools:
        asked = litellm.responses(**to, tools=[{"type": "function", **FUNCTION}], tool_choice="required")
        assert any(item.type == "function_call" for item in asked.output)
    print("responses: whole, gone on with, streamed, held to a schema", "with tools" if tools else "without tools")

    to = {**place, "model": f"openai/{model}"}
    try:
        found = litellm.embedding(**to, input=["Where is my parcel?", "Hello"], encoding_format="float").data
        assert len(found) == 2
        print("embeddings:", len(found[0]["embedding"]), "dimensions")
    except litellm.BadRequestError as error:
        print("embeddings left out:", error.message)
    try:
        litellm.completion(**{**to, "model": "openai/none", "messages": HELLO})
    except litellm.NotFoundError as error:
        print("errors:", error.status_code)
    else:
        raise AssertionError("a model that is not there is no error")


def ollama_dialect(url: str, model: str, adapter: str | None) -> None:
    chat: dict[str, Any] = {"model": f"ollama_chat/{model}", "api_base": url, "messages": HELLO, "num_retries": 0}
    greedy = {"max_tokens": 8, "temperature": 0}
    whole = litellm.completion(**chat, **greedy)
    assert whole.usage.completion_tokens <= 8 and whole.choices[0].finish_reason
    pieces = list(litellm.completion(**chat, **greedy, stream=True))
    text = "".join(choice.delta.content or "" for piece in pieces for choice in piece.choices)
    assert text == whole.choices[0].message.content
    every = {
        "max_tokens": 4, "seed": 1, "temperature": 1.2, "top_p": 0.9, "top_k": 20, "frequency_penalty": 0.1, "stop": ["\n"],
        "num_ctx": 256, "keep_alive": "5m",
    }  # fmt: skip
    again = [litellm.completion(**chat, **every).choices[0].message.content for _ in range(2)]
    assert again[0] == again[1]
    if adapter:
        assert litellm.completion(**{**chat, "model": f"ollama_chat/{model}+{adapter}"}, **greedy).choices
    form = {"type": "json_schema", "json_schema": {"name": "order", "schema": PARAMETERS, "strict": True}}
    assert json.loads(litellm.completion(**chat, response_format=form).choices[0].message.content)["number"]
    assert litellm.completion(**chat, format="json", max_tokens=100, seed=1).choices[0].message.content.startswith("{")
    try:
        assert litellm.completion(**chat, **greedy, tools=[{"type": "function", "function": FUNCTION}]).choices
    except litellm.APIConnectionError as error:
        if "no tools" not in str(error):
            raise
        print("Ollama's tools left out:", error)
    plain: dict[str, Any] = {"model": f"ollama/{model}", "api_base": url, "num_retries": 0}
    assert litellm.completion(**plain, messages=HELLO, **greedy).choices[0].message.content is not None
    try:
        assert len(litellm.embedding(**plain, input=["Where is my parcel?", "Hello"]).data) == 2
    except litellm.APIConnectionError as error:
        if "hidden states" not in str(error):
            raise
        print("Ollama's embeddings left out:", error)
    print("Ollama's dialect: chat, streams, options, format, tools, generate, embed")


if __name__ == "__main__":
    main()

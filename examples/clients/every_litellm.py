"""Chat, streams, JSON of a schema and tools with LiteLLM as it comes.

pip install litellm && python examples/clients/every_litellm.py http://127.0.0.1:8000/v1 MODEL
"""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm

HELLO: list[Any] = [{"role": "user", "content": "Where is my parcel?"}]
PARAMETERS = {
    "type": "object", "required": ["number"], "additionalProperties": False,
    "properties": {"number": {"type": "integer", "minimum": 1, "maximum": 9999}},
}  # fmt: skip


def main() -> None:
    url, model = sys.argv[1:]
    to: dict[str, Any] = {"model": f"openai/{model}", "api_base": url, "api_key": "none", "seed": 1, "num_retries": 0}
    whole = litellm.completion(**to, messages=HELLO, max_tokens=8, temperature=0, logprobs=True, top_logprobs=2)
    stream = litellm.completion(
        **to, messages=HELLO, max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    pieces = list(stream)
    text = "".join(choice.delta.content or "" for piece in pieces for choice in piece.choices)
    assert text == whole.choices[0].message.content and whole.usage.completion_tokens <= 8
    assert len(litellm.completion(**to, messages=HELLO, n=2, max_tokens=2, stop=["\n"], top_p=0.9).choices) == 2
    print("chat: whole, streamed, n, stop, log probabilities")
    form = {"type": "json_schema", "json_schema": {"name": "order", "schema": PARAMETERS, "strict": True}}
    print(
        "response_format:",
        json.loads(litellm.completion(**to, messages=HELLO, response_format=form).choices[0].message.content),
    )
    assert litellm.text_completion(
        **{**to, "model": f"text-completion-openai/{model}"}, prompt="Hello", max_tokens=4
    ).choices
    tools = [{"type": "function", "function": {"name": "find_order", "parameters": PARAMETERS}}]
    try:
        made = litellm.completion(**to, messages=HELLO, tools=tools, tool_choice="required", parallel_tool_calls=False)
    except litellm.BadRequestError as error:
        print("tools left out:", error.message)
        return
    message = made.choices[0].message
    (call,) = message.tool_calls
    assert made.choices[0].finish_reason == "tool_calls"
    turns = [*HELLO, message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "on its way"}]
    assert litellm.completion(**to, messages=turns, tools=tools, max_tokens=4).choices
    print("tools:", call.function.name, call.function.arguments)
    answer = litellm.responses(
        **{k: v for k, v in to.items() if k not in ("seed", "num_retries")}, input="Hello", max_output_tokens=4
    )
    assert answer.usage.output_tokens <= 16
    print("responses")


if __name__ == "__main__":
    main()

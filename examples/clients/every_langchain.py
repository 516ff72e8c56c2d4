"""Chat, streams, structured output and tools with LangChain as it comes.

pip install langchain-openai && python examples/clients/every_langchain.py http://127.0.0.1:8000/v1 MODEL
"""

from __future__ import annotations

import sys

from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from openai import BadRequestError
from pydantic import BaseModel, Field


class Intent(BaseModel):
    """What a customer wants."""

    urgent: bool
    stars: int = Field(ge=1, le=5)


@tool
def find_order(number: int) -> str:
    """Look an order up."""
    return f"order {number} is on its way"


def main() -> None:
    url, model = sys.argv[1:]
    chat = ChatOpenAI(base_url=url, model=model, api_key="none", max_tokens=200, seed=1, max_retries=0)
    turns = [SystemMessage("Be brief."), HumanMessage("Where is my parcel?")]
    whole = chat.bind(max_tokens=8, temperature=0).invoke(turns)
    assert whole.usage_metadata and whole.response_metadata["finish_reason"]
    assert (
        "".join(str(piece.content) for piece in chat.bind(max_tokens=8, temperature=0).stream(turns)) == whole.content
    )
    assert (
        chat.bind(logprobs=True, top_logprobs=2, max_tokens=2, stop=["\n"]).invoke(turns).response_metadata["logprobs"]
    )
    assert len(chat.bind(max_tokens=2).batch([turns, turns])) == 2
    print("chat: whole, streamed, batched, with log probabilities")
    assert isinstance(OpenAI(base_url=url, model=model, api_key="none", max_tokens=4).invoke("Hello"), str)
    for method in ("json_schema", "function_calling"):
        try:
            print(method, chat.with_structured_output(Intent, method=method).invoke(turns))
        except BadRequestError as error:
            print(method, "left out:", error.body)
    try:
        bound = chat.bind_tools([find_order], tool_choice="required", parallel_tool_calls=False)
        made = bound.invoke(turns)
    except BadRequestError as error:
        print("tools left out:", error.body)
        return
    (call,) = made.tool_calls
    result = ToolMessage(find_order.invoke(call["args"]), tool_call_id=call["id"])
    assert chat.bind_tools([find_order]).bind(max_tokens=4).invoke([*turns, made, result]).usage_metadata
    pieces = None
    for piece in bound.stream(turns):
        pieces = piece if pieces is None else pieces + piece
    assert pieces is not None and pieces.tool_calls[0]["name"] == "find_order"  # type: ignore[attr-defined]
    print("tools:", call["name"], call["args"])
    other = ChatOpenAI(base_url=url, model=model, api_key="none", use_responses_api=True, max_tokens=8, max_retries=0)
    assert other.invoke(turns).usage_metadata and list(other.stream(turns))
    print("responses: whole and streamed")


if __name__ == "__main__":
    main()

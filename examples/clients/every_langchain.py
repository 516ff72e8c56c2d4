"""Every feature of both dialects that LangChain reaches, with LangChain as it comes.

    pip install langchain-openai langchain-ollama
    python examples/clients/every_langchain.py http://127.0.0.1:8000/v1 MODEL [ADAPTER]

Parts that need a chat template with tools, or a model that gives embeddings, are left out, and said so, where the model has none.
"""

from __future__ import annotations

import argparse
import asyncio
import math
from typing import Any

import ollama
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from openai import BadRequestError, NotFoundError
from pydantic import BaseModel, ConfigDict, Field

TURNS = [SystemMessage("Be brief."), HumanMessage("Where is my parcel?")]


class Intent(BaseModel):
    """What a customer wants."""

    model_config = ConfigDict(extra="forbid")
    urgent: bool
    stars: int = Field(ge=1, le=5)


class Order(BaseModel):
    """Which order."""

    model_config = ConfigDict(extra="forbid")
    number: int = Field(ge=1, le=9999)


@tool(args_schema=Order)
def find_order(number: int) -> str:
    """Look an order up."""
    return f"order {number} is on its way"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", metavar="URL")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("adapter", metavar="ADAPTER", nargs="?")
    options = parser.parse_args()
    openai_dialect(options.url, options.model, options.adapter)
    ollama_dialect(options.url.removesuffix("/v1"), options.model, options.adapter)


def openai_dialect(url: str, model: str, adapter: str | None) -> None:
    to: Any = {"base_url": url, "model": model, "api_key": "none", "max_retries": 0}
    chat = ChatOpenAI(**to, max_tokens=200, seed=1, stream_usage=True)
    short = chat.bind(max_tokens=8, temperature=0)
    whole = short.invoke(TURNS)
    assert whole.usage_metadata and whole.response_metadata["finish_reason"]
    pieces = list(short.stream(TURNS))
    assert "".join(str(piece.content) for piece in pieces) == whole.content
    assert any(piece.usage_metadata == whole.usage_metadata for piece in pieces)
    assert asyncio.run(short.ainvoke(TURNS)).content == whole.content
    sure = chat.bind(logprobs=True, top_logprobs=2, max_tokens=2, stop=["\n"]).invoke(TURNS)
    assert sure.response_metadata["logprobs"]["content"]
    assert len(chat.bind(max_tokens=2).batch([TURNS, TURNS])) == 2
    assert len(ChatOpenAI(**to, n=2, max_tokens=2).generate([TURNS]).generations[0]) == 2
    every = ChatOpenAI(
        **to, max_completion_tokens=6, seed=1, temperature=1.2, top_p=0.9, frequency_penalty=0.1, presence_penalty=0.1,
        logit_bias={4: -100}, extra_body={"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1},
    )  # fmt: skip
    assert every.invoke(TURNS).content == every.invoke(TURNS).content
    print("chat: whole, streamed with usage, batched, log probabilities, n, stop, bias, sampling, seed")
    if adapter:
        adapted = ChatOpenAI(**{**to, "model": f"{model}+{adapter}"}, max_tokens=8, temperature=0).invoke(TURNS)
        assert adapted.response_metadata["model_name"] == f"{model}+{adapter}"
        print("adapter:", f"{model}+{adapter}")

    plain = OpenAI(**to, max_tokens=4, temperature=0)
    assert "".join(plain.stream("Hello")) == plain.invoke("Hello") and len(plain.batch(["Hello", "Bye"])) == 2
    print("completions: whole, streamed, several prompts")
    found = chat.with_structured_output(Intent, method="json_schema").invoke(TURNS)
    assert isinstance(found, Intent)
    raw = chat.with_structured_output(None, method="json_mode", include_raw=True).invoke(TURNS)
    assert isinstance(raw, dict) and (
        isinstance(raw["parsed"], dict) or raw["raw"].response_metadata["finish_reason"] == "length"
    )
    print("json_schema, json_mode:", found)

    has_tools = True
    bound = chat.bind_tools([find_order], tool_choice="required", parallel_tool_calls=False, strict=True)
    try:
        made = bound.invoke(TURNS)
    except BadRequestError as error:
        has_tools = False
        print("tools left out:", error.body)
    else:
        (call,) = made.tool_calls
        result = ToolMessage(find_order.invoke(call["args"]), tool_call_id=call["id"])
        for choice in ("auto", "none"):
            free = chat.bind_tools([find_order], tool_choice=choice).bind(max_tokens=4)
            assert free.invoke([*TURNS, made, result]).usage_metadata
        (named,) = chat.bind_tools([find_order], tool_choice="find_order", strict=True).invoke(TURNS).tool_calls
        sum_of: Any = None
        for piece in bound.stream(TURNS):
            sum_of = piece if sum_of is None else sum_of + piece
        assert sum_of.tool_calls[0]["name"] == named["name"] == "find_order"
        assert isinstance(
            chat.with_structured_output(Intent, method="function_calling", strict=True).invoke(TURNS), Intent
        )
        print("tools: required, named, none, auto, answered, streamed, as structured output:", call["args"])

    other = ChatOpenAI(**to, use_responses_api=True, use_previous_response_id=True, max_tokens=200)
    first = other.bind(max_tokens=8).invoke(TURNS)
    assert first.usage_metadata and list(other.bind(max_tokens=8).stream(TURNS))
    assert other.bind(max_tokens=8).invoke([*TURNS, first, HumanMessage("More")]).usage_metadata
    assert isinstance(other.with_structured_output(Intent).invoke(TURNS), Intent)
    if has_tools:
        asked = other.bind_tools([find_order], tool_choice="required", strict=True).invoke(TURNS)
        replied = ToolMessage("on its way", tool_call_id=asked.tool_calls[0]["id"])
        assert other.bind_tools([find_order]).bind(max_tokens=4).invoke([*TURNS, asked, replied]).usage_metadata
    print("responses: whole, streamed, gone on with, parsed", "with tools" if has_tools else "without tools")

    try:
        few = OpenAIEmbeddings(
            base_url=url, model=model, api_key="none", check_embedding_ctx_length=False, dimensions=8
        )  # type: ignore[arg-type]
        vectors = [*few.embed_documents(["Where is my parcel?", "Hello"]), few.embed_query("Hello")]
        assert all(len(one) == 8 and math.isclose(math.hypot(*one), 1, abs_tol=1e-4) for one in vectors)
        print("embeddings")
    except BadRequestError as error:
        print("embeddings left out:", error.body)
    try:
        ChatOpenAI(**{**to, "model": "none"}).invoke(TURNS)
    except NotFoundError as error:
        print("errors:", error.code)
    else:
        raise AssertionError("a model that is not there is no error")


def ollama_dialect(url: str, model: str, adapter: str | None) -> None:
    to: Any = {"base_url": url, "model": model, "validate_model_on_init": True}
    chat = ChatOllama(**to, temperature=0, num_predict=8, keep_alive="5m", logprobs=True, top_logprobs=2)
    whole = chat.invoke(TURNS)
    assert whole.usage_metadata and whole.response_metadata["done_reason"] and whole.response_metadata["logprobs"]
    assert "".join(str(piece.content) for piece in chat.stream(TURNS)) == whole.content
    every = ChatOllama(
        **to,
        temperature=1.2,
        seed=1,
        top_k=20,
        top_p=0.9,
        repeat_penalty=1.1,
        repeat_last_n=-1,
        num_ctx=256,
        num_predict=4,
        stop=["\n"],
    )
    assert every.invoke(TURNS).content == every.invoke(TURNS).content
    if adapter:
        assert ChatOllama(**{**to, "model": f"{model}+{adapter}"}, num_predict=4).invoke(TURNS).usage_metadata
    free = ChatOllama(**to, seed=1, num_predict=200)
    assert isinstance(free.with_structured_output(Intent, method="json_schema").invoke(TURNS), Intent)
    assert ChatOllama(**to, format="json", seed=1, num_predict=200).invoke(TURNS).content.startswith("{")  # type: ignore[union-attr]
    try:
        bound = chat.bind_tools([find_order])
        said = bound.invoke(TURNS)
        assert said.usage_metadata and list(bound.stream(TURNS))
        called = AIMessage("", tool_calls=[{"name": "find_order", "args": {"number": 5}, "id": "1"}])
        assert bound.invoke([*TURNS, called, ToolMessage("on its way", tool_call_id="1")]).usage_metadata
    except ollama.ResponseError as error:
        if "no tools" not in error.error:
            raise
        print("Ollama's tools left out:", error.error)
    plain = OllamaLLM(**to, temperature=0, num_predict=4)
    assert "".join(plain.stream("Hello")) == plain.invoke("Hello")
    try:
        assert len(OllamaEmbeddings(**to).embed_documents(["Where is my parcel?", "Hello"])) == 2
    except ollama.ResponseError as error:
        if "hidden states" not in error.error:
            raise
        print("Ollama's embeddings left out:", error.error)
    print("Ollama's dialect: chat, streams, options, format, tools, generate, embed")


if __name__ == "__main__":
    main()

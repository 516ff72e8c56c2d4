"""OpenAI's routes in the document; see `slmops.serve.dialects.openapi`."""

from __future__ import annotations

from typing import Any

from slmops.serve.dialects.openai.response_types import Respond
from slmops.serve.dialects.openai.types import Chat, Completion, Embedding
from slmops.serve.dialects.openapi import (
    ANY,
    BOOLEAN,
    EVENTS,
    NUMBER,
    TEXT,
    WHOLE,
    list_of,
    or_null,
    requests,
    route,
    shape,
)

ERROR = shape(error=shape(message=TEXT, type=TEXT, param=or_null(TEXT), code=or_null(TEXT)))
FINISH = {"enum": ["stop", "length", "tool_calls"]}
USAGE = shape(
    prompt_tokens=WHOLE, completion_tokens=WHOLE, total_tokens=WHOLE, prompt_tokens_details=shape(cached_tokens=WHOLE)
)
CARD = shape(id=TEXT, object={"const": "model"}, created=WHOLE, owned_by=TEXT)
CALL = shape(id=TEXT, type={"const": "function"}, function=shape(name=TEXT, arguments=TEXT))
MESSAGE = shape(role={"const": "assistant"}, content=or_null(TEXT), refusal={"type": "null"})
MESSAGE["properties"]["tool_calls"] = list_of(CALL)
LIKELY = shape(token=TEXT, logprob=NUMBER, bytes=or_null(list_of(WHOLE)))
TOLD = {**LIKELY, "properties": {**LIKELY["properties"], "top_logprobs": list_of(LIKELY)}}
TOKENS = shape(
    tokens=list_of(TEXT), token_logprobs=list_of(NUMBER), text_offset=list_of(WHOLE),
    top_logprobs=list_of({"type": "object", "additionalProperties": NUMBER}),
)  # fmt: skip
ITEM = {
    "anyOf": [
        shape(
            id=TEXT, type={"const": "message"}, role={"const": "assistant"}, status={"enum": ["completed", "incomplete"]},
            content=list_of(shape(type={"const": "output_text"}, text=TEXT, annotations=list_of(ANY), logprobs=list_of(TOLD))),
        ),
        shape(
            id=TEXT, type={"const": "function_call"}, call_id=TEXT, name=TEXT, arguments=TEXT,
            status={"enum": ["completed", "incomplete"]},
        ),
    ]
}  # fmt: skip
ANSWERS: dict[str, dict[str, Any]] = {
    "ChatAnswer": shape(
        id=TEXT, object={"const": "chat.completion"}, created=WHOLE, model=TEXT, usage=USAGE,
        choices=list_of(shape(
            index=WHOLE, message=MESSAGE, finish_reason=FINISH,
            logprobs=or_null(shape(content=list_of(TOLD), refusal={"type": "null"})),
        )),
    ),
    "CompletionAnswer": shape(
        id=TEXT, object={"const": "text_completion"}, created=WHOLE, model=TEXT, usage=USAGE,
        choices=list_of(shape(index=WHOLE, text=TEXT, finish_reason=FINISH, logprobs=or_null(TOKENS))),
    ),
    "EmbeddingAnswer": shape(
        object={"const": "list"}, model=TEXT, usage=shape(prompt_tokens=WHOLE, total_tokens=WHOLE),
        data=list_of(shape(object={"const": "embedding"}, index=WHOLE, embedding={"anyOf": [TEXT, list_of(NUMBER)]})),
    ),
    "Response": shape(
        id=TEXT, object={"const": "response"}, created_at=WHOLE, model=TEXT, status={"enum": ["completed", "incomplete"]},
        error={"type": "null"}, incomplete_details=or_null(shape(reason={"const": "max_output_tokens"})), output=list_of(ITEM),
        usage=shape(input_tokens=WHOLE, output_tokens=WHOLE, total_tokens=WHOLE), tools=list_of(ANY), store=BOOLEAN,
        previous_response_id=or_null(TEXT), metadata={"type": "object", "additionalProperties": TEXT},
    ),
    "Models": shape(object={"const": "list"}, data=list_of(CARD)),
    "Model": CARD,
    "Deleted": shape(id=TEXT, object={"const": "response"}, deleted={"const": True}),
    "Items": shape(
        object={"const": "list"}, data=list_of(shape(id=TEXT, type=TEXT)), first_id=or_null(TEXT), last_id=or_null(TEXT),
        has_more={"const": False},
    ),
    "Error": ERROR,
}  # fmt: skip


def schemas() -> dict[str, Any]:
    """Of requests and answers."""
    return {**requests((Chat, Completion, Embedding, Respond)), **ANSWERS}


def paths(model: str) -> dict[str, Any]:
    """The routes, with examples for a model."""

    def post(id: str, summary: str, answer: str, body: str, stream: bool = True, **example: Any) -> dict[str, Any]:
        links = {"get": "getResponse", "items": "listInputItems", "forget": "deleteResponse"}
        return {
            "post": route(
                id, summary, answer, "Error", body=body, stream=EVENTS if stream else "", example={"model": model, **example},
                links=links if body == "Respond" else None,
            )
        }  # fmt: skip

    hello = [{"role": "user", "content": "hello"}]
    return {
        "/v1/models": {"get": route("listModels", "The models", "Models", "Error")},
        "/v1/models/{name}": {
            "get": route("getModel", "A model", "Model", "Error", path="name", example={"example": model})
        },
        "/v1/chat/completions": post(
            "createChatCompletion", "Answer a conversation", "ChatAnswer", "Chat", messages=hello, max_tokens=16
        ),
        "/v1/completions": post(
            "createCompletion", "Go on with a text", "CompletionAnswer", "Completion", prompt="hello", max_tokens=16
        ),
        "/v1/embeddings": post(
            "createEmbedding", "Vectors of texts", "EmbeddingAnswer", "Embedding", stream=False, input="hello"
        ),
        "/v1/responses": post(
            "createResponse", "Answer, and keep the answer", "Response", "Respond", input="hello", max_output_tokens=16
        ),
        "/v1/responses/{id}": {
            "get": route("getResponse", "A response that was kept", "Response", "Error", path="id"),
            "delete": route("deleteResponse", "Forget a response", "Deleted", "Error", path="id"),
        },
        "/v1/responses/{id}/input_items": {
            "get": route("listInputItems", "What was asked", "Items", "Error", path="id")
        },
    }

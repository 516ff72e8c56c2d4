"""`/openapi.json`: the routes as an OpenAPI 3.1 document, made from the types that read the requests."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic.json_schema import models_json_schema

from slmops import __version__
from slmops.serve.dialects.openai.response_types import Respond
from slmops.serve.dialects.openai.types import Chat, Completion, Embedding

TEXT, WHOLE, ANY = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "object"}


def _object(**properties: Any) -> dict[str, Any]:
    """All of these, and maybe more."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of}


ERROR = _object(error=_object(message=TEXT, type=TEXT, param=_or_null(TEXT), code=_or_null(TEXT)))
FINISH = {"enum": ["stop", "length", "tool_calls"]}
USAGE = _object(prompt_tokens=WHOLE, completion_tokens=WHOLE, total_tokens=WHOLE)
CARD = _object(id=TEXT, object={"const": "model"}, created=WHOLE, owned_by=TEXT)
CALL = _object(id=TEXT, type={"const": "function"}, function=_object(name=TEXT, arguments=TEXT))
MESSAGE = _object(role={"const": "assistant"}, content=_or_null(TEXT))
MESSAGE["properties"]["tool_calls"] = _list(CALL)
ANSWERS: dict[str, dict[str, Any]] = {
    "ChatAnswer": _object(
        id=TEXT, object={"const": "chat.completion"}, created=WHOLE, model=TEXT, usage=USAGE,
        choices=_list(_object(index=WHOLE, message=MESSAGE, finish_reason=FINISH, logprobs=_or_null(ANY))),
    ),
    "CompletionAnswer": _object(
        id=TEXT, object={"const": "text_completion"}, created=WHOLE, model=TEXT, usage=USAGE,
        choices=_list(_object(index=WHOLE, text=TEXT, finish_reason=FINISH, logprobs=_or_null(ANY))),
    ),
    "EmbeddingAnswer": _object(
        object={"const": "list"}, model=TEXT, usage=_object(prompt_tokens=WHOLE, total_tokens=WHOLE),
        data=_list(_object(object={"const": "embedding"}, index=WHOLE, embedding={"anyOf": [TEXT, _list({"type": "number"})]})),
    ),
    "Response": _object(
        id=TEXT, object={"const": "response"}, created_at=WHOLE, model=TEXT, status={"enum": ["completed", "incomplete"]},
        output=_list(_object(id=TEXT, type={"enum": ["message", "function_call"]})), usage=_or_null(ANY),
    ),
    "Models": _object(object={"const": "list"}, data=_list(CARD)),
    "Model": CARD,
    "Deleted": _object(id=TEXT, deleted={"const": True}),
    "Items": _object(object={"const": "list"}, data=_list(ANY), has_more={"type": "boolean"}),
    "Error": ERROR,
}  # fmt: skip
FAILURES = {"400": "the request is wrong", "404": "there is no such model or response", "413": "the body is too large",
            "500": "the model failed", "503": "there is no room at the moment; see Retry-After"}  # fmt: skip


def _of(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _route(
    summary: str, answer: str, body: str | None = None, path: str | None = None, stream: bool = False
) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _of(answer)}}
    if stream:
        content["text/event-stream"] = {"schema": TEXT}
    failures = {code: said for code, said in FAILURES.items() if body or code == "404"}
    made: dict[str, Any] = {"summary": summary, "responses": {"200": {"description": "the answer", "content": content}}}
    for code, said in failures.items():
        made["responses"][code] = {"description": said, "content": {"application/json": {"schema": _of("Error")}}}
    if body:
        made["requestBody"] = {"required": True, "content": {"application/json": {"schema": _of(body)}}}
    if path:
        made["parameters"] = [
            {"name": path, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ]
    return made


@cache
def openapi() -> dict[str, Any]:
    """The document."""
    kinds = [(kind, "validation") for kind in (Chat, Completion, Embedding, Respond)]
    _, made = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    kept = _route("A response that was kept", "Response", path="id")
    return {
        "openapi": "3.1.0",
        "info": {"title": "slmops serve", "version": __version__},
        "components": {"schemas": {**made["$defs"], **ANSWERS}},
        "paths": {
            "/v1/models": {"get": _route("The models", "Models")},
            "/v1/models/{name}": {"get": _route("A model", "Model", path="name")},
            "/v1/chat/completions": {"post": _route("Answer a conversation", "ChatAnswer", "Chat", stream=True)},
            "/v1/completions": {"post": _route("Go on with a text", "CompletionAnswer", "Completion", stream=True)},
            "/v1/embeddings": {"post": _route("Vectors of texts", "EmbeddingAnswer", "Embedding")},
            "/v1/responses": {"post": _route("Answer, and keep the answer", "Response", "Respond", stream=True)},
            "/v1/responses/{id}": {"get": kept, "delete": _route("Forget a response", "Deleted", path="id")},
            "/v1/responses/{id}/input_items": {"get": _route("What was asked", "Items", path="id")},
        },
    }

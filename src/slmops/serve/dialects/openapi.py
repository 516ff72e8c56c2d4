"""`/openapi.json`: the routes of both dialects as an OpenAPI 3.1 document, made from the types that read the requests.

Law: what a server answers to a request of the document is described there, in status, content type, headers and body (checked with
Schemathesis: `benchmarks/README.md`). The schema of a stream is that of one of its parts: OpenAPI 3.1 has no other word for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

TEXT, WHOLE, NUMBER, ANY = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "number"}, {"type": "object"}
BOOLEAN = {"type": "boolean"}
JSON, EVENTS, LINES = "application/json", "text/event-stream", "application/x-ndjson"
EVENT = {
    "type": "object", "required": ["data"],
    "properties": {"event": TEXT, "data": {"type": "string", "description": "JSON, or at the end [DONE]"}},
}  # fmt: skip
STREAMS = {EVENTS: EVENT, LINES: ANY}
FAILURES = {
    "400": "the request is wrong", "401": "the key is missing or unknown", "403": "the key or the origin may not do this",
    "404": "there is no such thing", "408": "the body did not come", "413": "the body is too large", "429": "too many requests of one key",
    "500": "the model failed", "503": "there is no room at the moment, or the server is about to end", "504": "the time was over",
    "507": "there is not enough memory for the model",
}  # fmt: skip
WITH_BODY = ("404", "408", "413", "500", "507")
"""Failures of routes that ask a model."""
LATER = ("429", "503")
"""Come with the seconds after which to ask again."""
REQUEST_ID = {"description": "names the request in the server's log", "schema": TEXT, "required": True}
RETRY_AFTER = {"description": "seconds", "schema": {"type": "string", "pattern": "^[0-9]+$"}, "required": True}


def shape(**properties: Any) -> dict[str, Any]:
    """All of these, and maybe more."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """It, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def list_of(schema: dict[str, Any]) -> dict[str, Any]:
    """A list of it."""
    return {"type": "array", "items": schema}


def named(name: str) -> dict[str, Any]:
    """A schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def route(
    id: str, summary: str, answer: str | None, error: str, *, body: str | None = None, path: str | None = None, stream: str = "",
    example: Mapping[str, Any] | None = None, links: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """An operation.

    Args:
        answer, error, body: names of schemas; an answer that is None is empty.
        path: the name of what stands in the path.
        stream: the content type of an answer in parts, if there may be one.
        example: of the body, or of what stands in the path.
        links: operations that go on with the id of the answer.
    """
    good: dict[str, Any] = {"description": "the answer", "headers": {"x-request-id": REQUEST_ID}}
    if answer:
        good["content"] = {JSON: {"schema": named(answer)}} | ({stream: {"schema": STREAMS[stream]}} if stream else {})
    if links:
        good["links"] = {
            name: {"operationId": operation, "parameters": {"id": "$response.body#/id"}}
            for name, operation in links.items()
        }
    made: dict[str, Any] = {"operationId": id, "summary": summary, "responses": {"200": good}}
    for code, said in FAILURES.items():
        if code not in WITH_BODY or body or (code == "404" and path):
            headers = {"x-request-id": REQUEST_ID} | ({"Retry-After": RETRY_AFTER} if code in LATER else {})
            content = {JSON: {"schema": named(error)}}
            made["responses"][code] = {"description": said, "headers": headers, "content": content}
    if body:
        told = {"schema": named(body)} | ({"example": dict(example)} if example else {})
        made["requestBody"] = {"required": True, "content": {JSON: told}}
    if path:
        schema = {"type": "string", "minLength": 1}
        made["parameters"] = [{"name": path, "in": "path", "required": True, "schema": schema, **(example or {})}]
    return made


def requests(kinds: Sequence[type[BaseModel]], prefix: str = "") -> dict[str, Any]:
    """The schemas of requests, by the prefix and the names of their types. A field that need not be there may be null, see `Body`."""
    place = f"#/components/schemas/{prefix}{{model}}"
    _, made = models_json_schema([(kind, "validation") for kind in kinds], ref_template=place)
    found = {f"{prefix}{name}": schema for name, schema in made["$defs"].items()}
    for schema in found.values():
        for name, one in schema.get("properties", {}).items():
            if name not in schema.get("required", ()) and {"type": "null"} not in one.get("anyOf", ()):
                schema["properties"][name] = {"anyOf": [one, {"type": "null"}]}
    return found

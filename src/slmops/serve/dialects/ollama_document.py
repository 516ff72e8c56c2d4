"""Ollama's routes in the document; see `slmops.serve.dialects.openapi`. Those that only say what is not served are left out."""

from __future__ import annotations

from typing import Any

from slmops.serve.dialects.ollama_shapes import Chat, Copy, Create, Embed, Embedding, Generate, Named, Show
from slmops.serve.dialects.openapi import (
    ANY,
    LINES,
    NUMBER,
    TEXT,
    WHOLE,
    list_of,
    or_null,
    requests,
    route,
    shape,
)

PREFIX = "Ollama"
LIKELY = shape(token=TEXT, logprob=NUMBER, bytes=or_null(list_of(WHOLE)))
TOLD = {**LIKELY, "properties": {**LIKELY["properties"], "top_logprobs": list_of(LIKELY)}}
MEASURED = (
    "total_duration",
    "load_duration",
    "prompt_eval_count",
    "prompt_eval_duration",
    "eval_count",
    "eval_duration",
)
DETAILS = shape(
    parent_model=TEXT, format=TEXT, family=TEXT, families=list_of(TEXT), parameter_size=TEXT, quantization_level=TEXT
)
CALLS = list_of(shape(function=shape(name=TEXT, arguments=ANY)))


def _answer(**said: Any) -> dict[str, Any]:
    """A whole answer. One that only loads its model measures nothing."""
    made = shape(model=TEXT, created_at=TEXT, done={"const": True}, done_reason=TEXT, **said)
    made["properties"] |= {**dict.fromkeys(MEASURED, WHOLE), "logprobs": list_of(TOLD), "context": list_of(WHOLE)}
    return made


MESSAGE = shape(role={"const": "assistant"}, content=TEXT)
MESSAGE["properties"]["tool_calls"] = CALLS
CARD = {"name": TEXT, "model": TEXT, "size": WHOLE, "digest": TEXT, "details": DETAILS}
ANSWERS: dict[str, dict[str, Any]] = {
    "GenerateAnswer": _answer(response=TEXT),
    "ChatAnswer": _answer(message=MESSAGE),
    "EmbedAnswer": shape(
        model=TEXT, embeddings=list_of(list_of(NUMBER)), total_duration=WHOLE, load_duration=WHOLE, prompt_eval_count=WHOLE
    ),
    "EmbeddingAnswer": shape(embedding=list_of(NUMBER)),
    "ShowAnswer": shape(
        modelfile=TEXT, template=TEXT, details=DETAILS, model_info=ANY, capabilities=list_of(TEXT), modified_at=TEXT
    ),
    "Status": shape(status=TEXT),
    "Models": shape(models=list_of(shape(modified_at=TEXT, **CARD))),
    "Loaded": shape(models=list_of(shape(expires_at=TEXT, size_vram=WHOLE, context_length=WHOLE, **CARD))),
    "Version": shape(version=TEXT),
    "Error": shape(error=TEXT),
}  # fmt: skip
ANSWERS["ShowAnswer"]["properties"] |= {
    "parameters": TEXT, "system": TEXT, "license": TEXT, "messages": list_of(shape(role=TEXT, content=TEXT)),
}  # fmt: skip


def schemas() -> dict[str, Any]:
    """Of requests and answers."""
    kinds = (Chat, Copy, Create, Embed, Embedding, Generate, Named, Show)
    return {**requests(kinds, PREFIX), **{f"{PREFIX}{name}": schema for name, schema in ANSWERS.items()}}


def paths(model: str) -> dict[str, Any]:
    """The routes, with examples for a model."""

    def made(
        id: str, summary: str, answer: str | None, body: str | None = None, stream: bool = False, **example: Any
    ) -> dict[str, Any]:
        return route(
            f"ollama{id}", summary, answer and PREFIX + answer, f"{PREFIX}Error", body=body and PREFIX + body,
            stream=LINES if stream else "", example=example,
        )  # fmt: skip

    few: dict[str, Any] = {"model": model, "options": {"num_predict": 16}}
    hello = [{"role": "user", "content": "hello"}]
    return {
        "/api/version": {"get": made("Version", "The version of slmops", "Version")},
        "/api/tags": {"get": made("Tags", "The models", "Models")},
        "/api/ps": {"get": made("Ps", "The models that are loaded", "Loaded")},
        "/api/generate": {
            "post": made(
                "Generate", "Go on with a text", "GenerateAnswer", "Generate", stream=True, **few, prompt="hello"
            )
        },
        "/api/chat": {
            "post": made("Chat", "Answer a conversation", "ChatAnswer", "Chat", stream=True, **few, messages=hello)
        },
        "/api/embed": {"post": made("Embed", "Vectors of texts", "EmbedAnswer", "Embed", model=model, input="hello")},
        "/api/embeddings": {
            "post": made("Embeddings", "The vector of a text", "EmbeddingAnswer", "Embedding", model=model, prompt="hello")
        },
        "/api/show": {"post": made("Show", "What a model is", "ShowAnswer", "Show", model=model)},
        "/api/create": {
            "post": made(
                "Create", "Define a model over a served one", "Status", "Create", stream=True,
                **{"model": "brief", "from": model, "system": "Be brief."},
            )
        },
        "/api/copy": {"post": made("Copy", "Another name for a model", None, "Copy", source=model, destination="other")},
        "/api/delete": {"delete": made("Delete", "Forget a definition", None, "Named", model="other")},
    }  # fmt: skip

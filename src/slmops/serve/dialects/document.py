"""`/openapi.json`: what all routes for clients take and answer, as an OpenAPI 3.1 document."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from slmops import __version__
from slmops.serve.dialects import ollama_document
from slmops.serve.dialects.openai import document as openai_document

LENIENT = "Fields that are not known are refused. A number, true or false that comes as a text is read as what it says."


@lru_cache(1)
def openapi(model: str) -> dict[str, Any]:
    """The document, with examples for a model."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "slmops serve", "version": __version__, "description": LENIENT},
        "security": [{}, {"key": []}],
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "where keys are asked for"}},
            "schemas": {**openai_document.schemas(), **ollama_document.schemas()},
        },
        "paths": {**openai_document.paths(model), **ollama_document.paths(model)},
    }
